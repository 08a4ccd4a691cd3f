"""Whole models in the folders of diffusers: a ``model_index.json`` and a sub-folder per component.

A pipeline's class is looked up in a closed table, and never imported. It says which components
there are, what conditions the network, and what its own software does that the files do not say.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints.first_stages import load_first_stage, save_first_stage
from mezzotint.checkpoints.folder import (
    CONFIG,
    STEM,
    read_component_config,
    read_json,
    save_component,
    weight_files,
    write_json,
)
from mezzotint.checkpoints.layouts import LAYOUTS, config_to_layout
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults
from mezzotint.checkpoints.model import (
    check_width,
    load_unet,
    read_defaults,
    require_range,
    sample_size,
    save_model,
)
from mezzotint.checkpoints.pipeline_table import (
    PIPELINES,
    SAMPLING,
    PipelineLayout,
    class_of,
    find_pipeline,
    unused_components,
)
from mezzotint.checkpoints.registry import INDEX, SINGLE_FILES
from mezzotint.checkpoints.schedulers import FILE, read_scheduler, write_scheduler
from mezzotint.checkpoints.text_encoders import (
    clip_name,
    encoder_files,
    encoder_weights,
    read_bert,
    read_clip,
    write_bert,
    write_clip,
)
from mezzotint.checkpoints.tokenizer_files import tokenizer_files
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
)
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.tensors import open_tensors

__all__ = [
    "channels_beside",
    "default_scale",
    "load_pipeline",
    "save_pipeline",
    "trained_size",
]


_TOKENIZERS = {"text_encoder": "CLIPTokenizer", "bert": "BertTokenizer"}
_VERSION = "0.35.0"  # of the layout that is written
_FIRST_SIZE = 64  # of Stable Diffusion's latents
# what LDMTextToImagePipeline takes for granted
_BERT_LENGTH, _BERT_FACTOR = 77, 8
_NOT_SAVED = ("safety_checker", "feature_extractor", "image_encoder")


def load_pipeline(folder: Path, *, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    """Read a pipeline as diffusers stores it.

    Args:
        folder: Holds ``model_index.json``.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.

    Returns:
        The model, and what its scheduler says of sampling.

    Raises:
        CheckpointError: If the pipeline or a component is of an unknown class, or a part is
            missing, damaged, or does not fit the others.
        MissingExtraError: If it reads CLIP's text, and ``transformers`` is not installed.
    """
    index = read_json(folder / INDEX)
    layout = find_pipeline(index, folder)
    scheduler_class = class_of(index, "scheduler", folder)
    class_of(index, layout.first_stage, folder, [*LAYOUTS])
    class_of(index, "unet", folder, [*LAYOUTS])
    scheduler = read_scheduler(
        folder / "scheduler" / FILE, scheduler_class, standard=layout.standard
    )
    first_stage, normalization, notes = _read_first_stage(folder, layout, dtype)
    unet = load_unet(folder / "unet", dtype)
    conditioner = _read_conditioner(folder, index, layout, unet, first_stage, dtype)
    try:
        model = LatentDiffusion(
            first_stage,
            unet,
            conditioner,
            scheduler.schedule,
            normalization,
            trained_size(folder, layout, first_stage.factor),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    sampler = scheduler.defaults.sampler or layout.sampler
    told = read_defaults(index, folder / INDEX, SAMPLING)
    scale, steps = told.guidance_scale or layout.guidance_scale, told.steps or layout.steps
    return LoadedModel(
        model=model.eval(),
        defaults=replace(scheduler.defaults, sampler=sampler, guidance_scale=scale, steps=steps),
        files=_files(folder, layout),
        notes=(*scheduler.notes, *notes, *_not_used(index, layout)),
        left_out=_left_out(folder, layout),
    )


def _not_used(index: Mapping[str, Any], layout: PipelineLayout) -> Iterator[str]:
    if others := unused_components(index, layout):
        yield f"{', '.join(others)}: named in {INDEX}, but not used by Mezzotint"


def _left_out(folder: Path, layout: PipelineLayout) -> tuple[str, ...]:
    """Tensors of text encoders that no picture depends on, and files of weights not read."""
    told: list[str] = []
    if layout.condition == "clip" and layout.encoder is not None:
        stored = open_tensors(encoder_weights(folder / layout.encoder))
        told += [f"{layout.encoder}/{name}" for name in stored if clip_name(name) is None]
    read = {path.resolve() for path in _files(folder, layout)}
    held = sorted(path for path in folder.glob("*/*") if path.suffix in SINGLE_FILES)
    told += [path.relative_to(folder).as_posix() for path in held if path.resolve() not in read]
    return tuple(told)


def _read_first_stage(
    folder: Path, layout: PipelineLayout, dtype: torch.dtype | None
) -> tuple[FirstStage, LatentNormalization, list[str]]:
    path = folder / layout.first_stage
    config = read_component_config(path)
    told, notes = config.get("scaling_factor"), list[str]()
    quantised = config.get("_class_name") == "VQModel"
    if told is None and quantised and layout.condition is None:
        notes.append(
            f"{layout.first_stage}: says no scaling_factor; taken for 1, as the original model's"
            " is (diffusers takes 0.18215)"
        )
    scale = default_scale(quantised=quantised)
    first_stage, normalization = load_first_stage(path, dtype, scale_factor=scale)
    if layout.condition == "low_res":
        # this pipeline decodes latents as they are
        normalization = LatentNormalization.from_scale_factor(1.0)
    return first_stage, normalization, notes


def default_scale(*, quantised: bool) -> float:
    """Return the scale of latents that a pipeline takes where its folder says none.

    It is that of the class: older configurations have no key for it.
    """
    return 1.0 if quantised else 0.18215


def _read_conditioner(
    folder: Path,
    index: Mapping[str, Any],
    layout: PipelineLayout,
    unet: UNet,
    first_stage: FirstStage,
    dtype: torch.dtype | None,
) -> Conditioner:
    channels = first_stage.latent_channels
    beside = channels_beside(folder, layout, unet.config, channels)
    if layout.condition == "low_res":
        return LowResConditioner(LowResConditionerConfig(channels=beside))
    if layout.encoder is None:
        return Unconditional()
    class_of(index, layout.encoder, folder, layout.encoder_classes)
    class_of(index, "tokenizer", folder)
    read = read_clip if layout.condition == "clip" else read_bert
    conditioner = read(folder / layout.encoder, folder / "tokenizer", dtype)
    clip = isinstance(conditioner, ClipConditioner)
    width = conditioner.config.hidden_size if clip else conditioner.config.width
    check_width(folder, unet.config, width)
    if beside == 0:
        return conditioner
    spatial = InpaintingConditioner(InpaintingConditionerConfig(latent_channels=channels))
    return HybridConditioner(conditioner, spatial)


def channels_beside(folder: Path, layout: PipelineLayout, unet: UNetConfig, latents: int) -> int:
    """Return how many channels a UNet takes beside the latents.

    Args:
        folder: Of the pipeline.
        layout: What it is.
        unet: What its UNet is.
        latents: Channels of its latents.

    Raises:
        CheckpointError: If nothing is known that would fill them.
    """
    beside = unet.in_channels - latents
    expected = {"low_res": (latents,), "clip": (0, latents + 1)}.get(layout.condition or "", (0,))
    if beside not in expected:
        choices = " or ".join(str(latents + more) for more in expected)
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: in_channels is {unet.in_channels}; expected"
            f" {choices}, as latents have {latents}"
        )
    return beside


def trained_size(folder: Path, layout: PipelineLayout, factor: int) -> tuple[int, int]:
    """Return height and width in pixels that a pipeline's UNet was trained at.

    Args:
        folder: Of the pipeline.
        layout: What it is.
        factor: f of its first stage.

    Raises:
        CheckpointError: If it does not say.
    """
    path = folder / "unet"
    config = read_component_config(path)
    match config.get("sample_size"):
        case int(side):
            if layout.standard and side < _FIRST_SIZE and _is_early(config):
                side = _FIRST_SIZE
            return side * factor, side * factor
        case [int(height), int(width)]:
            return height * factor, width * factor
        case other:
            raise CheckpointError(
                f"{path / CONFIG}: sample_size is {other!r}; expected the side of the latents that"
                " the UNet was trained at"
            )


def _is_early(config: Mapping[str, Any]) -> bool:
    """Whether the folder is from before 0.9, when Stable Diffusion's size stood there wrongly."""
    version = str(config.get("_diffusers_version", "1.0")).split(".")
    return version[0] == "0" and len(version) > 1 and version[1].isdigit() and int(version[1]) < 9


def _files(folder: Path, layout: PipelineLayout) -> tuple[Path, ...]:
    """All that was read."""
    files = [folder / INDEX, folder / "scheduler" / FILE]
    for name in (layout.first_stage, "unet"):
        files += [folder / name / CONFIG, *weight_files(folder / name, STEM)]
    if layout.encoder is not None:
        files += [*encoder_files(folder / layout.encoder), *tokenizer_files(folder / "tokenizer")]
    return tuple(files)


def save_pipeline(
    model: LatentDiffusion,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
) -> list[str]:
    """Write a model as the pipeline of diffusers that draws with it.

    A model that diffusers has no pipeline for becomes a folder of Mezzotint's own.

    Args:
        model: What to write.
        folder: Made if need be.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
        defaults: How it is sampled where a request does not say.

    Returns:
        Sentences on what the layout cannot hold.

    Raises:
        CheckpointError: If it cannot be written, or ``dtype`` cannot hold a weight.
    """
    require_range(model, dtype)
    name = _pipeline_of(model.conditioner, model.unet)
    reason = "there is no pipeline for its condition" if name is None else _misfit(model, name)
    if name is None or reason is not None:
        save_model(model, folder, dtype=dtype, defaults=defaults)
        return [f"written as Mezzotint's own folder, which diffusers cannot draw with: {reason}"]
    layout = PIPELINES[name]
    scheduler, lost = write_scheduler(
        model.schedule_config, defaults, standard=layout.standard, scaled=layout.scaled
    )
    sampling = layout.unlike(defaults or SamplingDefaults())
    lost += [f"{name} {value}: only Mezzotint reads it" for name, value in sampling.items()]
    write_json(folder / "scheduler" / FILE, scheduler)
    save_first_stage(model.first_stage, model.normalization, folder / layout.first_stage, dtype)
    height, width = sample_size(model)
    size = {"sample_size": height if height == width else [height, width]}
    save_component(model.unet, folder / "unet", size, dtype)
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", config_to_layout(model.unet.config)["_class_name"]],
        layout.first_stage: ["diffusers", type(model.first_stage).__name__],
    }
    if layout.encoder is not None:
        lost += _write_encoder(model.conditioner, folder, layout.encoder, dtype)
        index[layout.encoder] = [layout.encoder_library, layout.encoder_classes[0]]
        index["tokenizer"] = ["transformers", _TOKENIZERS[layout.encoder]]
    if layout.condition == "clip":
        index |= {part: [None, None] for part in _NOT_SAVED} | {"requires_safety_checker": False}
    write_json(folder / INDEX, index | ({SAMPLING: sampling} if sampling else {}))
    return lost


def _write_encoder(
    conditioner: Conditioner, folder: Path, name: str, dtype: torch.dtype | None
) -> list[str]:
    if isinstance(conditioner, HybridConditioner):
        conditioner = conditioner.main
    if isinstance(conditioner, BertTextConditioner):
        write_bert(conditioner, folder / name, folder / "tokenizer", dtype)
        return []
    assert isinstance(conditioner, ClipConditioner), type(conditioner)
    return write_clip(conditioner, folder / name, folder / "tokenizer", dtype)


def _pipeline_of(conditioner: Conditioner, unet: UNet) -> str | None:
    """The pipeline for a condition."""
    match conditioner:
        case ClipConditioner() if unet.config.guidance_embed_dim is not None:
            return "LatentConsistencyModelPipeline"
        case ClipConditioner():
            return "StableDiffusionPipeline"
        case HybridConditioner(main=ClipConditioner(), spatial=InpaintingConditioner() as spatial):
            channels = spatial.config.latent_channels
            stable = InpaintingConditionerConfig(latent_channels=channels)
            return "StableDiffusionInpaintPipeline" if spatial.config == stable else None
        case BertTextConditioner():
            return "LDMTextToImagePipeline"
        case LowResConditioner():
            return "LDMSuperResolutionPipeline"
        case Unconditional():
            return "LDMPipeline"
        case _:
            return None


def _misfit(model: LatentDiffusion, name: str) -> str | None:
    """Why a pipeline cannot draw with a model though it is made for its condition."""
    layout, unet, first_stage = PIPELINES[name], model.unet.config, model.first_stage
    height, width = model.image_size
    needed = "UNet2DModel" if layout.encoder is None else "UNet2DConditionModel"
    stages = (AutoencoderKL,) if layout.first_stage == "vae" else (AutoencoderKL, VQModel)
    if isinstance(model.schedule_config, FlowScheduleConfig):
        return f"{name} scales the network's input by its scheduler, which that of a flow cannot"
    if config_to_layout(unet)["_class_name"] != needed:
        return f"{name} wants a UNet that {needed} can be"
    if unet.num_class_embeds is not None or unet.vector_dim is not None:
        return f"{name} tells the UNet no class and no vector"
    if unet.guidance_embed_dim is not None and layout.condition != "clip":
        return f"{name} tells the UNet no scale of guidance"
    if not isinstance(first_stage, stages):
        return f"{name} has no place for an {type(first_stage).__name__}"
    if height != width and name != "StableDiffusionPipeline":
        return f"{name} draws squares, not {width}x{height}"
    match model.conditioner:
        case BertTextConditioner(config=config) if config.max_length != _BERT_LENGTH:
            return f"{name} reads {_BERT_LENGTH} tokens, not {config.max_length}"
        case BertTextConditioner() if first_stage.factor != _BERT_FACTOR:
            return f"{name} draws latents of f = {_BERT_FACTOR}, not {first_stage.factor}"
        case LowResConditioner() if unet.in_channels != 2 * first_stage.latent_channels:
            return f"{name} wants as many channels of the small picture as of latents"
        case LowResConditioner() if model.normalization.is_scalar and not _is_unscaled(model):
            return f"{name} does not scale latents, by {model.normalization.scale_factor:.5g}"
        case _:
            return None


def _is_unscaled(model: LatentDiffusion) -> bool:
    return bool((model.normalization.std == 1.0).all())
