"""Residual blocks and changes of resolution by closed form."""

import pytest
import torch
from torch import Tensor, nn

from mezzotint.nn.resnet import Downsample, ResnetBlock, Upsample


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def silence(block: ResnetBlock) -> None:
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)


def pick_centre(conv: nn.Conv2d) -> None:
    """Make a convolution of size 3 copy the middle pixel of what it sees."""
    nn.init.dirac_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def test_resnet_block_without_its_branch_is_the_identity() -> None:
    block = ResnetBlock(8, 8, time_dim=6, groups=4)
    silence(block)
    x = draw(2, 8, 5, 7)
    assert torch.equal(block(x, draw(2, 6)), x)


def test_resampling_blocks_average_and_repeat() -> None:
    down = ResnetBlock(8, 8, groups=4, resample="down")
    up = ResnetBlock(8, 8, groups=4, resample="up")
    silence(down)
    silence(up)
    x = draw(2, 8, 4, 6)
    means = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean(dim=(3, 5))
    assert torch.allclose(down(x), means, atol=1e-6)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert up(x, None, (7, 12)).shape == (2, 8, 7, 12)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_changes_the_features(scale_shift: bool) -> None:
    block = ResnetBlock(8, 8, time_dim=6, groups=4, scale_shift=scale_shift)
    x = draw(1, 8, 4, 4)
    assert not torch.allclose(block(x, draw(1, 6)), block(x, draw(1, 6, seed=1)))


def test_scale_and_shift_follow_the_second_normalisation() -> None:
    block = ResnetBlock(4, 4, time_dim=2, groups=2, scale_shift=True)
    assert block.time_emb_proj is not None
    pick_centre(block.conv2)
    with torch.no_grad():  # scale 1, shift 3, whatever the time
        block.time_emb_proj.weight.zero_()
        block.time_emb_proj.bias.copy_(torch.tensor([1.0] * 4 + [3.0] * 4))
    x = draw(1, 4, 5, 5)
    normalised = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    expected = x + nn.functional.silu(2 * normalised + 3)
    assert torch.allclose(block(x, draw(1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(("padding", "first"), [(1, 0), (0, 1)])
def test_downsample_looks_at_the_side_that_it_pads(padding: int, first: int) -> None:
    layer = Downsample(1, padding=padding)
    pick_centre(layer.conv)
    x = torch.arange(36.0).view(1, 1, 6, 6)
    # the middle of the first window is the corner pixel, or one to its right and below
    assert torch.equal(layer(x), x[:, :, first::2, first::2])


def test_upsample_repeats_to_the_size_asked() -> None:
    layer = Upsample(1)
    pick_centre(layer.conv)
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert torch.equal(layer(x), torch.tensor([[[[1.0, 1.0, 2.0, 2.0]] * 2]]).view(1, 1, 2, 4))
    assert torch.equal(layer(x, size=(1, 3)), torch.tensor([[[[1.0, 1.0, 2.0]]]]))
