"""Decoding in stripes is decoding, by less memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mezzotint.generation.tiling import seamless
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.encoder_decoder import Decoder
from mezzotint.models.striped import decode_in_stripes

WIDTHS = (8, 16, 16)


@torch.no_grad()
def lively(module: nn.Module) -> nn.Module:
    """Weights at which every part matters; norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(0.3 * noise + ("norm" in name and "weight" in name))
    return module.eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = AutoencoderKLConfig(
        block_out_channels=WIDTHS, norm_num_groups=4, attention_levels=(False, False, True)
    )
    made = lively(AutoencoderKL(config)).decoder
    assert isinstance(made, Decoder)
    return made


def latents(height: int, width: int, count: int = 1) -> Tensor:
    """Whose upper and lower halves differ in level: statistics of a part are not the whole's."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 4, height, width, generator=generator)
    z[:, :, : height // 2] += 3.0
    return z


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (12, 5), (33, 2)], ids=str)
@pytest.mark.parametrize("held", [0, 1 << 30], ids=["computed again", "held"])
@pytest.mark.parametrize("stripe", [1, 3000, 1 << 30], ids=["a row", "some rows", "all rows"])
def test_it_is_the_whole_decoder(
    decoder: Decoder, size: tuple[int, int], held: int, stripe: int
) -> None:
    z = latents(*size)
    with torch.no_grad():
        whole = decoder(z)
    striped = decode_in_stripes(decoder, z, stripe=stripe, held=held)
    # sums in another order, through thirty layers
    torch.testing.assert_close(striped, whole, atol=2e-5 * whole.std().item(), rtol=2e-5)


def test_every_picture_has_its_own_statistics(decoder: Decoder) -> None:
    z = latents(9, 8, count=3) * torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1, 1)
    with torch.no_grad():
        whole = decoder(z)
    striped = decode_in_stripes(decoder, z, stripe=2000)
    torch.testing.assert_close(striped, whole, atol=2e-5 * whole.std().item(), rtol=2e-5)


def test_bfloat16_is_as_near_as_bfloat16_can_be(decoder: Decoder) -> None:
    z = latents(24, 24)
    with torch.no_grad():
        exact = decoder(z)
        with torch.autocast("cpu", torch.bfloat16):
            whole = decoder(z)
            striped = decode_in_stripes(decoder, z, stripe=3000)
    assert striped.dtype == whole.dtype == torch.bfloat16
    error = (whole - exact).abs().mean()
    assert (striped - exact).abs().mean() < 1.1 * error
    assert (striped - whole).abs().mean() < 1.5 * error  # two roundings of the same


def test_maps_beyond_a_size_are_rounded_alone(decoder: Decoder) -> None:
    z = latents(24, 24)
    with torch.no_grad():
        whole = decoder(z)
    narrow = decode_in_stripes(decoder, z, stripe=3000, held=0, narrow=0)
    assert narrow.dtype == whole.dtype
    difference = (narrow - whole).abs().mean() / whole.std()
    assert 1e-4 < difference < 0.02


@torch.no_grad()
def test_maps_of_half_precision_are_held_as_they_are(decoder: Decoder) -> None:
    z, half = latents(8, 8).half(), copy.deepcopy(decoder).half()
    striped = decode_in_stripes(half, z, stripe=3000, held=0)
    assert striped.dtype is torch.float16
    # bfloat16 would take as much memory and lose three bits
    assert torch.equal(decode_in_stripes(half, z, stripe=3000, held=0, narrow=0), striped)


def test_stripes_are_not_for_edges_that_fit_together(decoder: Decoder) -> None:
    with seamless(decoder), pytest.raises(AssertionError, match="padded"):
        decode_in_stripes(decoder, latents(8, 8))


def test_layers_see_stripes(decoder: Decoder) -> None:
    most: dict[str, int] = {}

    def watch(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            most[name] = max(most.get(name, 0), inputs[0].nbytes)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith("up_blocks")
    ]
    stripe = 16 * 64 * 4 * 8  # eight rows of the widest map
    try:
        decode_in_stripes(decoder, latents(32, 16), stripe=stripe, held=0)
    finally:
        for handle in handles:
            handle.remove()
    assert len(most) == 2 * 9 + 1 + 2
    # rows beside a stripe, on both sides; before upsampling too
    assert max(most.values()) <= stripe * 12 // 8


def test_first_stages_decode_so() -> None:
    vq = lively(
        VQModel(VQModelConfig(block_out_channels=WIDTHS, norm_num_groups=4, codebook_size=16))
    )
    kl = lively(AutoencoderKL(AutoencoderKLConfig(block_out_channels=WIDTHS, norm_num_groups=4)))
    z = latents(8, 8)
    with torch.no_grad():
        for stage, given in ((vq, z[:, :3]), (kl, z)):
            whole = stage.decode(given)
            striped = stage.decode(given, in_stripes=True)
            torch.testing.assert_close(striped, whole, atol=1e-4, rtol=1e-4)
            assert not torch.equal(striped, whole), "the other way was taken"
    identity = IdentityFirstStage(IdentityFirstStageConfig())
    assert torch.equal(identity.decode(z[:, :3], in_stripes=True), z[:, :3])
