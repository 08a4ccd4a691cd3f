"""Measure a model or a folder of pictures by a protocol: numbers and the card beside them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import Tensor

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.checkpoints.registry import INDEX
from mezzotint.device import select_device, threads
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.card import Cost, EvaluationCard, NetworkRecord
from mezzotint.evaluation.drawing import Drawing
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.pictures import evenly
from mezzotint.evaluation.plan import (
    Plan,
    check_counts,
    find_networks,
    holds_model,
    open_drawn,
    open_pictures,
    versions,
)
from mezzotint.evaluation.protocol import EvaluationProtocol, get_protocol
from mezzotint.evaluation.reference import Against, RealPictures, Reference, features_of
from mezzotint.evaluation.scores import Seen, score
from mezzotint.evaluation.shards import FeaturePass, FeatureSet, pictures_at, ranks, run_pass
from mezzotint.generation.pipeline import Pipeline
from mezzotint.models.weights import cache_directory

__all__ = ["evaluate"]

Progress = Callable[[str, int, int], None]
_ON_GRID = 64
_SETTINGS = "settings.json"
_CARD = "card.json"


def evaluate(
    model: Pipeline | str | Path,
    against: Against,
    protocol: str | Path | EvaluationProtocol = "small",
    *,
    samples: int | None = None,
    split: str | None = None,
    resolution: int | None = None,
    against_resolution: int | None = None,
    caption_column: str | None = None,
    weights: Mapping[str, str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    processes: int = 1,
    work: str | Path | None = None,
    grid: str | Path | None = None,
    on_progress: Progress | None = None,
    **drawing: Any,
) -> EvaluationCard:
    """Measure pictures against real ones.

    Picture k of a model is drawn from ``seed + k``, under the caption or class of a real picture,
    in the proportions of these. Batches are fixed by index, so the numbers do not depend on the
    number of processes, and a run that was killed goes on where it stood when it is called again.

    Args:
        model: A pipeline, the folder of a model or of a finished run, or a folder of pictures;
            ``emoji:SPLIT`` for real pictures against real ones.
        against: A folder of pictures or of the splits of a data set, ``emoji`` or ``emoji:SPLIT``,
            or a data configuration.
        protocol: A name of `PROTOCOLS`, the path of a YAML file, or a protocol.
        samples: Pictures to measure, instead of the protocol's number.
        split: Part of the real data, instead of the protocol's.
        resolution: Side in pixels that the pictures of a folder are cropped and resized to; the
            real ones with them.
        against_resolution: The same for the real pictures alone.
        caption_column: Of the metadata file of a folder of real pictures, for a text model.
        weights: Where feature networks' weights are, by name: ``PATH`` or ``PATH#SHA256``.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: What a model draws in; feature networks always compute in float32.
        processes: How many share the work on this machine; started by torchrun, its ranks do.
        work: Where pictures and features are kept until the card is there; by default in the cache
            folder, and then they are removed afterwards.
        grid: A PNG to write some of the measured pictures into.
        on_progress: Called with what is done in words, pictures done, and pictures in all.
        **drawing: How a model draws: ``seed``, ``steps``, ``sampler``, ``spacing``,
            ``guidance_scale``, ``guidance_rescale``, ``eta``.

    Returns:
        The numbers, with all that one must know to compare them.

    Raises:
        ConfigError: If the protocol, or a setting, is wrong.
        DataError: If pictures are missing, too few, broken or of several sizes.
        RequestError: If the model cannot draw what is asked.
        CheckpointError: If a model or the weights of a network are missing or damaged.

    Example:
        >>> from mezzotint.evaluation.protocol import PROTOCOLS
        >>> quick = PROTOCOLS["small"].model_copy(update={"network": "random", "metrics": ("kid",)})
        >>> card = evaluate("emoji:validation", "emoji:validation", quick, resolution=32)
        >>> list(card.numbers)
        ['kid_random']
    """
    drawing = {name: value for name, value in drawing.items() if value is not None}
    _check_options(model, processes, resolution, grid, drawing)
    chosen = _protocol(protocol, samples)
    device = _device(device)
    networks, checksums = find_networks(chosen, weights or {}, device)
    real = RealPictures(
        against,
        split=split,
        default_split=chosen.reference_split,
        resolution=against_resolution or resolution,
        limit=chosen.reference_samples,
    )
    if _is_model(model):
        evaluated, reference = open_drawn(
            model,
            real,
            Drawing.from_dict(drawing, "evaluate"),
            chosen,
            caption_column=caption_column,
            device=device,
            precision=precision,
        )
    else:
        folder = cast("str | Path", model)
        evaluated, reference = open_pictures(folder, real, resolution, chosen.samples)
    check_counts(chosen, evaluated, reference)
    training = None
    if "nearest_training" in chosen.metrics:
        record = evaluated.record
        training = real.open_training(reference, (record.height, record.width))
    plan = Plan(chosen, networks, checksums, evaluated, reference, training, device)
    settings = plan.settings()
    place = Path(work) if work is not None else _default_work(settings)
    _claim(place, settings)
    card = _run(plan, place, processes, grid, on_progress)
    if work is None and ranks()[1] == 1:
        shutil.rmtree(place, ignore_errors=True)
    return card


def _is_model(model: Pipeline | str | Path) -> bool:
    return isinstance(model, Pipeline) or holds_model(Path(model))


def _check_options(
    model: Pipeline | str | Path,
    processes: int,
    resolution: int | None,
    grid: str | Path | None,
    drawing: Mapping[str, Any],
) -> None:
    if processes < 1:
        raise ConfigError(f"processes: must be at least 1, got {processes}")
    if processes > 1 and isinstance(model, Pipeline):
        raise ConfigError("processes: several need the model's folder, not a pipeline in memory")
    if grid is not None and Path(grid).suffix.lower() != ".png":
        raise ConfigError(f"grid: {grid}: pictures are written as PNG; name it *.png")
    if _is_model(model) and resolution is not None:
        raise ConfigError("resolution: a model draws at its own; this is for folders of pictures")
    if drawing and not _is_model(model):
        raise ConfigError(
            f"{next(iter(drawing))}: {model} is no model (no {INDEX} in it), and its pictures are"
            " measured as they are"
        )


def _protocol(protocol: str | Path | EvaluationProtocol, samples: int | None) -> EvaluationProtocol:
    chosen = protocol if isinstance(protocol, EvaluationProtocol) else get_protocol(protocol)
    if samples is None:
        return chosen
    values = chosen.to_dict() | {"samples": samples, "fewer": False}
    return EvaluationProtocol.from_dict(values, f"protocol {chosen.name}")


def _device(name: str) -> str:
    device = select_device(name)
    if str(device) == "cuda" and ranks()[1] > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # each rank has one of its own
    return str(device)


def _default_work(settings: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "evaluations" / digest[:16]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Begin in a folder, or go on in one that was begun with the same settings."""
    path = folder / _SETTINGS
    # looked for before the settings: another rank writes these first, and under a hidden name
    others = _others(folder)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(f"{path}: damaged; delete the folder or choose another work") from None
        differing = _differing(before, settings)
        if differing:
            raise ConfigError(
                f"{folder}: begun with other values of {', '.join(differing)}; choose another"
                " folder by work (--work DIR), or delete this one"
            )
    elif folder.is_file() or others:
        raise ConfigError(f"{folder}: holds something else; choose another folder by work (--work)")
    else:
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def _others(folder: Path) -> list[str]:
    """Return what is in a folder beside the settings and hidden files."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if not name.startswith(".") and name != _SETTINGS]


def _differing(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the dotted keys under which two plain values differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [key]
    first, second = cast(dict[str, Any], before), cast(dict[str, Any], now)
    return [
        name
        for part in sorted(first.keys() | second.keys())
        for name in _differing(first.get(part), second.get(part), f"{key}.{part}".lstrip("."))
    ]


def _run(
    plan: Plan,
    folder: Path,
    processes: int,
    grid: str | Path | None,
    on_progress: Progress | None,
) -> EvaluationCard:
    def saying(what: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(what, done, total) if on_progress else None

    def real(reference: Reference, name: str) -> dict[str, Tensor]:
        job = plan.job(reference.pictures, folder / name)
        report = saying(f"features of {reference.called}")
        return features_of(job, plan.checksums, processes=processes, on_progress=report)

    of_reference = real(plan.reference, "reference")
    of_training = of_reference
    if plan.training is not None and plan.training is not plan.reference:
        of_training = real(plan.training, "training")
    job = plan.job(plan.evaluated, folder / "evaluated")
    verb = "drawing by" if plan.drawn is not None else "features of"
    report = saying(f"{verb} {plan.evaluated.record.description}")
    measured = run_pass(job, processes=processes, on_progress=report)
    if measured is None:
        return _card_of_rank_0(folder)
    seen = Seen(measured.features, measured.logits, of_reference, of_training)
    card = EvaluationCard(
        protocol=plan.protocol,
        numbers=score(plan.protocol, seen),
        networks=tuple(NetworkRecord(name=n, weights_sha256=s) for n, s in plan.checksums.items()),
        evaluated=plan.evaluated.record,
        reference=plan.reference.pictures.record,
        training=plan.training.pictures.record if plan.training is not None else None,
        drawn_with=plan.drawn.drawn_with if plan.drawn is not None else None,
        versions=versions(),
        cost=_cost(measured, len(plan.evaluated), processes),
    )
    if grid is not None:
        _write_grid(plan, job, Path(grid))
    if ranks()[1] > 1:
        card.write(folder / _CARD)
    return card


def _card_of_rank_0(folder: Path) -> EvaluationCard:
    while not (folder / _CARD).is_file():
        time.sleep(0.1)
    return EvaluationCard.read(folder / _CARD)


def _cost(measured: FeatureSet, count: int, processes: int) -> Cost:
    return Cost(
        pictures_seconds=measured.pictures_seconds / count,
        features_seconds=measured.features_seconds / count,
        processes=max(processes, ranks()[1]),
        threads=threads(),
    )


def _write_grid(plan: Plan, job: FeaturePass, path: Path) -> None:
    chosen = evenly(_ON_GRID, len(plan.evaluated))
    pixels = pictures_at(job, chosen).permute(0, 2, 3, 1).numpy()
    conditions = plan.drawn.conditions if plan.drawn is not None else None
    labels = None if conditions is None else [conditions[k] for k in chosen]
    sheet = image_grid([Image.fromarray(p) for p in pixels], columns=8, labels=labels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise DataError(f"grid: {path}: cannot be written: {error.strerror or error}") from None
