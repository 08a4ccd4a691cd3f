"""Pictures that fit together at their edges, and decoding in tiles that fit together."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["decode_in_tiles", "seamless"]

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


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    factor: int,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Tensor:
    """Decode piece by piece; where pieces overlap they fade into one another.

    The decoder's normalisation and attention see one tile at a time, so the picture differs
    slightly from one that was decoded as a whole.

    Args:
        decode: ``(B, C, h, w)`` latents to ``(B, 3, H, W)`` pixels.
        latents: What to decode.
        factor: f, how many times larger the pixels are.
        tile: Height and width of a tile of latents.
        overlap: How many latents neighbouring tiles share.

    Returns:
        ``(B, 3, f h, f w)`` pixels.
    """
    height, width = latents.shape[-2:]
    if height <= tile and width <= tile:
        return decode(latents)
    total: Tensor | None = None
    weights = torch.zeros(1, 1, height * factor, width * factor, device=latents.device)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            piece = latents[..., top : top + tile, left : left + tile]
            pixels = decode(piece).float()
            rows, columns = piece.shape[-2:]
            weight = _ramp(rows, top, height, overlap, factor)[:, None] * _ramp(
                columns, left, width, overlap, factor
            )
            weight = weight.to(pixels.device)
            if total is None:
                shape = (*pixels.shape[:2], height * factor, width * factor)
                total = pixels.new_zeros(shape)
            place = (
                ...,
                slice(top * factor, (top + rows) * factor),
                slice(left * factor, (left + columns) * factor),
            )
            total[place] += weight * pixels
            weights[place] += weight
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


def _ramp(length: int, start: int, size: int, overlap: int, factor: int) -> Tensor:
    """Weights along one side of a tile: rising and falling where it has a neighbour."""
    weight = torch.ones(length * factor)
    rise = (torch.arange(overlap * factor) + 0.5) / (overlap * factor)
    if start > 0:
        weight[: len(rise)] = rise
    if start + length < size:
        weight[-len(rise) :] = torch.minimum(weight[-len(rise) :], rise.flip(0))
    return weight
