"""Convolutions of size 3 in 4/9 of the products (Lavin and Gray 2016, arXiv 1509.09308).

F(2 x 2, 3 x 3) of the paper: 2 x 2 outputs Y of a 4 x 4 tile d of the input and a kernel g are
Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, equation 8, so that a convolution becomes 16 products of matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["convolve", "transform_weight"]

_ops: Any = torch.ops.mkldnn
_ROWS = 512  # tiles at once: what they become then stays in the cache


def transform_weight(weight: Tensor) -> list[Tensor]:
    """Return the 16 matrices G g Gᵀ of a kernel, packed for oneDNN; 16/9 of its size.

    Args:
        weight: ``(out, in, 3, 3)``, float32.
    """
    g = weight.new_tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).double() / 2
    matrices = torch.einsum("ik,jl,ockl->ijoc", g, g, weight.double()).float()
    return [
        _ops._reorder_linear_weight(matrix.contiguous(), _ROWS) for matrix in matrices.flatten(0, 1)
    ]


def convolve(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve with a padding of 1 and a stride of 1.

    Args:
        x: ``(B, C, H, W)``, float32, H and W even.
        weights: From `transform_weight`.
        bias: ``(out,)``.

    Returns:
        ``(B, out, H, W)``, channels last; without a gradient.
    """
    rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, H, W, C)
    count, height, width, _ = rows.shape
    out = x.new_empty(count, height, width, weights[0].shape[0])
    high = 2 * max(1, 2 * _ROWS // width)
    for sample, made in zip(rows, out, strict=True):
        for top in range(0, height, high):
            end = min(top + high, height)
            above, below = int(top == 0), int(end == height)
            seen = sample[top - 1 + above : end + 1 - below]
            strip = F.pad(seen, (0, 0, 1, 1, above, below))  # (rows + 2, W + 2, C)
            _outputs(_products(strip, weights), bias, made[top:end])
    return out.permute(0, 3, 1, 2)


def _products(strip: Tensor, weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """(G g Gᵀ) (Bᵀ d B) of all tiles of some rows: 4 x 4 of ``(tiles, out)``."""
    products: list[list[Tensor]] = []
    for i, down in enumerate(_input_parts(_taps(strip, 0))):
        parts = _input_parts(_taps(down, 1))  # each (rows / 2, W / 2, C)
        products.append(
            [
                _ops._linear_pointwise(p.flatten(0, 1), weights[4 * i + j], None, "none", [], "")
                for j, p in enumerate(parts)
            ]
        )
    return products


def _taps(x: Tensor, dim: int) -> list[Tensor]:
    """The first to the fourth of every 4 neighbours, at steps of 2."""
    windows = x.unfold(dim, 4, 2)  # a view, whose last axis is the place in a window
    return list(windows.unbind(-1))


def _input_parts(d: Sequence[Tensor]) -> list[Tensor]:
    """Bᵀ d along one axis."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _outputs(products: list[list[Tensor]], bias: Tensor | None, out: Tensor) -> None:
    """Aᵀ m A of the products m, with the bias, into ``(rows, W, out)``."""
    columns = [_output_parts([products[i][j] for i in range(4)]) for j in range(4)]
    height, width, channels = out.shape
    tiles = out.view(height // 2, 2, width // 2, 2, channels)
    for down in range(2):
        for across, part in enumerate(_output_parts([column[down] for column in columns])):
            if bias is not None:
                part += bias
            tiles[:, down, :, across] = part.view(height // 2, width // 2, channels)


def _output_parts(m: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Aᵀ m along one axis."""
    return (m[1] + m[2]).add_(m[0]), (m[1] - m[2]).sub_(m[3])
