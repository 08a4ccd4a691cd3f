"""Measure a model or a folder of pictures by a protocol: numbers and the card beside them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from mezzotint.checkpoints.registry import INDEX
from mezzotint.device import select_device, threads
from mezzotint.engines.select import QuantizationKind
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.card import Cost, EvaluationCard
from mezzotint.evaluation.drawing import Drawing
from mezzotint.evaluation.first_stage import evaluate_first_stage, find_first_stage
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.pictures import PictureSource, evenly, write_sheet
from mezzotint.evaluation.plan import (
    NO_CAPTIONS,
    Plan,
    check_comparable,
    check_counts,
    find_networks,
    holds_model,
    open_drawn,
    open_pictures,
)
from mezzotint.evaluation.protocol import EvaluationProtocol, get_protocol
from mezzotint.evaluation.reference import Against, RealPictures, Reference, features_of
from mezzotint.evaluation.scores import Seen, score
from mezzotint.evaluation.shards import (
    FeaturePass,
    FeatureSet,
    NetworkSpec,
    pictures_at,
    ranks,
    run_pass,
    wait_for,
)
from mezzotint.evaluation.work import CARD, working_folder
from mezzotint.generation.pipeline import Pipeline

__all__ = ["default_protocol", "evaluate"]

Progress = Callable[[str, int, int], None]
_ON_GRID = 64


def evaluate(
    model: Pipeline | str | Path,
    against: Against,
    protocol: str | Path | EvaluationProtocol | None = None,
    *,
    samples: int | None = None,
    split: str | None = None,
    resolution: int | None = None,
    against_resolution: int | None = None,
    caption_column: str | None = None,
    weights: Mapping[str, str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    quantization: QuantizationKind = "none",
    processes: int = 1,
    work: str | Path | None = None,
    grid: str | Path | None = None,
    compare_with: EvaluationCard | None = None,
    on_card: Callable[[EvaluationCard], None] | None = None,
    on_progress: Progress | None = None,
    **drawing: Any,
) -> EvaluationCard:
    """Measure pictures against real ones.

    Picture k of a model is drawn from ``seed + k``, under the caption or class of a real picture,
    in the proportions of these. Batches are fixed by index, so the numbers do not depend on the
    number of processes, and a run that was killed goes on where it stood when it is called again.

    Args:
        model: A pipeline, the folder of a model or of a finished run, or a folder of pictures;
            ``emoji:SPLIT`` for real pictures against real ones. Of a first stage alone, such as an
            autoencoder's run, it is measured what it keeps of the real pictures.
        against: A folder of pictures or of the splits of a data set, ``emoji`` or ``emoji:SPLIT``,
            or a data configuration, whose pictures are brought to the size of the measured ones.
        protocol: A name of `PROTOCOLS`, the path of a YAML file, or a protocol; by default
            `default_protocol`.
        samples: Pictures to measure, instead of the protocol's number.
        split: Part of the real data, instead of the protocol's or the data configuration's.
        resolution: Side in pixels that the pictures of a folder are cropped and resized to; the
            real ones with them.
        against_resolution: The same for the real pictures alone.
        caption_column: Of the metadata file of a folder of real pictures, for a text model.
        weights: Where feature networks' weights are, by name: ``PATH`` or ``PATH#SHA256``.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: What a model draws in; feature networks always compute in float32.
        engine: What runs a model's networks; see `mezzotint.load`.
        quantization: What large weights of its UNet are rounded to; see there.
        processes: How many share the work on this machine; started by torchrun, its ranks do.
        work: Where pictures and features are kept until the card is there; by default in the cache
            folder, and then they are removed afterwards.
        grid: A PNG to write some of the measured pictures into.
        compare_with: A card that the new one is to be comparable with: what could not be compared
            is refused before anything is drawn.
        on_card: Called with the card before the work is removed, by torchrun's rank 0 alone; if it
            raises, the work stays.
        on_progress: Called with what is done in words, pictures done, and pictures in all.
        **drawing: How a model draws: ``seed``, ``steps``, ``sampler``, ``spacing``,
            ``guidance_scale``, ``guidance_rescale``, ``guidance_interval``, ``eta``,
            ``feature_reuse``, ``token_merging``.

    Returns:
        The numbers, with all that one must know to compare them.

    Raises:
        ConfigError: If the protocol, or a setting, is wrong.
        DataError: If pictures are missing, too few, of several sizes, or more than 1 % broken; if
            the cards could not be compared, or nothing can be measured.
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
    sides = {"resolution": resolution, "against_resolution": against_resolution}
    _check_options(model, processes, sides, grid, drawing)
    chosen = _protocol(protocol or default_protocol(model), samples)
    stage = _first_stage(model)
    _check_kind(chosen, model, stage)
    limit = chosen.reference_samples
    real = RealPictures(
        against,
        split=split,
        default_split=chosen.reference_split,
        resolution=against_resolution or resolution,
        limit=limit if stage is None else min(chosen.samples, limit or chosen.samples),
    )
    device = _device(device)
    if stage is not None:
        given = {"processes": processes > 1, "work": work, "weights": weights}
        given["precision"] = precision not in ("auto", "float32")
        given["engine"] = engine not in ("auto", "torch")
        given["quantization"] = quantization != "none"
        _refuse_for_first_stage(given)
        card = evaluate_first_stage(
            stage,
            str(model),
            real,
            chosen,
            device=device,
            grid=Path(grid) if grid is not None else None,
            compare_with=compare_with,
            on_progress=on_progress,
        )
        return _told(card, on_card)
    networks, checksums = find_networks(chosen, weights or {}, device)
    targets: list[int] | str = NO_CAPTIONS
    if _is_model(model):
        evaluated, reference, targets = open_drawn(
            model,
            real,
            Drawing.from_dict(drawing, "evaluate"),
            chosen,
            caption_column=caption_column,
            device=device,
            precision=precision,
            engine=engine,
            quantization=quantization,
        )
    else:
        folder = cast("str | Path", model)
        evaluated, reference = open_pictures(folder, real, resolution, chosen.samples)
    plan = _plan(chosen, networks, checksums, evaluated, reference, real, targets, device)
    if compare_with is not None:
        check_comparable(compare_with, plan.card({}, Cost()))
    with working_folder(work, plan.settings()) as place:
        return _told(_run(plan, place, processes, grid, on_progress), on_card)


def default_protocol(model: Pipeline | str | Path) -> str:
    """Return the protocol for what is measured: ``reconstruction`` for a first stage alone."""
    return "small" if _first_stage(model) is None else "reconstruction"


def _first_stage(model: Pipeline | str | Path) -> Path | None:
    return None if isinstance(model, Pipeline) else find_first_stage(model)


def _check_kind(
    protocol: EvaluationProtocol, model: Pipeline | str | Path, stage: Path | None
) -> None:
    if protocol.of_first_stages and stage is None:
        raise ConfigError(
            f"protocol {protocol.name}: measures a first stage alone, and {model} is none"
        )
    if stage is not None and not protocol.of_first_stages:
        raise ConfigError(
            f"protocol {protocol.name}: measures pictures, and {model} is a first stage, which"
            " draws none; leave it out, or choose reconstruction"
        )


def _plan(
    protocol: EvaluationProtocol,
    networks: tuple[NetworkSpec, ...],
    checksums: dict[str, str],
    evaluated: PictureSource,
    reference: Reference,
    real: RealPictures,
    targets: list[int] | str,
    device: str,
) -> Plan:
    training = None
    if "nearest_training" in protocol.metrics:
        record = evaluated.record
        training = real.open_training(reference, (record.height, record.width))
    check_counts(protocol, evaluated, reference, training)
    plan = Plan(protocol, networks, checksums, evaluated, reference, training, targets, device)
    if not plan.metrics:
        reasons = "; ".join(f"{name}: {why}" for name, why in plan.left_out.items())
        raise DataError(f"protocol {protocol.name}: nothing can be measured here: {reasons}")
    return plan


def _told(card: EvaluationCard, on_card: Callable[[EvaluationCard], None] | None) -> EvaluationCard:
    if on_card is not None and ranks()[0] == 0:
        on_card(card)
    return card


def _refuse_for_first_stage(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{name}: a first stage is measured in one go, by one process, in float32, by"
                " torch and on the shipped network; leave it out"
            )


def _is_model(model: Pipeline | str | Path) -> bool:
    if isinstance(model, Pipeline):
        return True
    return holds_model(Path(model)) and _first_stage(model) is None


def _check_options(
    model: Pipeline | str | Path,
    processes: int,
    sides: Mapping[str, int | None],
    grid: str | Path | None,
    drawing: Mapping[str, Any],
) -> None:
    for name, value in {"processes": processes, **sides}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}: must be at least 1, got {value}")
    if processes > 1 and isinstance(model, Pipeline):
        raise ConfigError("processes: several need the model's folder, not a pipeline in memory")
    if grid is not None and Path(grid).suffix.lower() != ".png":
        raise ConfigError(f"grid: {grid}: pictures are written as PNG; name it *.png")
    if _is_model(model) and sides["resolution"] is not None:
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
    seen = Seen(
        measured.features,
        measured.logits,
        of_reference,
        of_training,
        plan.checksums,
        None if isinstance(plan.targets, str) else torch.tensor(plan.targets),
    )
    numbers = score(plan.protocol, seen, plan.metrics)
    card = plan.card(numbers, _cost(measured, len(plan.evaluated), processes))
    if grid is not None:
        _write_grid(plan, job, Path(grid))
    if ranks()[1] > 1:
        card.write(folder / CARD)
    return card


def _card_of_rank_0(folder: Path) -> EvaluationCard:
    wait_for(folder, (folder / CARD).is_file)
    return EvaluationCard.read(folder / CARD)


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
    write_sheet(sheet, path)
