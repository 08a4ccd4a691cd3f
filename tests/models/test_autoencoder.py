"""First stages by what must hold whatever their weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.errors import ConfigError, RequestError
from mezzotint.models import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)

SMALL: dict[str, Any] = {"base_channels": 8, "norm_num_groups": 4, "layers_per_block": 1}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vq(**fields: Any) -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQModelConfig.for_factor(2, **(SMALL | {"codebook_size": 32} | fields)))


@pytest.mark.parametrize("f", [1, 2, 4, 8, 16, 32])
@torch.no_grad()
def test_every_factor(f: int) -> None:
    x = draw(1, 3, 2 * f, 3 * f)
    kl = AutoencoderKL(AutoencoderKLConfig.for_factor(f, **SMALL))
    assert (kl.factor, kl.latent_channels, kl.in_channels) == (f, 4, 3)
    posterior = kl.encode(x)
    assert posterior.mean.shape == posterior.std.shape == (1, 4, 2, 3)
    assert kl.decode(posterior.mode()).shape == x.shape
    quantised = VQModel(VQModelConfig.for_factor(f, **SMALL, codebook_size=8))
    assert quantised.encode(x).shape == (1, 3, 2, 3)
    assert quantised.decode(quantised.encode(x)).shape == x.shape


@pytest.mark.parametrize("f", [0, 3, 64, -4])
def test_other_factors_are_refused(f: int) -> None:
    with pytest.raises(ConfigError, match=rf"f must be a power of two up to 32, got {f}; choose"):
        AutoencoderKLConfig.for_factor(f)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((65, 64), r"65x64.*f = 8; nearest: 64x64 or 72x64"),
        ((64, 100), r"64x100.*f = 8; nearest: 64x96 or 64x104"),
        ((5, 8), r"5x8.*nearest: 8x8$"),
    ],
)
@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_sizes_that_f_does_not_divide(kind: type, size: tuple[int, int], message: str) -> None:
    config = AutoencoderKLConfig if kind is AutoencoderKL else VQModelConfig
    with pytest.raises(RequestError, match=message):
        kind(config.for_factor(8, **SMALL)).encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_levels": (True,)}, "attention_levels has 1 flags.*4 levels"),
        ({"norm_num_groups": 48}, "norm_num_groups 48 does not divide the 128 channels"),
        ({"block_out_channels": (32,) * 7}, "7 levels, which is f = 64"),
        ({"latent_chanels": 4}, "did you mean 'latent_channels'"),
    ],
)
def test_configuration_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLConfig.from_dict(fields)


@torch.no_grad()
def test_the_quantiser_stands_in_the_decoder() -> None:
    first_stage = vq()
    z = first_stage.encode(draw(2, 3, 8, 8))
    quantization = first_stage.quantize(z)
    codes = first_stage.quantize.embedding.weight[quantization.indices].movedim(-1, 1)
    assert not torch.allclose(z, codes)
    assert torch.equal(first_stage.decode(z), first_stage.decode_quantized(quantization.z_q))
    # codes are their own nearest codes, so decoding them changes nothing more
    assert torch.allclose(first_stage.decode(codes), first_stage.decode(z), atol=1e-5)


def test_gradients_pass_the_quantiser_to_the_encoder() -> None:
    first_stage = vq()
    x = draw(2, 3, 8, 8)
    (first_stage.decode(first_stage.encode(x)) - x).square().mean().backward()
    gradient = first_stage.encoder.conv_in.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_codes_may_be_shorter_than_the_encoders_output() -> None:
    first_stage = vq(latent_channels=6, embedding_dim=2)
    assert first_stage.latent_channels == 2
    assert first_stage.encode(draw(1, 3, 8, 8)).shape == (1, 2, 4, 4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_last_layer_is_linear_in_the_output(kind: str) -> None:
    first_stage = (
        vq() if kind == "vq" else AutoencoderKL(AutoencoderKLConfig.for_factor(2, **SMALL))
    )
    z = draw(1, first_stage.latent_channels, 4, 4)
    with torch.no_grad():
        bias = first_stage.decoder.conv_out.bias[:, None, None]
        once = first_stage.decode(z) - bias
        first_stage.last_layer.mul_(2)
        assert torch.allclose(first_stage.decode(z) - bias, 2 * once, atol=1e-5)


def test_identity_first_stage_is_pixel_diffusion() -> None:
    first_stage = IdentityFirstStage(IdentityFirstStageConfig())
    x = draw(1, 3, 5, 7)
    assert (first_stage.factor, first_stage.latent_channels, first_stage.in_channels) == (1, 3, 3)
    assert torch.equal(first_stage.decode(first_stage.encode(x)), x)
    assert not list(first_stage.parameters())


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderKLConfig.for_factor(16, attention_levels=[False] * 4 + [True]),
        VQModelConfig(embedding_dim=2),
        IdentityFirstStageConfig(in_channels=1),
    ],
)
def test_configuration_round_trip(config: Any) -> None:
    assert type(config).from_dict(config.to_dict()) == config
