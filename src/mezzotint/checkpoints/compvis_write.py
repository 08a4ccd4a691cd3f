"""A model as a YAML file of the original code, and what it leaves over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mezzotint.checkpoints.compvis import TensorMap, first_stage_map, unet_map
from mezzotint.checkpoints.compvis_config import (
    BETA_SCHEDULES,
    OWN,
    PARAMETERIZATIONS,
    parse_compvis_config,
)
from mezzotint.checkpoints.compvis_text import ConditionerKind, conditioner_map
from mezzotint.checkpoints.families import FAMILIES, Family, family_of_parts
from mezzotint.checkpoints.sketch import PREFIXES, differences, note_size, sketch, split
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    LowResConditioner,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.config import Config
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.autoencoder import IdentityFirstStage, VQModelConfig
from mezzotint.models.encoder_decoder import ConvolutionalConfig
from mezzotint.models.unet import UNetConfig

__all__ = ["Described", "PartToWrite", "describe"]

_ENCODERS = "ldm.modules.encoders.modules"
# of no consequence for what is drawn, or for this program alone
_QUIET = {"sample_size", "projection_dim", "commitment_weight", "dropout"}
# what the original data sets call the condition
_KEYS = {
    "clip": "txt",
    "open_clip": "txt",
    "bert": "caption",
    "layout": "coordinates_bbox",
    "class": "class_label",
    "semantic_map": "segmentation",
    "low_res": "LR_image",
    "inpainting": "masked_image",
    None: "image",
}
_KINDS: Mapping[type[Conditioner], ConditionerKind] = {
    BertTextConditioner: "bert",
    LayoutConditioner: "layout",
    ClassConditioner: "class",
    SemanticMapConditioner: "semantic_map",
    LowResConditioner: "low_res",
    InpaintingConditioner: "inpainting",
}
_SPATIAL = (SemanticMapConditioner, LowResConditioner, InpaintingConditioner)


@dataclass(frozen=True)
class PartToWrite:
    """A part of a model and its place in the file.

    Attributes:
        prefix: Of its tensors' names.
        module: Holds them by our names.
        map: To the names below the prefix.
    """

    prefix: str
    module: nn.Module
    map: TensorMap

    def tensors(self) -> dict[str, Tensor]:
        """Return ours, by our names."""
        return self.module.state_dict()


@dataclass(frozen=True)
class Described:
    """A model as the original layout has it.

    Attributes:
        family: What it is.
        parts: Where its tensors go.
        yaml: What the YAML file is to hold.
        own: The dotted keys of what only Mezzotint will read there.
    """

    family: Family
    parts: tuple[PartToWrite, ...]
    yaml: dict[str, Any]
    own: tuple[str, ...]


def describe(model: LatentDiffusion, scale_factor: float, path: Path) -> Described:
    """Describe a model in the original layout.

    Args:
        model: Of any published family, at any width.
        scale_factor: Of its latents.
        path: Of the YAML file, for messages.

    Raises:
        CheckpointError: If the layout has no place for its conditioner or its schedule.
    """
    if isinstance(model.schedule_config, FlowScheduleConfig):
        raise _no_place("rectified flow", path)
    if model.unet.config.coordinate_channels:
        raise _no_place("network that is told places (coordinate_channels)", path)
    main, spatial = _conditioners(model.conditioner)
    kinds = _kind(main, path), _kind(spatial, path)
    family = family_of_parts(*kinds)
    if family is None:
        raise _no_place(f"conditioner, {kinds[0]} and {kinds[1]} together", path)
    parts = [PartToWrite(PREFIXES["unet"], model.unet, unet_map(model.unet))]
    if not isinstance(model.first_stage, IdentityFirstStage):
        mapping = first_stage_map(model.first_stage)
        parts.append(PartToWrite(PREFIXES["first_stage"], model.first_stage, mapping))
    for kind, conditioner in zip(kinds, (main, spatial), strict=True):
        if kind is not None and conditioner is not None:
            mapping = conditioner_map(kind, _config(conditioner))
            if mapping.rules:
                parts.append(PartToWrite(PREFIXES["conditioner"], conditioner, mapping))
    data = {"model": _model(model, family, main, spatial, scale_factor)}
    own = _left_over(model, family, main, spatial, parts, data, path)
    told = tuple(
        f"{section}.{name}" if isinstance(fields, dict) else section
        for section, fields in own.items()
        for name in (fields if isinstance(fields, dict) else [""])
        if name not in _QUIET
    )
    return Described(family, tuple(parts), data | ({OWN: own} if own else {}), told)


def _conditioners(conditioner: Conditioner) -> tuple[Conditioner | None, Conditioner | None]:
    """What is attended to, and what is concatenated."""
    match conditioner:
        case HybridConditioner():
            return conditioner.main, conditioner.spatial
        case Unconditional():
            return None, None
        case _ if isinstance(conditioner, _SPATIAL):
            return None, conditioner
        case _:
            return conditioner, None


def _kind(conditioner: Conditioner | None, path: Path) -> ConditionerKind | None:
    if conditioner is None:
        return None
    if isinstance(conditioner, ClipConditioner):
        return "open_clip" if conditioner.config.hidden_act == "gelu" else "clip"
    if type(conditioner) not in _KINDS:
        raise _no_place(type(conditioner).__name__, path)
    return _KINDS[type(conditioner)]


def _no_place(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: the original layout has no place for this model's {what}; its families are"
        f" {', '.join(FAMILIES)}; write a folder instead"
    )


def _config(conditioner: nn.Module) -> Config:
    assert isinstance(conditioner.config, Config)
    return conditioner.config


def _left_over(
    model: LatentDiffusion,
    family: Family,
    main: Conditioner | None,
    spatial: Conditioner | None,
    parts: Sequence[PartToWrite],
    data: Mapping[str, Any],
    path: Path,
) -> dict[str, Any]:
    """What the model has otherwise than whoever reads the file without more would take it to."""
    shapes = {
        part.prefix + rule.theirs: tuple(rule.theirs_shape)
        for part in parts
        for rule in part.map.rules
    }
    parsed = parse_compvis_config(data, path)
    base = sketch(split(shapes), family, parsed)
    note_size(base)
    configs: dict[str, Config] = {
        "unet": model.unet.config,
        "first_stage": _normal(model.first_stage.config),
        "schedule": model.schedule_config,
    }
    configs |= {
        name: _config(part) for name, part in (("main", main), ("spatial", spatial)) if part
    }
    own: dict[str, Any] = {
        section: found
        for section, config in configs.items()
        if (found := differences(base[section], config))
    }
    # its projection is no tensor of the original layout
    own.get("unet", {}).pop("guidance_embed_dim", None)
    if base["image_size"] != list(model.image_size):
        own["image_size"] = list(model.image_size)
    return {section: fields for section, fields in own.items() if fields}


def _normal(config: Config) -> Config:
    """The same, said in one of the ways that it may be said."""
    changes: dict[str, Any] = {}
    if isinstance(config, ConvolutionalConfig) and not any(config.attention_levels or ()):
        changes["attention_levels"] = None
    if isinstance(config, VQModelConfig) and config.embedding_dim == config.latent_channels:
        changes["embedding_dim"] = None
    return config.model_copy(update=changes)


def _model(
    model: LatentDiffusion,
    family: Family,
    main: Conditioner | None,
    spatial: Conditioner | None,
    scale_factor: float,
) -> dict[str, Any]:
    schedule, first_stage = model.schedule_config, model.first_stage.config
    assert isinstance(schedule, ScheduleConfig)
    side = max(model.image_size) // model.first_stage.factor
    params: dict[str, Any] = {
        "linear_start": schedule.beta_start,
        "linear_end": schedule.beta_end,
        "timesteps": schedule.num_train_timesteps,
        "beta_schedule": _reverse(BETA_SCHEDULES)[schedule.beta_schedule],
        "parameterization": _reverse(PARAMETERIZATIONS)[schedule.prediction_type],
        "first_stage_key": "image",
        "cond_stage_key": _KEYS[family.main or family.spatial],
        "image_size": side,
        "channels": model.first_stage.latent_channels,
        "cond_stage_trainable": False,
        "concat_mode": main is None and spatial is not None,
        "scale_factor": scale_factor,
        "use_ema": False,
    }
    if main is not None or spatial is not None:
        key = "concat" if main is None else "crossattn" if spatial is None else "hybrid"
        params["conditioning_key"] = key
    kind = "LatentInpaintDiffusion" if main and spatial else "LatentDiffusion"
    params["unet_config"] = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"image_size": side, **_unet(model.unet.config)},
    }
    params["first_stage_config"] = _first_stage(first_stage, max(model.image_size))
    params["cond_stage_config"] = _condition(main or spatial)
    return {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}


def _reverse(table: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}


def _multiples(widths: Sequence[int]) -> list[int | float]:
    base = widths[0]
    return [width / base if width % base else width // base for width in widths]


def _unet(config: UNetConfig) -> dict[str, Any]:
    levels = [2**level for level, on in enumerate(config.attention_levels) if on]
    params: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.block_out_channels[0],
        "attention_resolutions": levels[::-1],
        "num_res_blocks": config.layers_per_block,
        "channel_mult": _multiples(config.block_out_channels),
    }
    if config.attention_head_dim is not None:
        params["num_head_channels"] = config.attention_head_dim
    else:
        params["num_heads"] = config.num_attention_heads
    if config.resnet_time_scale_shift == "scale_shift":
        params["use_scale_shift_norm"] = True
    if config.resblock_updown:
        params["resblock_updown"] = True
    if config.num_class_embeds is not None:
        params["num_classes"] = config.num_class_embeds
    elif config.vector_dim is not None:
        params |= {"num_classes": "sequential", "adm_in_channels": config.vector_dim}
    if config.cross_attention_dim is None:
        return params
    if config.use_linear_projection:
        params["use_linear_in_transformer"] = True
    return params | {
        "use_spatial_transformer": True,
        "transformer_depth": config.transformer_layers_per_block,
        "context_dim": config.cross_attention_dim,
        "legacy": False,
    }


def _first_stage(config: Config, resolution: int) -> dict[str, Any]:
    if not isinstance(config, ConvolutionalConfig):
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    levels = range(len(config.block_out_channels))
    shape: dict[str, Any] = {
        "double_z": not isinstance(config, VQModelConfig),
        "z_channels": config.latent_channels,
        "resolution": resolution,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.block_out_channels[0],
        "ch_mult": _multiples(config.block_out_channels),
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [resolution // 2**level for level in levels if config.attends(level)],
        "dropout": config.dropout,
    }
    if not config.mid_attention:
        shape["attn_type"] = "none"
    params: dict[str, Any] = {"embed_dim": config.latent_channels}
    kind = "AutoencoderKL"
    if isinstance(config, VQModelConfig):
        kind = "VQModelInterface"
        params = {"embed_dim": config.code_channels, "n_embed": config.codebook_size}
    params |= {"ddconfig": shape, "lossconfig": {"target": "torch.nn.Identity"}}
    return {"target": f"ldm.models.autoencoder.{kind}", "params": params}


def _condition(conditioner: Conditioner | None) -> Any:
    name, params = "", dict[str, Any]()
    match conditioner:
        case None:
            return "__is_unconditional__"
        case InpaintingConditioner():
            return "__is_first_stage__"
        case LowResConditioner():
            return {"target": "torch.nn.Identity"}
        case _:
            pass
    match config := _config(conditioner):
        case ClipConditionerConfig(hidden_act="gelu"):
            # of the published encoder's 24 layers the last but one is read, and 23 are enough
            last = config.output_layer == 1 and config.num_hidden_layers != 23
            layer = "last" if last else "penultimate"
            name, params = "FrozenOpenCLIPEmbedder", {"freeze": True, "layer": layer}
        case ClipConditionerConfig():
            name = "FrozenCLIPEmbedder"
        case BertTextConditionerConfig() | LayoutConditionerConfig():
            name = "BERTEmbedder"
            params = {"n_embed": config.width, "n_layer": config.layers}
            params |= {"vocab_size": config.vocab_size, "max_seq_len": config.max_length}
            params["use_tokenizer"] = isinstance(config, BertTextConditionerConfig)
        case ClassConditionerConfig():
            rows = len(config.class_names) + 1
            name = "ClassEmbedder"
            params = {"n_classes": rows, "embed_dim": config.width, "key": "class_label"}
        case SemanticMapConditionerConfig():
            name = "SpatialRescaler"
            params = {"n_stages": config.stages, "in_channels": config.classes}
            params["out_channels"] = config.out_channels
        case _:
            raise AssertionError(f"no embedder for {type(config).__name__}")
    return {"target": f"{_ENCODERS}.{name}"} | ({"params": params} if params else {})
