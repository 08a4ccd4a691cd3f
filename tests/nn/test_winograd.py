"""Winograd's algorithm is convolution."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.nn.winograd import convolve, transform_weight


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("count", "height", "width"),
    # one tile; several strips, of which the last is shorter; wider than a strip has tiles
    [(1, 4, 4), (2, 140, 64), (1, 12, 2400)],
)
@torch.no_grad()
def test_it_is_convolution(count: int, height: int, width: int, biased: bool) -> None:
    x, weight = draw(count, 5, height, width), draw(7, 5, 3, 3, seed=1) / 7
    bias = draw(7, seed=2) if biased else None
    wide = None if bias is None else bias.double()
    right = F.conv2d(x.double(), weight.double(), wide, padding=1)
    out = convolve(x, transform_weight(weight), bias)
    assert out.shape == right.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - right).abs().max() < 1e-5


@torch.no_grad()
def test_sums_over_many_channels_stay_float32_s() -> None:
    x, weight = draw(1, 256, 16, 16), draw(32, 256, 3, 3, seed=1) / 48
    right = F.conv2d(x.double(), weight.double(), padding=1)
    # direct sums came to 2e-7 to 1e-6, by the kernel that oneDNN takes; these to 1.7e-6, and to
    # 3.5e-6 at the points 0, ±1, ±2
    assert (convolve(x, transform_weight(weight), None) - right).norm() < 2.5e-6 * right.norm()
