"""Decoding in tiles, and pictures whose edges fit together."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mezzotint.conditioning.base import Conditioning
from mezzotint.generation.tiling import decode_in_tiles, denoise_in_tiles, seamless, tile_of
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig


def enlarge(latents: torch.Tensor) -> torch.Tensor:
    """A decoder that sees one latent at a time."""
    return F.interpolate(latents[:, :3], scale_factor=4.0)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (16, 31), (40, 12), (64, 64)])
def test_tiles_of_a_pointwise_decoder_make_the_whole(size: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, *size)
    tiled = decode_in_tiles(enlarge, latents, 4, tile=8, overlap=2)
    torch.testing.assert_close(tiled, enlarge(latents), atol=1e-5, rtol=1e-5)


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


def test_no_call_sees_more_than_a_tile() -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(latents.shape[-2:]))
        return enlarge(latents)

    decode_in_tiles(decode, torch.randn(1, 4, 50, 20), 4, tile=16, overlap=4)
    assert set(seen) == {(16, 16)} and len(seen) == 4 * 2


def test_a_real_decoder_in_tiles_is_near_the_whole_and_without_seams() -> None:
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    decoder = AutoencoderKL(config).eval()
    with torch.inference_mode():
        latents = F.interpolate(torch.randn(1, 4, 6, 6), (48, 48), mode="bicubic")
        whole = decoder.decode(latents)
        tiled = decode_in_tiles(decoder.decode, latents, 4, tile=32, overlap=8)
    # group norms see other pixels in a tile than in the whole, so the two are near, not equal
    assert (tiled - whole).abs().mean() < 0.3 * whole.std()

    def steepest(pixels: torch.Tensor) -> float:
        return (pixels[..., 1:] - pixels[..., :-1]).abs().mean((0, 1, 2)).max().item()

    assert steepest(tiled) < 1.1 * steepest(whole)


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
