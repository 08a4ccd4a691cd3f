"""The configurations of published UNets, translated to ours and back."""

from collections.abc import Sequence
from typing import Any, cast

from mezzotint.checkpoints.keys import Keys, levels
from mezzotint.models.unet import UNetConfig

__all__ = [
    "read_conditional_unet",
    "read_plain_unet",
    "read_sample_size",
    "write_conditional_unet",
    "write_plain_unet",
]

_LONGEST = 1 << 16  # of the sides that a UNet may have been trained on


def read_sample_size(keys: Keys) -> int | None:
    """Return a side; height and width, if they differ, are only noted in the file."""
    size = keys.take("sample_size", None)
    sides = cast(list[Any], size) if isinstance(size, list) else [size, size]
    if size is None:
        return None
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= _LONGEST for side in sides):
        keys.problem("sample_size", size, f"a side of latents or two, each 1 to {_LONGEST:,}")
        return None
    return sides[0] if sides[0] == sides[1] else None


def _read_unet_common(keys: Keys) -> dict[str, Any]:
    return {
        "sample_size": read_sample_size(keys),
        "layers_per_block": keys.one("layers_per_block", 2),
        "downsample_padding": keys.take("downsample_padding", 1),
        "dropout": keys.take("dropout", 0.0),
        "norm_num_groups": keys.take("norm_num_groups", 32),
        "norm_eps": keys.take("norm_eps", 1e-5),
        "flip_sin_to_cos": keys.take("flip_sin_to_cos", True),
        "freq_shift": keys.take("freq_shift", 0),
        "resnet_time_scale_shift": keys.take("resnet_time_scale_shift", "default"),
        "num_class_embeds": keys.take("num_class_embeds", None),
    }


def _write_unet_common(config: UNetConfig) -> dict[str, Any]:
    names = (
        "sample_size in_channels out_channels block_out_channels layers_per_block"
        " downsample_padding dropout norm_num_groups norm_eps flip_sin_to_cos freq_shift"
        " resnet_time_scale_shift num_class_embeds"
    )
    plain = config.to_dict()
    return {name: plain[name] for name in names.split()}


def _attended_widths(widths: Sequence[int], attention: Sequence[bool]) -> list[int]:
    """Indices of the levels whose number of heads matters: the middle is at the last."""
    return [i for i, on in enumerate(attention) if on or i == len(widths) - 1]


def read_conditional_unet(keys: Keys) -> dict[str, Any]:
    """Translate a ``UNet2DConditionModel`` to the fields of `UNetConfig`."""
    fields = _read_unet_common(keys)
    down_default = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up_default = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    attention = levels(keys, "down_block_types", down_default, kinds)
    kinds = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
    if attention != levels(keys, "up_block_types", up_default, kinds, up=True):
        keys.problems.append("up_block_types do not mirror down_block_types")
    widths = keys.counts("block_out_channels", [320, 640, 1280, 1280])
    fields |= {
        "in_channels": keys.take("in_channels", 4),
        "out_channels": keys.take("out_channels", 4),
        "block_out_channels": widths,
        "attention_levels": attention,
        "cross_attention_dim": keys.one("cross_attention_dim", 1280),
        "transformer_layers_per_block": keys.one("transformer_layers_per_block", 1),
        "use_linear_projection": keys.take("use_linear_projection", False),
        "guidance_embed_dim": keys.take("time_cond_proj_dim", None),
    }
    if keys.one("only_cross_attention", False):
        keys.problem("only_cross_attention", True, "False (Mezzotint has no such option)")
    vector_dim = keys.take("projection_class_embeddings_input_dim", None)
    match keys.take("class_embed_type", None):
        case None:
            pass  # diffusers reads the width for its projection alone
        case "projection":
            fields["vector_dim"] = vector_dim
        case kind:
            keys.problem("class_embed_type", kind, "None or 'projection'")
    return fields | _read_heads(keys, widths, attention)


def _read_heads(keys: Keys, widths: list[int], attention: list[bool]) -> dict[str, Any]:
    """Read ``attention_head_dim``, which holds the *number* of heads in this class."""
    if not isinstance(keys.data.get("attention_head_dim"), list):
        heads = keys.take("attention_head_dim", 8)
        return {"num_attention_heads": heads, "attention_head_dim": None}
    heads = keys.counts("attention_head_dim", [8] * len(widths))
    if len(attention) != len(widths):
        return {}  # the configuration says so itself
    if len(heads) != len(widths):
        keys.problem("attention_head_dim", heads, "one number for each of block_out_channels")
        return {}
    used = _attended_widths(widths, attention)
    sizes = {widths[i] // heads[i] for i in used}
    if len(sizes) == 1:
        return {"num_attention_heads": None, "attention_head_dim": sizes.pop()}
    if len({heads[i] for i in used}) != 1:
        keys.problem("attention_head_dim", heads, "equal heads, or heads of equal width")
    return {"num_attention_heads": heads[used[0]], "attention_head_dim": None}


def write_conditional_unet(config: UNetConfig) -> dict[str, Any] | None:
    """Translate to ``UNet2DConditionModel``, or return None if it cannot express this UNet."""
    if config.cross_attention_dim is None or config.resblock_updown or config.coordinate_channels:
        return None
    heads: int | list[int] | None = config.num_attention_heads
    if config.attention_head_dim is not None:
        heads = [max(w // config.attention_head_dim, 1) for w in config.block_out_channels]
    down = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in config.attention_levels[::-1]]
    keys = _write_unet_common(config) | {
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": config.cross_attention_dim,
        "attention_head_dim": heads,
        "transformer_layers_per_block": config.transformer_layers_per_block,
        "use_linear_projection": config.use_linear_projection,
        "time_cond_proj_dim": config.guidance_embed_dim,
    }
    if config.vector_dim is not None:
        keys |= {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    return keys


# attention, and how the block changes resolution: None leaves it to downsample_type
_PLAIN_DOWN = {
    "AttnDownBlock2D": (True, None),
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_PLAIN_UP = {
    "AttnUpBlock2D": (True, None),
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


def read_plain_unet(keys: Keys) -> dict[str, Any]:
    """Translate a ``UNet2DModel`` to the fields of `UNetConfig`."""
    fields = _read_unet_common(keys)
    down_default = ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    up_default = ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]
    down = levels(keys, "down_block_types", down_default, _PLAIN_DOWN)
    up = levels(keys, "up_block_types", up_default, _PLAIN_UP, up=True)
    if keys.problems:
        return {}
    attention = [on for on, _ in down]
    if attention != [on for on, _ in up]:
        keys.problems.append("up_block_types do not mirror down_block_types")
    down_type = keys.take("downsample_type", "conv")
    up_type = keys.take("upsample_type", "conv")
    # the coarsest level does not halve, the finest does not double
    resampling = {kind or down_type for _, kind in down[:-1]}
    resampling |= {kind or up_type for _, kind in up[1:]}
    if not resampling <= {"conv", "resnet"} or len(resampling) > 1:
        found = ", ".join(sorted(str(r)[:80] for r in resampling))
        keys.problems.append(f"resolution changes by {found}, expected all conv or all resnet")
    head_dim = keys.take("attention_head_dim", 8)
    return fields | {
        "in_channels": keys.take("in_channels", 3),
        "out_channels": keys.take("out_channels", 3),
        "block_out_channels": keys.counts("block_out_channels", [224, 448, 672, 896]),
        "attention_levels": attention,
        "resblock_updown": resampling == {"resnet"},
        "cross_attention_dim": None,
        # without a width there is one head, as wide as the level
        "attention_head_dim": head_dim,
        "num_attention_heads": 1 if head_dim is None else None,
    }


def write_plain_unet(config: UNetConfig) -> dict[str, Any] | None:
    """Translate to ``UNet2DModel``, or return None if it cannot express this UNet."""
    if config.cross_attention_dim is not None:
        return None
    if config.vector_dim is not None or config.guidance_embed_dim is not None:
        return None
    if config.coordinate_channels:
        return None
    head_dim = config.attention_head_dim
    if config.num_attention_heads not in (None, 1):
        levels = _attended_widths(config.block_out_channels, config.attention_levels)
        widths = {config.block_out_channels[i] for i in levels}
        if len(widths) > 1:
            return None  # heads of unequal width
        head_dim = widths.pop() // config.num_attention_heads
    kind = "resnet" if config.resblock_updown else "conv"
    down = {on: name for name, (on, how) in _PLAIN_DOWN.items() if how in (None, kind)}
    up = {on: name for name, (on, how) in _PLAIN_UP.items() if how in (None, kind)}
    return _write_unet_common(config) | {
        "down_block_types": [down[on] for on in config.attention_levels],
        "up_block_types": [up[on] for on in config.attention_levels[::-1]],
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": head_dim,
    }
