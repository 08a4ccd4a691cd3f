"""The configurations of published components, translated to ours and back.

A component folder's ``config.json`` names a class and its constructor's arguments. The names form a
closed table. What a class of diffusers can say and ours cannot must be at its neutral value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mezzotint.checkpoints.keys import PASSED, Keys, levels
from mezzotint.checkpoints.unet_keys import (
    read_conditional_unet,
    read_plain_unet,
    read_sample_size,
    write_conditional_unet,
    write_plain_unet,
)
from mezzotint.config import Config
from mezzotint.errors import CheckpointError, ConfigError, nearest, short
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig

__all__ = ["LAYOUTS", "Layout", "config_to_layout", "layout_to_config"]

# the key for what our configuration has and diffusers' has not; its reader skips underscores
EXTRA = "_mezzotint"


@dataclass(frozen=True)
class Layout:
    """One class that a ``config.json`` may name.

    Attributes:
        library: Who else knows the class, ``diffusers`` or nobody but ``mezzotint``.
        config: Our configuration of it.
        build: Our module of it.
        read: From their keys to our fields.
        write: From our configuration to their keys; None if the class cannot express it.
        neutral: Keys that we don't model, and the values at which they change nothing.
    """

    library: str
    config: type[Config]
    build: Callable[[Any], nn.Module]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Any], dict[str, Any] | None]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])


def layout_to_config(data: Mapping[str, Any], source: str) -> tuple[Layout, Any]:
    """Translate a ``config.json`` to its entry in `LAYOUTS` and to our configuration.

    Args:
        data: The file's keys.
        source: What an error calls the file.

    Raises:
        CheckpointError: If the class is unknown, or it says what ours cannot.
    """
    name = str(data.get("_class_name"))
    if name not in LAYOUTS:
        raise CheckpointError(
            f"{source}: unknown _class_name {short(name)}; {nearest(name, LAYOUTS)}"
        )
    layout = LAYOUTS[name]
    keys = Keys(data)
    fields, ours = layout.read(keys), keys.section(EXTRA)
    keys.check_rest(layout.neutral)
    if keys.problems:
        raise CheckpointError(f"{source}: this {name} cannot be read: {'; '.join(keys.problems)}")
    try:
        return layout, layout.config.from_dict(fields | ours, source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def config_to_layout(config: Config) -> dict[str, Any]:
    """Translate our configuration to the keys of a ``config.json``, ``_class_name`` first.

    The first class that can express it is named; those of diffusers stand before ours.
    """
    for name, layout in LAYOUTS.items():
        if layout.config is type(config) and (keys := layout.write(config)) is not None:
            return {"_class_name": name, **keys}
    raise AssertionError(f"no layout holds a {type(config).__name__}")


def _read_autoencoder(keys: Keys) -> dict[str, Any]:
    kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    attention = levels(keys, "down_block_types", ["DownEncoderBlock2D"], kinds)
    kinds = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
    if attention != levels(keys, "up_block_types", ["UpDecoderBlock2D"], kinds, up=True):
        keys.problems.append("up_block_types do not mirror down_block_types")
    return {
        "in_channels": keys.take("in_channels", 3),
        "out_channels": keys.take("out_channels", 3),
        "block_out_channels": keys.counts("block_out_channels", [64]),
        "layers_per_block": keys.take("layers_per_block", 1),
        "attention_levels": attention if any(attention) else None,
        "mid_attention": keys.take("mid_block_add_attention", True),
        "norm_num_groups": keys.take("norm_num_groups", 32),
    }


def _read_kl(keys: Keys) -> dict[str, Any]:
    return _read_autoencoder(keys) | {"latent_channels": keys.take("latent_channels", 4)}


def _read_vq(keys: Keys) -> dict[str, Any]:
    return _read_autoencoder(keys) | {
        "latent_channels": keys.take("latent_channels", 3),
        "codebook_size": keys.take("num_vq_embeddings", 256),
        "embedding_dim": keys.take("vq_embed_dim", None),
    }


def _write_autoencoder(config: AutoencoderKLConfig | VQModelConfig) -> dict[str, Any]:
    attention = [config.attends(level) for level in range(len(config.block_out_channels))]
    ours = {
        name: value
        for name in ("dropout", "commitment_weight")
        if (value := getattr(config, name, None)) is not None
        and value != type(config).model_fields[name].default
    }
    keys: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": [
            "AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in attention
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in attention[::-1]
        ],
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_num_groups,
    }
    return keys | ({EXTRA: ours} if ours else {})


def _write_vq(config: VQModelConfig) -> dict[str, Any]:
    return _write_autoencoder(config) | {
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.embedding_dim,
    }


def _read_ours(keys: Keys) -> dict[str, Any]:
    unread = PASSED - {"sample_size"}
    return {
        key: keys.take(key, None)
        for key in keys.data
        if key not in unread and not key.startswith("_")
    }


def _read_our_unet(keys: Keys) -> dict[str, Any]:
    return _read_ours(keys) | {"sample_size": read_sample_size(keys)}


_SILU = ("silu", "swish")
_UNET_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": _SILU,
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "time_embedding_type": ("positional",),
}
_AUTOENCODER_NEUTRAL: dict[str, tuple[Any, ...]] = {"act_fn": _SILU}

LAYOUTS: dict[str, Layout] = {
    "UNet2DConditionModel": Layout(
        library="diffusers",
        config=UNetConfig,
        build=UNet,
        read=read_conditional_unet,
        write=write_conditional_unet,
        neutral=_UNET_NEUTRAL
        | {
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "resnet_out_scale_factor": (1,),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "attention_type": ("default",),
            "addition_embed_type_num_heads": (64,),
        },
    ),
    "UNet2DModel": Layout(
        library="diffusers",
        config=UNetConfig,
        build=UNet,
        read=read_plain_unet,
        write=write_plain_unet,
        neutral=_UNET_NEUTRAL | {"mid_block_type": ("UNetMidBlock2D",), "add_attention": (True,)},
    ),
    "AutoencoderKL": Layout(
        library="diffusers",
        config=AutoencoderKLConfig,
        build=AutoencoderKL,
        read=_read_kl,
        write=_write_autoencoder,
        neutral=_AUTOENCODER_NEUTRAL | {"use_quant_conv": (True,), "use_post_quant_conv": (True,)},
    ),
    "VQModel": Layout(
        library="diffusers",
        config=VQModelConfig,
        build=VQModel,
        read=_read_vq,
        write=_write_vq,
        neutral=_AUTOENCODER_NEUTRAL | {"norm_type": ("group",)},
    ),
    "UNet": Layout(
        library="mezzotint",
        config=UNetConfig,
        build=UNet,
        read=_read_our_unet,
        write=UNetConfig.to_dict,
    ),
    "IdentityFirstStage": Layout(
        library="mezzotint",
        config=IdentityFirstStageConfig,
        build=IdentityFirstStage,
        read=_read_ours,
        write=IdentityFirstStageConfig.to_dict,
    ),
}
