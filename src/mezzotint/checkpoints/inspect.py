"""What a file or a folder of weights is, from its headers; weights are read for sums alone."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.changes import change_files
from mezzotint.checkpoints.compvis_config import read_compvis_config
from mezzotint.checkpoints.conditioners import PARTS
from mezzotint.checkpoints.folder import read_json, weight_files
from mezzotint.checkpoints.inspect_folder import check_folder
from mezzotint.checkpoints.loaded import content_hash
from mezzotint.checkpoints.model import CLASS
from mezzotint.checkpoints.recognition import EMA, Recognised, recognise
from mezzotint.checkpoints.registry import INDEX, resolve_model
from mezzotint.checkpoints.schedulers import FILE
from mezzotint.checkpoints.single_file import find_config, open_single_file
from mezzotint.checkpoints.sketch import PREFIXES
from mezzotint.checkpoints.telling import tell_disagreement
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import TensorInfo, Tensors, form_of, open_tensors

__all__ = ["Inspection", "PartSummary", "inspect_model"]

SHORT = 10  # digits of a sha256 by which web UIs call a model
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_BESIDE = "beside the parts"


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """One part of a model.

    Attributes:
        name: What the layout calls it.
        kind: Its class, if the layout says one.
        tensors: How many.
        parameters: How many numbers they hold.
        precisions: How many of these are of each type.
        files: What it lies in.
    """

    name: str
    kind: str | None = None
    tensors: int
    parameters: int
    precisions: Mapping[str, int]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        path: What was inspected.
        layout: ``single file``, ``diffusers folder`` or ``Mezzotint folder``.
        family: Of a single file its family, of a folder its pipeline.
        family_reason: What that rests on.
        prediction: What the UNet predicts.
        prediction_reason: What that rests on.
        image_size: Height and width in pixels that it was trained at, if that is told.
        parts: Its parts.
        averaged: Whether there are averaged weights (EMA) of the UNet.
        averages_alone: Whether the UNet has no others.
        missing: Tensors that should be there.
        unexpected: Tensors that nothing is known of.
        problems: Why it cannot be loaded.
        notes: What else a user should know.
        metadata: What the file says of itself, such as ``modelspec.title`` or ``global_step``.
        sha256: Of the file, or over those of a folder; where it was asked for.
        short_hash: The first digits of it, as other tools show them.
    """

    path: Path
    layout: str
    family: str
    family_reason: str
    prediction: str | None
    prediction_reason: str | None
    image_size: tuple[int, int] | None = None
    parts: tuple[PartSummary, ...]
    averaged: bool = False
    averages_alone: bool = False
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str]
    sha256: str | None = None
    short_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return asdict(self) | {"path": str(self.path)}


def inspect_model(
    path: Path,
    *,
    hashed: bool = False,
    config: Path | None = None,
    family: str | None = None,
    prediction: str | None = None,
) -> Inspection:
    """Say what a model is.

    Args:
        path: Whatever can be loaded: a single file, a folder with ``model_index.json``, a run.
        hashed: Whether to read all of it for its sha256.
        config: The YAML of a single file, in place of the one beside it.
        family: What a single file is, in place of a guess.
        prediction: What it predicts, in place of a guess.

    Raises:
        CheckpointError: If it is missing, damaged, hostile, or no model that is known.
    """
    path = resolve_model(path)
    if path.is_dir():
        told = {"config": config, "family": family, "prediction": prediction}
        if given := [name for name, value in told.items() if value is not None]:
            raise CheckpointError(
                f"{path}: a folder says itself what it is; {', '.join(given)} is for single files"
            )
        return _inspect_folder(path, hashed)
    tensors, alone = open_single_file(path)
    source = config or find_config(path)
    told = read_compvis_config(source) if source is not None else None
    found = recognise(tensors, told, family=family, prediction=prediction)
    sha256 = content_hash([path]) if hashed else None
    disagreement = tell_disagreement(tensors, told) if prediction is None else None
    return Inspection(
        path=path,
        layout=_form(path),
        family=found.family.name,
        family_reason=f"{found.family.description}; {found.family_reason}",
        prediction=found.prediction,
        prediction_reason=found.prediction_reason,
        image_size=found.image_size,
        parts=tuple(_parts_of_file(tensors, found)),
        averaged=found.has_ema or alone,
        averages_alone=alone,
        missing=found.missing,
        unexpected=found.unexpected,
        problems=found.problems,
        notes=(disagreement,) if disagreement else (),
        metadata=_metadata(tensors),
        sha256=sha256,
        short_hash=sha256[:SHORT] if sha256 else None,
    )


def _form(path: Path) -> str:
    """The layout of a single file, and its form where its name says another."""
    suffix, form = path.suffix.removeprefix("."), form_of(path)
    if (suffix == "safetensors") == (form == "safetensors"):
        return f"single file ({suffix})"
    return f"single file ({form}, though it is named .{suffix})"


def _parts_of_file(tensors: Tensors, found: Recognised) -> list[PartSummary]:
    by_prefix: dict[str, list[TensorInfo]] = {}
    names = {prefix: prefix.removesuffix(".") for prefix in (*PREFIXES.values(), EMA)}
    for name, info in tensors.items():
        part = next((told for start, told in names.items() if name.startswith(start)), _BESIDE)
        by_prefix.setdefault(part, []).append(info)
    kinds = {
        PREFIXES["unet"]: "UNet",
        PREFIXES["first_stage"]: type(found.first_stage).__name__.removesuffix("Config"),
        PREFIXES["conditioner"]: type(found.main or found.spatial).__name__.removesuffix("Config"),
        EMA: "averaged weights",
    }
    told = {start.removesuffix("."): kind for start, kind in kinds.items()}
    return [_summary(name, told.get(name), infos) for name, infos in by_prefix.items()]


def _summary(
    name: str, kind: str | None, infos: Iterable[TensorInfo], files: Iterable[Path] = ()
) -> PartSummary:
    listed = list(infos)
    precisions: Counter[str] = Counter()
    for info in listed:
        precisions[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    return PartSummary(
        name=name,
        kind=kind,
        tensors=len(listed),
        parameters=sum(precisions.values()),
        precisions=dict(precisions),
        files=tuple(path.name for path in files),
    )


def _metadata(tensors: Tensors) -> dict[str, str]:
    """What safetensors says of itself, or a pickle beside its tensors, if it is short."""
    beside = {
        name: str(value)
        for name, value in tensors.beside.items()
        if isinstance(value, str | int | float)
    }
    return {**tensors.metadata, **beside}


def _inspect_folder(folder: Path, hashed: bool) -> Inspection:
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    report = check_folder(folder, index)
    parts: list[PartSummary] = []
    files = [folder / INDEX]
    for part, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(kind, str) or Path(part).name != part or not (folder / part).is_dir():
            continue
        # a conditioner of two parts has a sub-folder for each
        found = [file for place in ("", *PARTS) for file in _weights(folder / part / place)]
        if report.base is not None and part == "unet":
            found = [*change_files(folder)]
        files += [*found, *sorted((folder / part).rglob("*.json"))]
        parts.append(_summary(part, kind, _infos(found), found))
    schedule = report.schedule
    sha256 = content_hash(files) if hashed else None
    return Inspection(
        path=folder,
        layout="Mezzotint folder" if name == CLASS else "diffusers folder",
        family=name,
        family_reason=f"{INDEX} says so",
        prediction=schedule.prediction_type if schedule else None,
        prediction_reason=f"scheduler/{FILE} says so" if schedule else None,
        image_size=report.image_size,
        parts=tuple(parts),
        missing=tuple(report.missing),
        unexpected=tuple(report.unexpected),
        problems=tuple(report.problems),
        notes=tuple(report.notes),
        metadata={"diffusers": str(index["_diffusers_version"])}
        if "_diffusers_version" in index
        else {},
        sha256=sha256,
        short_hash=sha256[:SHORT] if sha256 else None,
    )


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files of a component's weights; none for a tokenizer."""
    for stem in _STEMS:
        try:
            return weight_files(folder, stem)
        except CheckpointError:
            continue
    return ()


def _infos(files: Iterable[Path]) -> list[TensorInfo]:
    """All tensors of files, but for those of damaged ones, which are told as problems."""
    found: dict[tuple[Path, str], TensorInfo] = {}
    for path in files:
        try:
            tensors = open_tensors(path)
        except CheckpointError:
            continue
        # the index of a file in parts has the same tensors as the parts
        found |= {(info.path, name): info for name, info in tensors.items()}
    return [*found.values()]
