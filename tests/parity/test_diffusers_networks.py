"""The networks compute what diffusers computes from the same parameters, key for key."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from mezzotint.models import AutoencoderKL, AutoencoderKLConfig, UNet, UNetConfig, VQModel
from mezzotint.models.autoencoder import VQModelConfig

# float32 has 24 bits; a few dozen layers leave about 1e-6, and 1e-4 is what the project promises
TOLERANCE = 1e-4

CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
PLAIN = "DownBlock2D", "UpBlock2D"
SELF = "AttnDownBlock2D", "AttnUpBlock2D"
RESNET = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value at which signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            scale = 1.0 if "embedding.weight" in name else parameter[0].numel() ** -0.5
            parameter.data = noise * scale
        else:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))


def twins(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    randomize(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01  # equal zeros would prove nothing
    assert (ours - theirs).norm() / theirs.norm() <= TOLERANCE


def block_types(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {
        "down_block_types": tuple(down for down, _ in pairs),
        "up_block_types": tuple(up for _, up in reversed(pairs)),
    }


X = draw(2, 4, 16, 16)
TIME = torch.tensor([3.0, 712.5])
CONTEXT = draw(2, 7, 24, seed=2)
LABELS = torch.tensor([4, 0])
VECTOR = draw(2, 12, seed=3)

SHAPE = {"norm_num_groups": 8, "cross_attention_dim": 24}
DEEP = SHAPE | {"block_out_channels": (16, 32, 32, 32)}
SMALL = SHAPE | {"block_out_channels": (16, 32), "layers_per_block": 1}
OURS_SMALL = SMALL | {"attention_levels": (True, True), "num_attention_heads": 4}
THEIRS_SMALL = SMALL | block_types(CROSS, CROSS) | {"attention_head_dim": 4}

CROSS_ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (our fields, theirs, their arguments)
    "sd1": (
        DEEP | {"num_attention_heads": 4},
        DEEP | {"attention_head_dim": 4} | block_types(CROSS, CROSS, CROSS, PLAIN),
        {},
    ),
    "sd2": (
        DEEP
        | {"num_attention_heads": None, "attention_head_dim": 8, "use_linear_projection": True},
        DEEP
        | {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True}
        | block_types(CROSS, CROSS, CROSS, PLAIN),
        {},
    ),
    "two transformer layers": (
        OURS_SMALL | {"transformer_layers_per_block": 2},
        THEIRS_SMALL | {"transformer_layers_per_block": 2},
        {},
    ),
    "class-conditional": (
        OURS_SMALL | {"num_class_embeds": 5},
        THEIRS_SMALL | {"num_class_embeds": 5},
        {"class_labels": LABELS},
    ),
    "vector": (
        OURS_SMALL | {"vector_dim": 12},
        THEIRS_SMALL
        | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"class_labels": VECTOR},
    ),
    "scale-shift": (
        OURS_SMALL | {"resnet_time_scale_shift": "scale_shift"},
        THEIRS_SMALL | {"resnet_time_scale_shift": "scale_shift"},
        {},
    ),
    # diffusers has up/down ResBlocks beside cross-attention in the middle only: its
    # SimpleCrossAttn blocks attend to text and image at once, which is another network
    "up/down ResBlocks": (
        OURS_SMALL | {"attention_levels": (False, False), "resblock_updown": True},
        THEIRS_SMALL | block_types(RESNET, RESNET),
        {},
    ),
}


@pytest.mark.parametrize("case", CROSS_ATTENTION)
def test_cross_attention_unet(case: str) -> None:
    fields, their_fields, arguments = CROSS_ATTENTION[case]
    theirs = diffusers.UNet2DConditionModel(**their_fields)
    ours, theirs = twins(UNet(UNetConfig.from_dict(fields)), theirs)
    with torch.no_grad():
        expected = theirs(X, TIME, CONTEXT, **arguments).sample
        assert_close(ours(X, TIME, CONTEXT, vector=arguments.get("class_labels")), expected)


def test_cross_attention_unet_of_an_odd_size_with_a_mask() -> None:
    theirs = diffusers.UNet2DConditionModel(**THEIRS_SMALL)
    ours, theirs = twins(UNet(UNetConfig.from_dict(OURS_SMALL)), theirs)
    x, mask = draw(2, 4, 13, 18), torch.arange(7) < torch.tensor([[7], [2]])
    with torch.no_grad():
        expected = theirs(x, TIME, CONTEXT, encoder_attention_mask=mask).sample
        assert_close(ours(x, TIME, CONTEXT, mask), expected)


def test_guidance_embedding() -> None:
    theirs = diffusers.UNet2DConditionModel(**THEIRS_SMALL, time_cond_proj_dim=32)
    config = UNetConfig.from_dict(OURS_SMALL | {"guidance_embed_dim": 32})
    ours, theirs = twins(UNet(config), theirs)
    guidance = torch.tensor([7.5, 1.0])
    embedding = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, guidance - 1, embedding_dim=32
    )
    with torch.no_grad():
        expected = theirs(X, TIME, CONTEXT, timestep_cond=embedding).sample
        assert_close(ours(X, TIME, CONTEXT, guidance=guidance), expected)


UNCONDITIONAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "latent diffusion": ({}, {}),
    "its first form": (
        {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
        {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    ),
    "class-conditional": ({"num_class_embeds": 5}, {"num_class_embeds": 5}),
    # without attn_norm_num_groups, diffusers' middle attention drops its normalisation here
    "scale-shift": (
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    ),
    "up/down ResBlocks": (
        {"resblock_updown": True},
        {"downsample_type": "resnet", "upsample_type": "resnet"} | block_types(RESNET, SELF, SELF),
    ),
}


@pytest.mark.parametrize("case", UNCONDITIONAL)
def test_unconditional_unet(case: str) -> None:
    fields, their_fields = UNCONDITIONAL[case]
    shape = {"in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32, 48)}
    shape |= {"layers_per_block": 1}
    shape |= {"norm_num_groups": 8, "attention_head_dim": 8}
    config = UNetConfig.from_dict(
        shape
        | {"cross_attention_dim": None, "num_attention_heads": None}
        | {"attention_levels": (False, True, True)}
        | fields
    )
    theirs = diffusers.UNet2DModel(**(shape | block_types(PLAIN, SELF, SELF) | their_fields))
    ours, theirs = twins(UNet(config), theirs)
    labels = LABELS if config.num_class_embeds else None
    x = draw(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(ours(x, TIME, vector=labels), theirs(x, TIME, class_labels=labels).sample)


def autoencoder_types(flags: tuple[bool, ...]) -> dict[str, Any]:
    return {
        "down_block_types": tuple(f"{'Attn' * on}DownEncoderBlock2D" for on in flags),
        "up_block_types": tuple(f"{'Attn' * on}UpDecoderBlock2D" for on in reversed(flags)),
    }


@pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])
@pytest.mark.parametrize("f", [1, 2, 4, 8, 16, 32])
def test_autoencoder_kl(f: int, attention: bool) -> None:
    base = AutoencoderKLConfig.for_factor(
        f, base_channels=8, norm_num_groups=4, layers_per_block=1, mid_attention=not attention
    )
    flags = tuple(attention and level % 2 == 0 for level in range(len(base.block_out_channels)))
    config = base.model_copy(update={"attention_levels": flags})
    theirs = diffusers.AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=not attention,
        **autoencoder_types(flags),
    )
    ours, theirs = twins(AutoencoderKL(config), theirs)
    x = draw(2, 3, f, 2 * f) if f > 4 else draw(2, 3, 8, 12)
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
        assert_close(posterior.mean, expected.mean)
        assert_close(posterior.std, expected.std)
        assert_close(ours.decode(posterior.mean), theirs.decode(expected.mean).sample)


@pytest.mark.parametrize("embedding_dim", [None, 6])
def test_vq_model(embedding_dim: int | None) -> None:
    shape = {"block_out_channels": (8, 16, 32), "layers_per_block": 2, "norm_num_groups": 4}
    config = VQModelConfig.from_dict(shape | {"codebook_size": 64, "embedding_dim": embedding_dim})
    theirs = diffusers.VQModel(
        **shape,
        **autoencoder_types((False,) * 3),
        latent_channels=3,
        num_vq_embeddings=64,
        vq_embed_dim=embedding_dim,
    )
    ours, theirs = twins(VQModel(config), theirs)
    x = draw(2, 3, 16, 24)
    with torch.no_grad():
        z = ours.encode(x)
        assert_close(z, theirs.encode(x).latents)
        assert len(ours.quantize(z).indices.unique()) > 4  # the quantiser has something to do
        assert_close(ours.decode(z), theirs.decode(z).sample)
