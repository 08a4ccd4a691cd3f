"""What a single file is: from its YAML, from names and shapes, and from what is published.

Only headers are read. Each guess says what it rests on, and can be overruled.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from mezzotint.checkpoints.compvis import HeadOrder, TensorMap, first_stage_map, unet_map
from mezzotint.checkpoints.compvis_config import CompvisConfig
from mezzotint.checkpoints.compvis_shapes import contradictions
from mezzotint.checkpoints.compvis_text import CONFIGS, conditioner_map
from mezzotint.checkpoints.families import Family
from mezzotint.checkpoints.sketch import PREFIXES, Parts, Sketch, note_size, overlay, sketch, split
from mezzotint.checkpoints.telling import tell_family, tell_prediction, tell_size
from mezzotint.config import Config
from mezzotint.diffusion.schedule import PredictionType, ScheduleConfig
from mezzotint.errors import CheckpointError, ConfigError, short
from mezzotint.latent_diffusion import LARGEST_SCALE, LEAST_SCALE, FirstStage
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.tensors import Tensors

__all__ = ["EMA", "FirstStageConfig", "Recognised", "build_first_stage", "recognise"]

FirstStageConfig = AutoencoderKLConfig | VQModelConfig | IdentityFirstStageConfig

EMA = "model_ema."
_LONGEST = 1 << 16  # pixels of a side
_FIRST_STAGES: Mapping[str, type[Config]] = {
    "kl": AutoencoderKLConfig,
    "vq": VQModelConfig,
    "identity": IdentityFirstStageConfig,
}
# what public files hold beside weights: averages, the schedule, losses, parts of CLIP for images
_KNOWN_EXTRAS = re.compile(
    r"model_ema\.|(first|cond)_stage_model\.(loss|model_ema)\.|.*\.position_ids$"
    r"|cond_stage_model\.(model|transformer)\.(text_projection|logit_scale|attn_mask|visual)\b"
    r"|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?$"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)$"
    r"|(betas|lvlb_weights|logvar|scale_factor|v_pred|ztsnr)$"
)


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a single file was recognised as.

    Attributes:
        paths: Its files.
        family: What it is.
        family_reason: What that rests on.
        prediction: What its UNet predicts.
        prediction_reason: What that rests on.
        unet: Its configuration; None if what is known of it cannot be one.
        head_order: Of fused projections.
        first_stage: Its configuration; None if there is none.
        main: That of the condition that is attended to.
        spatial: That of the condition that is concatenated.
        schedule: Its noise schedule.
        scale_factor: Of its latents; None if it lies among the tensors.
        image_size: Height and width in pixels.
        parameters: How many numbers each of its parts has.
        has_ema: Whether averaged weights of the UNet lie beside its own.
        missing: Names of tensors that should be there.
        unexpected: Names of those that nothing is known of.
        wrong: Names of those that are not as they should be, and how.
        problems: Sentences on why it cannot be loaded.
        maps: From its names, below each part's prefix, to ours.
    """

    paths: tuple[Path, ...]
    family: Family
    family_reason: str
    prediction: PredictionType
    prediction_reason: str
    unet: UNetConfig | None
    head_order: HeadOrder
    first_stage: FirstStageConfig | None
    main: Config | None
    spatial: Config | None
    schedule: ScheduleConfig | None
    scale_factor: float | None
    image_size: tuple[int, int]
    parameters: Mapping[str, int]
    has_ema: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]
    problems: tuple[str, ...]
    maps: Mapping[str, TensorMap] = field(repr=False)

    def require_loadable(self) -> None:
        """Raise a CheckpointError that says why it cannot be loaded, unless it can."""
        if self.problems:
            raise CheckpointError(
                f"{self.paths[0]}: cannot be loaded as {self.family.name}"
                f" ({self.family_reason}): {'; '.join(self.problems)}"
            )


def recognise(
    tensors: Tensors,
    config: CompvisConfig | None,
    *,
    family: str | None = None,
    prediction: str | None = None,
) -> Recognised:
    """Say what a single file is.

    Args:
        tensors: Its tensors; they are not read.
        config: Its YAML, if there is one.
        family: A name of `mezzotint.checkpoints.families.FAMILIES`, in place of a guess.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``, in place of a guess.

    Raises:
        CheckpointError: If it is of no known family, or ``family`` or ``prediction`` is unknown.
            What is known but cannot be loaded is told by the result.
    """
    path = tensors.paths[0]
    parts = split({name: info.shape for name, info in tensors.items()})
    found, family_reason = tell_family(path, tensors, parts, config, family)
    predicted, prediction_reason = tell_prediction(tensors, found, config, prediction)
    fields = _fields(tensors, parts, found, config, predicted)
    configs, problems = _configs(fields)
    clashes = _clashes(configs, parts)
    order: HeadOrder = config.head_order if config else "legacy"
    built = {name: c for name, c in configs.items() if name not in clashes}
    maps = _maps(built, found, order, parts)
    missing, unexpected, wrong = _compare(tensors, parts, maps, found)
    problems = [*_absent(parts, found, fields), *_disagreements(configs), *problems]
    problems += [told for sentences in clashes.values() for told in sentences]
    problems += [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", [n for n in unexpected if n.startswith(tuple(PREFIXES.values()))]),
            ("wrong", wrong),
        )
        if names
    ]
    published = found.settings(fields["first_stage"]).scale_factor if config is None else None
    scale = config.scale_factor if config else published
    if scale is not None and not LEAST_SCALE <= scale <= LARGEST_SCALE:
        problems.append(
            f"scale_factor is {short(scale)}, expected {LEAST_SCALE:g} to {LARGEST_SCALE:g}"
        )
    stored = tensors.get("scale_factor")
    if stored is not None and math.prod(stored.shape) != 1:
        problems.append(f"its tensor scale_factor is {tuple(stored.shape)}, expected one number")
    if scale is None and stored is None:
        problems.append(
            "its YAML says scale_by_std, but it holds no tensor scale_factor; say the number as"
            " scale_factor in model.params of the YAML"
        )
    height, width = fields["image_size"]
    return Recognised(
        paths=tensors.paths,
        family=found,
        family_reason=family_reason,
        prediction=predicted,
        prediction_reason=prediction_reason,
        unet=cast(UNetConfig | None, configs.get("unet")),
        head_order=order,
        first_stage=cast(FirstStageConfig | None, configs.get("first_stage")),
        main=configs.get("main"),
        spatial=configs.get("spatial"),
        schedule=cast(ScheduleConfig | None, configs.get("schedule")),
        scale_factor=None if stored is not None else scale,
        image_size=(height, width),
        parameters={
            part: sum(math.prod(shape) for shape in shapes.values())
            for part, shapes in parts.items()
            if shapes
        },
        has_ema=any(name.startswith(f"{EMA}diffusion_model") for name in tensors),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        wrong=tuple(wrong),
        problems=tuple(problems),
        maps=maps,
    )


def build_first_stage(config: FirstStageConfig) -> FirstStage:
    """Build the module of a first stage's configuration."""
    match config:
        case AutoencoderKLConfig():
            return AutoencoderKL(config)
        case VQModelConfig():
            return VQModel(config)
        case IdentityFirstStageConfig():
            return IdentityFirstStage(config)


def _fields(
    tensors: Tensors,
    parts: Parts,
    family: Family,
    config: CompvisConfig | None,
    prediction: PredictionType,
) -> Sketch:
    try:
        fields = sketch(parts, family, config)
    except CheckpointError as error:
        raise CheckpointError(f"{tensors.paths[0]}: {error}") from None
    if config is None:
        fields["image_size"] = tell_size(tensors, family, prediction) or fields["image_size"]
    note_size(fields)
    schedule = {**fields["schedule"], "prediction_type": prediction}
    if "ztsnr" in tensors:
        schedule["zero_terminal_snr"] = True
    fields["schedule"] = schedule
    source = f"{tensors.paths[0]}: by its metadata, image_size"
    if config is not None:
        source = f"{config.path}: image_size"
        fields = _overlaid(fields, config)
        # what the user says comes before what stands in any file
        fields["schedule"]["prediction_type"] = prediction
    if prediction == "epsilon":
        fields["schedule"].pop("zero_terminal_snr", None)
    match fields["image_size"]:
        case [int(height), int(width)] if 0 < min(height, width) <= max(height, width) <= _LONGEST:
            return fields
        case size:
            raise CheckpointError(
                f"{source} is {short(size)}, expected height and width, each 1 to {_LONGEST:,}"
            )


def _overlaid(fields: Sketch, config: CompvisConfig) -> Sketch:
    """A sketch with what Mezzotint wrote over it, which tells no part to be of another kind."""
    source = f"{config.path}: mezzotint"
    found = overlay(fields, config.own, source)
    for section in ("first_stage", "main", "spatial"):
        kind, told = ((side[section] or {}).get("kind") for side in (fields, found))
        if told != kind:
            raise CheckpointError(
                f"{source}.{section}.kind is {short(told)}, expected {kind!r}, as the model is of"
            )
    return found


def _configs(fields: Sketch) -> tuple[dict[str, Config], list[str]]:
    """The configurations by section, and what is wrong with those that cannot be."""
    kinds: dict[str, type[Config] | None] = {"unet": UNetConfig, "schedule": ScheduleConfig}
    kinds["first_stage"] = _FIRST_STAGES.get(fields["first_stage"].get("kind", ""))
    for section in ("main", "spatial"):
        if fields[section] is not None:
            kinds[section] = CONFIGS[fields[section]["kind"]]
    configs: dict[str, Config] = {}
    problems: list[str] = []
    for section, kind in kinds.items():
        if kind is None:
            continue
        try:
            configs[section] = kind.from_dict(fields[section], section)
        except ConfigError as error:
            problems.append(" ".join(str(error).split()))
    return configs, problems


def _maps(
    configs: Mapping[str, Config], family: Family, order: HeadOrder, parts: Parts
) -> dict[str, TensorMap]:
    maps: dict[str, TensorMap] = {}
    with torch.device("meta"):
        if isinstance(unet := configs.get("unet"), UNetConfig):
            maps["unet"] = unet_map(UNet(unet), order)
        if isinstance(stage := configs.get("first_stage"), FirstStageConfig):
            module = build_first_stage(stage)
            if not isinstance(module, IdentityFirstStage):
                maps["first_stage"] = first_stage_map(module)
    shapes = parts["conditioner"]
    if main := configs.get("main"):
        assert family.main is not None
        maps["conditioner"] = conditioner_map(family.main, main, shapes)
    elif spatial := configs.get("spatial"):
        assert family.spatial is not None
        maps["conditioner"] = conditioner_map(family.spatial, spatial, shapes)
    return maps


def _absent(parts: Parts, family: Family, fields: Sketch) -> Iterator[str]:
    """Sentences on parts of which there is no tensor."""
    if not parts["first_stage"] and fields["first_stage"].get("kind") != "identity":
        yield "it has no first stage (first_stage_model.…), so that nothing can be decoded"
    if not parts["conditioner"] and (family.main or family.spatial == "semantic_map"):
        yield "it has no conditioner (cond_stage_model.…), so that it cannot be told anything"


def _clashes(configs: Mapping[str, Config], parts: Parts) -> dict[str, list[str]]:
    """By section, sentences on configurations that are not of the size of the tensors."""
    found: dict[str, list[str]] = {}
    for section in ("unet", "first_stage"):
        config = configs.get(section)
        if config is None or not parts[section] or isinstance(config, IdentityFirstStageConfig):
            continue
        if sentences := contradictions(section, config, parts[section]):
            found[section] = sentences
    return found


def _disagreements(configs: Mapping[str, Config]) -> Iterator[str]:
    """Sentences on parts that do not go together, as where a wrong family was asked for."""
    unet, stage = configs.get("unet"), configs.get("first_stage")
    if not isinstance(unet, UNetConfig) or not isinstance(stage, FirstStageConfig):
        return
    match stage:
        case VQModelConfig():
            latents = stage.code_channels
        case AutoencoderKLConfig():
            latents = stage.latent_channels
        case IdentityFirstStageConfig():
            latents = stage.in_channels
    told = {"low_res": "channels", "semantic_map": "out_channels"}
    spatial = configs.get("spatial")
    kind = str(getattr(spatial, "kind", ""))
    extra = latents + 1 if kind == "inpainting" else getattr(spatial, told.get(kind, ""), 0)
    if unet.in_channels != latents + extra:
        yield f"its UNet takes {unet.in_channels} channels where {latents + extra} were expected"
    if (unet.cross_attention_dim is None) != ("main" not in configs):
        does = "attends to no tokens" if unet.cross_attention_dim is None else "attends to tokens"
        yield f"its UNet {does}, which this family does not go with"
    if unet.vector_dim is not None or unet.num_class_embeds is not None:
        yield "its UNet wants a vector or a class beside, which no known family has"


def _compare(
    tensors: Tensors, parts: Parts, maps: Mapping[str, TensorMap], family: Family
) -> tuple[list[str], list[str], list[str]]:
    """Names of what is missing and what is unexpected, and what is otherwise than it should be."""
    missing: list[str] = []
    wrong: list[str] = []
    expected: set[str] = set()
    for part, mapping in maps.items():
        for rule in mapping.rules:
            name = PREFIXES[part] + rule.theirs
            expected.add(name)
            if name not in tensors:
                missing += [name] if parts[part] else []
                continue
            info = tensors[name]
            if info.shape != tuple(rule.theirs_shape):
                wrong.append(f"{name} {info.shape} where {tuple(rule.theirs_shape)} was expected")
            elif not info.dtype.is_floating_point:
                wrong.append(f"{name} of {info.dtype}")
    known = tuple(PREFIXES[part] for part in parts if part not in maps and parts[part])
    if family.main is None and family.spatial == "inpainting":
        # the original code has its first stage as the conditioner too, and saves it twice
        known = (*known, PREFIXES["conditioner"])
    unexpected = [
        name
        for name in tensors
        if name not in expected and not _KNOWN_EXTRAS.match(name) and not name.startswith(known)
    ]
    return missing, unexpected, wrong


def _some(names: list[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"({len(names)}): {', '.join(names[:shown])}{rest}"
