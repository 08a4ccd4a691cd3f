"""Drawing in tiles, and pictures whose edges fit together."""

import pytest
import torch
from torch import nn

from mezzotint.conditioning.base import Conditioning
from mezzotint.generation.tiling import denoise_in_tiles, seamless, tile_of
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig


@pytest.mark.parametrize("size", [(8, 8), (16, 31), (40, 12)])
def test_each_tile_is_told_its_own_part(size: tuple[int, int]) -> None:
    x, told = torch.randn(2, 4, *size), torch.randn(2, 3, *size)
    sigma = torch.tensor([0.5, 2.0])
    cond = Conditioning(concat=told, crossattn=torch.ones(2, 5, 6))
    seen: list[tuple[int, ...]] = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        assert cond.concat is not None and cond.crossattn is not None
        seen.append(tuple(cond.crossattn.shape))
        return x / sigma.view(-1, 1, 1, 1) + cond.concat.mean(1, keepdim=True)

    tiled = denoise_in_tiles(denoiser, x, sigma, cond, tile=8, overlap=2)
    torch.testing.assert_close(tiled, denoiser(x, sigma, cond), atol=1e-5, rtol=1e-5)
    assert set(seen) == {(2, 5, 6)}


def test_tiles_are_as_large_as_in_training() -> None:
    assert [tile_of(*size) for size in ((16, 16), (32, 32), (48, 40), (128, 64))] == [
        32,
        32,
        48,
        64,
    ]


def test_no_call_sees_more_than_a_tile_and_tiles_fade_into_one_another() -> None:
    seen: list[tuple[int, ...]] = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        seen.append(tuple(x.shape[-2:]))
        return torch.full_like(x, float(len(seen)))  # every tile is of another level

    x = torch.zeros(1, 4, 50, 20)
    made = denoise_in_tiles(denoiser, x, torch.ones(1), Conditioning(), tile=16, overlap=4)
    assert set(seen) == {(16, 16)} and len(seen) == 4 * 2
    assert made.unique().numel() > 8
    # levels of neighbours above one another differ by 2, over 4 or more latents
    assert (made[..., 1:, :] - made[..., :-1, :]).abs().max() <= 2 / 4 + 1e-5


def test_a_seamless_network_commutes_with_rolling() -> None:
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    decoder = AutoencoderKL(config).eval()
    latents = torch.randn(1, 4, 8, 8)
    rolled = latents.roll((3, 2), (2, 3))
    with torch.inference_mode():
        with seamless(decoder):
            expected = decoder.decode(latents).roll((6, 4), (2, 3))
            torch.testing.assert_close(decoder.decode(rolled), expected, atol=1e-5, rtol=1e-4)
        difference = (decoder.decode(rolled) - decoder.decode(latents).roll((6, 4), (2, 3))).abs()
    assert difference.max() > 1e-3
    modes = {m.padding_mode for m in decoder.modules() if isinstance(m, nn.Conv2d)}
    assert modes == {"zeros"}
