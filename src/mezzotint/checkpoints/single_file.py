"""Single files of the original layout: a whole model in one file, and a YAML file beside it.

Formats: CompVis/stable-diffusion and CompVis/latent-diffusion, as ``.safetensors`` or as ``.ckpt``
of PyTorch Lightning, where averaged weights may lie beside the UNet's own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor, nn

from mezzotint.checkpoints.averages import average_of, takes_averages, with_averages_alone
from mezzotint.checkpoints.compvis import Rule, TensorMap
from mezzotint.checkpoints.compvis_config import CompvisConfig, read_compvis_config
from mezzotint.checkpoints.compvis_write import Described, describe
from mezzotint.checkpoints.embeddings import is_embedding
from mezzotint.checkpoints.families import Family
from mezzotint.checkpoints.first_stages import folded
from mezzotint.checkpoints.folder import (
    fill_unsaved_buffers,
    load_state_strictly,
    whole_or_not,
    write_atomically,
)
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults, Weights, listed
from mezzotint.checkpoints.model import require_range
from mezzotint.checkpoints.recognition import Recognised, build_first_stage, recognise
from mezzotint.checkpoints.registry import SINGLE_FILES
from mezzotint.checkpoints.sketch import PREFIXES
from mezzotint.checkpoints.telling import tell_disagreement
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.build import build_conditioner, published_tokenizer
from mezzotint.conditioning.spatial import HybridConditioner
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL
from mezzotint.models.unet import UNet
from mezzotint.storage.safetensors_file import Entry, narrowed, write_safetensors
from mezzotint.storage.tensors import Tensors, open_tensors

__all__ = ["find_config", "load_single_file", "open_single_file", "save_single_file"]

# what is said again of the model that is read: prediction, scale, size
_MARKERS = {"scale_factor", "v_pred", "ztsnr"}
_METADATA = {"format", "modelspec.prediction_type", "modelspec.resolution"}
_MOST_EMBEDDING = 16 << 20  # bytes; those of a hundred vectors have less than one MB
_SPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def find_config(path: Path) -> Path | None:
    """Return the YAML file beside a single file, if there is one."""
    beside = (path.with_suffix(suffix) for suffix in (".yaml", ".yml"))
    return next((candidate for candidate in beside if candidate.is_file()), None)


def load_single_file(
    path: Path,
    *,
    dtype: torch.dtype | None,
    config: Path | None = None,
    family: str | None = None,
    prediction: str | None = None,
    weights: Weights = "auto",
) -> LoadedModel:
    """Read a single file.

    No more than one tensor stands in memory beside the weights that are kept.

    Args:
        path: ``.safetensors`` or ``.ckpt``.
        dtype: Of the floating-point weights in memory; None keeps each as it is stored.
        config: Its YAML; if not given, the file of its name beside it, where there is one.
        family: A name of `mezzotint.checkpoints.families.FAMILIES`, in place of a guess.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``, in place of a guess.
        weights: Of a file with averaged weights, which to take for the UNet.

    Raises:
        CheckpointError: If the file or its YAML is missing, damaged or hostile, of no known family,
            or not all of a model is there; or averaged weights are asked for where there are none.
        MissingExtraError: If it needs a package that is not installed.
    """
    tensors, alone = open_single_file(path)
    source = config or find_config(path)
    told = read_compvis_config(source) if source is not None else None
    found = recognise(tensors, told, family=family, prediction=prediction)
    found.require_loadable()
    averaged = takes_averages(found, tensors, weights, alone=alone)
    try:
        model = _assemble(found, tensors, dtype, averaged)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    disagreement = tell_disagreement(tensors, told) if prediction is None else None
    decisive = source is not None and not _told_by_file(found, tensors, family, prediction)
    return LoadedModel(
        model=model.eval(),
        defaults=found.family.defaults,
        files=(path, source) if source is not None and decisive else (path,),
        notes=(
            *_guesses(found, told),
            *([disagreement] if disagreement else []),
            *_choices(found, averaged, alone, weights),
        ),
        left_out=tuple(_left_out(found, tensors, averaged)),
    )


def open_single_file(path: Path) -> tuple[Tensors, bool]:
    """Read the headers of a file that should be a whole model.

    Args:
        path: Of any form that `mezzotint.storage.tensors.open_tensors` knows.

    Returns:
        Its tensors; and whether the UNet's are averages alone, which then bear its names.

    Raises:
        CheckpointError: If it is missing, damaged or hostile, or is an adapter.
    """
    small = path.is_file() and path.stat().st_size <= _MOST_EMBEDDING
    if small and path.suffix in SINGLE_FILES and is_embedding(path):
        raise CheckpointError(
            f"{path}: is an embedding of textual inversion and no model; give it with --adapter"
            " beside a model"
        )
    tensors = open_tensors(path)
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors")
    return with_averages_alone(tensors)


def save_single_file(
    model: LatentDiffusion,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
) -> list[str]:
    """Write a model as a single file, and the YAML of its name beside it.

    Args:
        model: Of a family of `mezzotint.checkpoints.families.FAMILIES`, at any width.
        path: ``.safetensors`` or ``.ckpt``; written whole or not at all.
        dtype: Of the floating-point weights; None keeps each as it is.
        defaults: How it is sampled where a request does not say.

    Returns:
        Sentences on what the layout could not hold.

    Raises:
        CheckpointError: If the layout has no place for the model, it cannot be written, or
            ``dtype`` cannot hold a weight.
    """
    if path.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError(f"{path}: a single file is named *.safetensors or *.ckpt")
    lost: list[str] = []
    if not model.normalization.is_scalar:
        model = _scaled_by_one(model, path)
        lost.append("the latents' statistics per channel were folded into the first stage")
    beside = path.with_suffix(".yaml")
    described = describe(model, _scale_factor(model), beside)
    entries = [*_entries(described, dtype), *_markers(model, described)]
    require_range(model, dtype)
    height, width = model.image_size
    metadata = {
        "format": "pt",
        "modelspec.prediction_type": _SPEC_PREDICTIONS[model.schedule_config.prediction_type],
        "modelspec.resolution": f"{width}x{height}",
    }
    with whole_or_not(path) as temporary:
        if path.suffix == ".safetensors":
            write_safetensors(temporary, entries, metadata)
        else:
            state = {name: narrowed(name, give(), kind) for name, kind, _, give in entries}
            torch.save({"state_dict": state, "global_step": 0}, temporary)
    text = yaml.safe_dump(described.yaml, sort_keys=False, allow_unicode=True)
    write_atomically(beside, text.encode())
    if defaults is not None:
        lost += _unsaid(defaults, described.family)
    return [*lost, *_lost(described, beside)]


def _assemble(
    found: Recognised, tensors: Tensors, dtype: torch.dtype | None, averaged: bool
) -> LatentDiffusion:
    assert found.unet is not None and found.first_stage is not None and found.schedule is not None
    load = partial(_load, found, tensors, dtype)
    conditioner = _conditioner(found, load)
    unet = cast(UNet, load("unet", partial(UNet, found.unet), averaged=averaged))
    stage = partial(build_first_stage, found.first_stage)
    first_stage = cast(FirstStage, load("first_stage", stage))
    scale = found.scale_factor
    if scale is None:
        stored = tensors.read(torch.float64, ["scale_factor"])["scale_factor"]
        scale = float(stored)
    normalization = LatentNormalization.from_scale_factor(scale)
    return LatentDiffusion(
        first_stage, unet, conditioner, found.schedule, normalization, found.image_size
    )


def _load(
    found: Recognised,
    tensors: Tensors,
    dtype: torch.dtype | None,
    part: str,
    build: Callable[[], nn.Module],
    *,
    averaged: bool = False,
) -> nn.Module:
    """Build a part without weights and let it take over those of the file."""
    with torch.device("meta"):
        module = build()
    mapping = found.maps.get(part)
    if mapping is not None:
        ours = _read(mapping, PREFIXES[part], tensors, dtype, averaged)
        load_state_strictly(module, ours, found.paths[0])
    fill_unsaved_buffers(module)
    return module


def _read(
    mapping: TensorMap, prefix: str, tensors: Tensors, dtype: torch.dtype | None, averaged: bool
) -> dict[str, Tensor]:
    """The tensors of a part by our names."""
    names = {rule.theirs: prefix + rule.theirs for rule in mapping.rules}
    if averaged:
        average = {theirs: average_of(name) for theirs, name in names.items()}
        # what was not trained has no average
        names |= {theirs: name for theirs, name in average.items() if name in tensors}
    theirs = tensors.read(dtype, names.values())
    ours: dict[str, Tensor] = {}
    for rule in mapping.rules:
        ours.update(zip(rule.ours, rule.part(theirs.pop(names[rule.theirs])), strict=True))
    return ours


def _conditioner(found: Recognised, load: Callable[..., nn.Module]) -> Conditioner:
    if found.main is not None:
        main = cast(Conditioner, load("conditioner", partial(build_conditioner, found.main)))
        # what is concatenated beside another condition has no tensors
        return HybridConditioner(main, build_conditioner(found.spatial)) if found.spatial else main
    if found.spatial is not None:
        return cast(Conditioner, load("conditioner", partial(build_conditioner, found.spatial)))
    return Unconditional()


def _told_by_file(
    found: Recognised, tensors: Tensors, family: str | None, prediction: str | None
) -> bool:
    """Whether the file alone would have been read as the same model."""
    try:
        alone = recognise(tensors, None, family=family, prediction=prediction)
    except CheckpointError:
        return False
    fields = ("unet", "head_order", "first_stage", "main", "spatial", "schedule", "scale_factor")
    same = all(getattr(alone, name) == getattr(found, name) for name in (*fields, "image_size"))
    return same and not alone.problems


def _guesses(found: Recognised, told: CompvisConfig | None) -> Iterator[str]:
    if told is None:
        name, reason = found.family.name, found.family_reason
        yield f"read as {name} ({found.family.description}): {reason}"
        yield f"it predicts {found.prediction}: {found.prediction_reason}"
    else:
        yield from told.notes


def _choices(found: Recognised, averaged: bool, alone: bool, weights: Weights) -> Iterator[str]:
    if alone:
        yield "the file has averaged weights of the UNet alone, and they were taken"
    elif found.has_ema:
        kind = "averaged weights of the UNet were" if averaged else "UNet's own weights were"
        why = "" if averaged or weights == "raw" else ", as not all averages are there and fit"
        yield f"the {kind} taken{why}; --weights chooses"
    if found.unexpected:
        yield f"left out, as unknown: {listed(found.unexpected)}"


def _left_out(found: Recognised, tensors: Tensors, averaged: bool) -> Iterator[str]:
    """Names of what is not read of a file, but for what is unknown, which is noted."""
    names = {
        PREFIXES[part] + r.theirs for part, mapping in found.maps.items() for r in mapping.rules
    }
    if averaged:
        own = {average_of(name): name for name in names if average_of(name) in tensors}
        names = (names - set(own.values())) | set(own)
    names |= {*_MARKERS, *found.unexpected}
    yield from (name for name in tensors if name not in names)
    yield from (name for name, value in tensors.beside.items() if value)
    yield from (name for name in tensors.metadata if name not in _METADATA)


def _scaled_by_one(model: LatentDiffusion, path: Path) -> LatentDiffusion:
    """The same model with the statistics of its latents in its first stage."""
    if not isinstance(model.first_stage, AutoencoderKL):
        raise CheckpointError(
            f"{path}: the original layout has no place for statistics per channel of a"
            f" {type(model.first_stage).__name__}; write a folder instead"
        )
    return LatentDiffusion(
        folded(model.first_stage, model.normalization),
        model.unet,
        model.conditioner,
        model.schedule_config,
        LatentNormalization.from_scale_factor(1.0),
        model.image_size,
    )


def _scale_factor(model: LatentDiffusion) -> float:
    """The scale factor, as the published models write it where it is theirs."""
    for published in (1.0, 0.18215):
        same = LatentNormalization.from_scale_factor(published)
        if torch.equal(same.std, model.normalization.std.cpu()):
            return published
    return model.normalization.scale_factor


def _entries(described: Described, dtype: torch.dtype | None) -> Iterator[Entry]:
    for part in described.parts:
        tensors = part.module.state_dict()
        for rule in part.map.rules:
            of = tensors[rule.ours[0]]
            kind = dtype if dtype is not None and of.is_floating_point() else of.dtype
            give = partial(_join, rule, tensors)
            yield part.prefix + rule.theirs, kind, tuple(rule.theirs_shape), give


def _join(rule: Rule, tensors: Mapping[str, Tensor]) -> Tensor:
    return rule.join([tensors[name].detach().cpu() for name in rule.ours])


def _markers(model: LatentDiffusion, described: Described) -> Iterator[Entry]:
    """What tells other programs, and us without the YAML, of prediction and scale."""
    marks: dict[str, Tensor] = {}
    known = described.family.settings(model.first_stage.config.to_dict())
    if (scale := _scale_factor(model)) != known.scale_factor:
        marks["scale_factor"] = torch.tensor(scale, dtype=torch.float64)
    if model.schedule_config.prediction_type == "v_prediction":
        marks["v_pred"] = torch.zeros(0)
    if model.schedule.ends_in_noise:
        marks["ztsnr"] = torch.zeros(0)
    for name, tensor in marks.items():
        yield name, tensor.dtype, tuple(tensor.shape), tensor.clone


def _unsaid(defaults: SamplingDefaults, family: Family) -> Iterator[str]:
    """How it is sampled, where files of the family are sampled otherwise."""
    names = [option.name for option in fields(SamplingDefaults)]
    values = {name: getattr(defaults, name) for name in names}
    read = {name: getattr(family.defaults, name) for name in names}
    if lost := [n for n, value in values.items() if value not in (None, read[n])]:
        yield (
            f"{', '.join(f'{name} {values[name]}' for name in lost)}: a single file says none, and"
            f" is read with {', '.join(str(read[name]) for name in lost)}"
        )


def _lost(described: Described, beside: Path) -> Iterator[str]:
    for part in described.parts:
        for name in part.map.unmapped:
            yield f"{part.prefix}: the original layout has no place for {name}"
    if described.own:
        yield (
            f"{beside.name} says under 'mezzotint' what other software does not read:"
            f" {', '.join(described.own)}"
        )
    for part in described.parts:
        own, published = getattr(part.module, "tokenizer", None), published_tokenizer(part.module)
        if own is not None and published and own.get_vocab() != published.get_vocab():
            yield "its tokenizer is not the published one, which a single file is read with"
