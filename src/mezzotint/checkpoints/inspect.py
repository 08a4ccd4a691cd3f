"""What a file or a folder of weights is, from its headers alone; no weight is read."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.compvis_config import read_compvis_config
from mezzotint.checkpoints.folder import read_json, weight_files
from mezzotint.checkpoints.loaded import content_hash
from mezzotint.checkpoints.recognition import EMA, Recognised, recognise
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.schedulers import FILE, read_scheduler
from mezzotint.checkpoints.single_file import find_config
from mezzotint.checkpoints.sketch import PREFIXES
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import TensorInfo, Tensors, open_tensors

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
        averaged: Whether averaged weights (EMA) lie beside the UNet's own.
        missing: Tensors that should be there.
        unexpected: Tensors that nothing is known of.
        problems: Why it cannot be loaded.
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
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
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
        path: A single file, or a folder that holds ``model_index.json`` or a run.
        hashed: Whether to read all of it for its sha256.
        config: The YAML of a single file, in place of the one beside it.
        family: What a single file is, in place of a guess.
        prediction: What it predicts, in place of a guess.

    Raises:
        CheckpointError: If it is missing, damaged, hostile, or no model that is known.
    """
    if path.is_dir():
        told = {"config": config, "family": family, "prediction": prediction}
        if given := [name for name, value in told.items() if value is not None]:
            raise CheckpointError(
                f"{path}: a folder says itself what it is; {', '.join(given)} is for single files"
            )
        return _inspect_folder(path, hashed)
    tensors = open_tensors(path)
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors")
    source = config or find_config(path)
    told = read_compvis_config(source) if source is not None else None
    found = recognise(tensors, told, family=family, prediction=prediction)
    sha256 = content_hash([path]) if hashed else None
    return Inspection(
        path=path,
        layout=f"single file ({path.suffix.removeprefix('.')})",
        family=found.family.name,
        family_reason=f"{found.family.description}; {found.family_reason}",
        prediction=found.prediction,
        prediction_reason=found.prediction_reason,
        image_size=found.image_size,
        parts=tuple(_parts_of_file(tensors, found)),
        averaged=found.has_ema,
        missing=found.missing,
        unexpected=found.unexpected,
        problems=found.problems,
        metadata=_metadata(tensors),
        sha256=sha256,
        short_hash=sha256[:SHORT] if sha256 else None,
    )


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
    if not (folder / INDEX).is_file() and (folder / "model" / INDEX).is_file():
        folder = folder / "model"
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: no model here: expected {INDEX} in it or in its model/")
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    parts: list[PartSummary] = []
    files = [folder / INDEX]
    for part, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(kind, str) or Path(part).name != part or not (folder / part).is_dir():
            continue
        found = _weights(folder / part)
        files += [*found, *sorted((folder / part).glob("*.json"))]
        tensors = open_tensors(found[0]) if found else None
        infos = tensors.values() if tensors is not None else ()
        parts.append(_summary(part, kind, infos, found))
    prediction, reason, size = _of_scheduler(folder, index, parts)
    sha256 = content_hash(files) if hashed else None
    ours = name == "LatentDiffusion"
    return Inspection(
        path=folder,
        layout="Mezzotint folder" if ours else "diffusers folder",
        family=name,
        family_reason=f"{INDEX} says so",
        prediction=prediction,
        prediction_reason=reason,
        image_size=size,
        parts=tuple(parts),
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


def _of_scheduler(
    folder: Path, index: Mapping[str, Any], parts: Iterable[PartSummary]
) -> tuple[str | None, str | None, tuple[int, int] | None]:
    """Prediction, what that rests on, and the size of the pictures if the folder tells it."""
    size = None
    match index.get("image_size"):
        case [int(height), int(width)]:
            size = height, width
        case _:
            pass
    entry = index.get("scheduler")
    if not isinstance(entry, list) or len(entry) != 2:
        return None, None, size
    told = read_scheduler(folder / "scheduler" / FILE, str(entry[1]))
    return told.schedule.prediction_type, f"scheduler/{FILE} says so", size
