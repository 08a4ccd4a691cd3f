"""Pictures that fit together at their edges, and large ones drawn in tiles that fit together."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mezzotint.conditioning.base import Conditioning

__all__ = ["denoise_in_tiles", "seamless", "tile_borders", "tile_of"]

TILE, OVERLAP = 64, 16  # latents


@contextmanager
def seamless(*networks: nn.Module, active: bool = True) -> Generator[None]:
    """Let every convolution see the opposite edge beyond an edge, for a while.

    What such a network draws tiles the plane.

    Args:
        networks: Whose convolutions pad.
        active: Whether to do anything at all.
    """
    convolutions = [
        module
        for network in networks
        for module in network.modules()
        if active and isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
    ]
    try:
        for convolution in convolutions:
            convolution.padding_mode = "circular"
        yield
    finally:
        for convolution in convolutions:
            convolution.padding_mode = "zeros"


def denoise_in_tiles(
    denoiser: Callable[[Tensor, Tensor, Conditioning], Tensor],
    x: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Tensor:
    """Estimate a large clean image piece by piece, blended at every noise level.

    So models draw beyond the size that they were trained at (paper, section 4.3.2) and need see
    no more than that at a time; see `tile_of`. What is concatenated is cut as the latents are;
    tokens are told to every tile, so that this is for conditions that say the same of every part
    of the picture, or are pictures themselves.

    Args:
        denoiser: ``(x, sigma, cond) -> x0``.
        x: ``(B, C, h, w)`` noisy latents.
        sigma: ``(B,)`` noise levels.
        cond: The conditions of the whole.
        tile: Height and width of a tile of latents.
        overlap: How many latents neighbouring tiles share.

    Returns:
        ``(B, C, h, w)`` estimate of the clean latents.
    """

    def piece(rows: slice, columns: slice) -> Tensor:
        return denoiser(x[..., rows, columns], sigma, cond.crop(rows, columns))

    return _blend(piece, x.shape[-2], x.shape[-1], tile=tile, overlap=overlap)


def tile_of(height: int, width: int) -> int:
    """Return the side of the tiles that a model draws in: what it was trained at, 32 to 64.

    Args:
        height: Of the latents that it was trained at.
        width: Of them.
    """
    return min(TILE, max(TILE // 2, height, width))


def tile_borders(
    size: int, factor: int = 1, *, tile: int = TILE, overlap: int = OVERLAP
) -> list[int]:
    """Return where tiles begin and end within a side, in pixels: where seams would be.

    Args:
        size: Latents along the side.
        factor: f, pixels for each of them.
        tile: Latents along the side of a tile.
        overlap: Latents that neighbouring tiles share.

    Example:
        >>> tile_borders(16, 4, tile=8, overlap=2)
        [16, 32, 48]
    """
    starts = list(_starts(size, tile, overlap))
    ends = [start + tile for start in starts[:-1]]
    return sorted(factor * place for place in {*starts[1:], *ends})


def _blend(
    piece: Callable[[slice, slice], Tensor], height: int, width: int, *, tile: int, overlap: int
) -> Tensor:
    """Make tiles of rows and columns, and fade them into one another where they overlap."""
    if height <= tile and width <= tile:
        return piece(slice(0, height), slice(0, width))
    total: Tensor | None = None
    weights = torch.zeros(1, 1, height, width)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            rows, columns = min(tile, height - top), min(tile, width - left)
            place = slice(top, top + rows), slice(left, left + columns)
            made = piece(*place).float()
            ramp = _ramp(columns, left, width, overlap)
            weight = (_ramp(rows, top, height, overlap)[:, None] * ramp).to(made.device)
            if total is None:
                total = made.new_zeros(*made.shape[:2], height, width)
                weights = weights.to(made.device)
            total[..., *place] += weight * made
            weights[..., *place] += weight
    assert total is not None
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> Iterator[int]:
    """Where tiles begin: evenly, the last one ending at the end."""
    if size <= tile:
        yield 0
        return
    count = -(-(size - overlap) // (tile - overlap))
    for k in range(count):
        yield round(k * (size - tile) / (count - 1))


def _ramp(length: int, start: int, size: int, overlap: int) -> Tensor:
    """Weights along one side of a tile: rising and falling where it has a neighbour."""
    weight = torch.ones(length)
    rise = (torch.arange(overlap) + 0.5) / overlap
    if start > 0:
        weight[: len(rise)] = rise
    if start + length < size:
        weight[-len(rise) :] = torch.minimum(weight[-len(rise) :], rise.flip(0))
    return weight
