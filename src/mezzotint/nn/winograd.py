"""Convolutions of size 3 in a quarter of the products (Lavin and Gray 2016, arXiv 1509.09308).

F(4 x 4, 3 x 3) of the paper: 4 x 4 outputs Y of a 6 x 6 tile d of the input and a kernel g are
Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, equation 8, so that a convolution becomes 36 products of matrices.
What comes before and after them is a product too, of a small matrix with all tiles at once:
(Bᵀ ⊗ Bᵀ) vec(d) and (Aᵀ ⊗ Aᵀ) vec(m).

The matrices follow from five points at which polynomials are evaluated. At those taken here, 0,
±3/4 and ±3/2, a result of 320 channels in float32 is 1.7e-6 of its norm from the exact one; at the
usual 0, ±1, ±2 it is twice that, and its largest error four times.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["convolve", "transform_weight"]

_ops: Any = torch.ops.mkldnn
_POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))
_OUT, _IN = 4, 6  # sides of a tile of the output and of the input
_ROWS = 512  # tiles at once: what they become then stays in the cache


def transform_weight(weight: Tensor) -> list[Tensor]:
    """Return the 36 matrices G g Gᵀ of a kernel, packed for oneDNN; four times its size.

    Args:
        weight: ``(out, in, 3, 3)``, float32.
    """
    rows = [
        [point**k / prod(point - other for other in _POINTS if other != point) for k in range(3)]
        for point in _POINTS
    ]
    g = _matrix([*rows, [Fraction(0), Fraction(0), Fraction(1)]])
    matrices = torch.einsum("ik,jl,ockl->ijoc", g, g, weight.double()).float()
    return [
        _ops._reorder_linear_weight(matrix.contiguous(), _ROWS) for matrix in matrices.flatten(0, 1)
    ]


def convolve(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve with a padding of 1 and a stride of 1.

    Args:
        x: ``(B, C, H, W)``, float32, H and W multiples of 4.
        weights: From `transform_weight`.
        bias: ``(out,)``.

    Returns:
        ``(B, out, H, W)``, channels last; without a gradient.
    """
    rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, H, W, C)
    count, height, width, _ = rows.shape
    out = x.new_empty(count, height, width, weights[0].shape[0])
    high = _OUT * max(1, _OUT * _ROWS // width)
    for sample, made in zip(rows, out, strict=True):
        for top in range(0, height, high):
            end = min(top + high, height)
            above, below = int(top == 0), int(end == height)
            seen = sample[top - 1 + above : end + 1 - below]
            strip = F.pad(seen, (0, 0, 1, 1, above, below))  # (rows + 2, W + 2, C)
            _convolve_strip(strip, weights, bias, made[top:end])
    return out.permute(0, 3, 1, 2)


def _convolve_strip(
    strip: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """Convolve ``(rows + 2, W + 2, C)`` into ``(rows, W, out)``."""
    high, wide, channels = out.shape[0] // _OUT, out.shape[1] // _OUT, out.shape[2]
    before, after = _transforms()
    windows = strip.unfold(0, _IN, _OUT).unfold(1, _IN, _OUT)  # a view, (high, wide, C, 6, 6)
    tiles = windows.permute(3, 4, 0, 1, 2).reshape(_IN * _IN, -1)  # (36, high wide C)
    parts = torch.mm(before, tiles).view(_IN * _IN, high * wide, -1)
    products = [
        _ops._linear_pointwise(part, weight, None, "none", [], "")
        for part, weight in zip(parts, weights, strict=True)
    ]
    made = torch.mm(after, torch.stack(products).flatten(1))  # (16, high wide out)
    made = made.view(_OUT, _OUT, high, wide, channels)
    if bias is not None:
        made += bias
    out.view(high, _OUT, wide, _OUT, channels).copy_(made.permute(2, 0, 3, 1, 4))


@cache
def _transforms() -> tuple[Tensor, Tensor]:
    """Bᵀ ⊗ Bᵀ ``(36, 36)`` and Aᵀ ⊗ Aᵀ ``(16, 36)``, float32."""
    products = [_product([other for other in _POINTS if other != point]) for point in _POINTS]
    b = _matrix([*([*row, Fraction(0)] for row in products), _product(_POINTS)])
    infinite = [Fraction(0)] * (_OUT - 1) + [Fraction(1)]
    a = _matrix([*([point**k for k in range(_OUT)] for point in _POINTS), infinite]).t()
    return torch.kron(b, b).float(), torch.kron(a.contiguous(), a.contiguous()).float()


def _product(points: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of Π (x - p), from that of 1 on."""
    coefficients = [Fraction(1)]
    for point in points:
        times_x = [Fraction(0), *coefficients]
        times_point = [*(-point * c for c in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(times_x, times_point, strict=True)]
    return coefficients


def _matrix(rows: Sequence[Sequence[Fraction]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
