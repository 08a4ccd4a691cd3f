"""How good the pictures of a model are by sampler, by number of steps and by guidance scale."""

from pathlib import Path
from typing import Any

from rich.console import Console

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import to_yaml
from mezzotint.data import EmojiDataConfig
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.pictures import find_split
from mezzotint.generation.pipeline import load
from mezzotint.studies.plots import plot_style
from mezzotint.studies.sampling_points import Bench, Key, MeasuredPoint, SamplingStudy
from mezzotint.studies.sampling_report import write_report
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = ["SamplingStudy", "run_sampling_study"]

_HELD_OUT = 2000  # real pictures that are compared with the others, at most


def run_sampling_study(
    model: str | Path,
    output: Path,
    *,
    against: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    console: Console | None = None,
    **settings: Any,
) -> Path:
    """Measure every point that is not measured yet, and write the report.

    Each point is a file of its own in ``points/``, so a study that was stopped goes on where it
    stood, and one that is asked for more steps or samplers measures these alone.

    Args:
        model: A model folder or a finished run folder.
        output: Where all goes.
        against: A folder of pictures, or of the splits of a data set, ``emoji`` or
            ``emoji:SPLIT``; by default the data that the run was trained on.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        console: Where progress is shown.
        **settings: Fields of `SamplingStudy`; what is left out takes its default, which for the
            guidance scale is that of the run's recipe.

    Returns:
        ``report.html``.

    Raises:
        CheckpointError: If there is no such model.
        ConfigError: If a setting is wrong, or a point was measured under another or on another
            machine.
        DataError: If the data lack what the model draws from, or are too few.
        MissingExtraError: If matplotlib is not installed.
        RequestError: If the model cannot draw so.
    """
    with plot_style():  # a missing matplotlib is told before anything is drawn
        pass
    console = console or Console()
    pipeline = load(model, device=device, precision=precision)
    recipe = _recipe(Path(model))
    if recipe is not None:
        settings = {"guidance_scale": recipe.guidance_scale, **settings}
    data: Any = against
    if against is None:
        if recipe is None:
            raise ConfigError(
                f"{model}: no recipe.yaml says what it was trained on; say what to compare with, by"
                " --against FOLDER or --against emoji"
            )
        data = recipe.data.to_dict()
    study = SamplingStudy.from_dict({"model": str(model), "data": data, **settings}, "study")
    bench = Bench(pipeline, study, output)
    points = _measure(bench, console)
    held_out = measure_held_out(bench)
    if held_out is not None:
        held_out.write(output / "held-out.json")
    write_atomically(output / "study.yaml", to_yaml(study).encode())
    page = write_report(bench, points, held_out, output)
    console.print(f"look at {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def _measure(bench: Bench, console: Console) -> dict[Key, MeasuredPoint]:
    study, guided = bench.study, bench.pipeline.model.conditioner.wants is not None
    # one point may stand in both rows
    keys = list(dict.fromkeys(study.by_steps() + (study.by_scale() if guided else [])))
    # every file is read before anything is drawn: one that does not fit is told at once, and so is
    # what the model cannot draw
    bench.drawn_with(study.of_strips())
    found = {key: bench.find(key) for key in keys}
    done = sum(point is not None for point in found.values())
    if done:
        console.print(f"{done} of {len(keys)} points are there already", highlight=False)
    points: dict[Key, MeasuredPoint] = {}
    for key, point in found.items():
        if point is None:
            point, done = bench.measure(key), done + 1
            sampler, steps, scale = key
            console.print(
                f"{done} of {len(keys)}: {sampler}, {steps} steps, guidance {scale:g}:"
                f" KID (MobileNetV2) {point.kid.value:.4f} ± {point.kid_error:.4f},"
                f" {point.seconds_per_image:.3f} s a picture",
                highlight=False,
                soft_wrap=True,
            )
        points[key] = point
    return points


def _recipe(model: Path) -> DiffusionRecipe | None:
    """The recipe of the run that a model is of, if it lies in its run folder."""
    for folder in (model, model.parent):
        if (folder / "recipe.yaml").is_file():
            recipe = load_recipe(folder / "recipe.yaml")
            return recipe if isinstance(recipe, DiffusionRecipe) else None
    return None


def measure_held_out(bench: Bench) -> EvaluationCard | None:
    """Compare real pictures that were kept from training with those of the training.

    Args:
        bench: Where points are measured, by the same protocol and against the same pictures.

    Returns:
        KID, which no model can be expected to come below; None if the data have no such split.
    """
    record, config = bench.reference.pictures.record, bench.reference.config
    if record.split not in ("train", "training"):
        return None
    if isinstance(config, EmojiDataConfig):
        look = {"style", "groups", "background"}  # others are not like those that are named below
        if config.model_dump(include=look) != EmojiDataConfig().model_dump(include=look):
            return None
        held_out: str | Path = "emoji:validation"
    else:
        try:
            held_out = find_split(Path(config.path).parent, "validation", "validation")[0]
        except DataError:
            return None
    few = {"metrics": ("kid",), "samples": _HELD_OUT, "fewer": True}
    return evaluate(
        held_out,
        bench.study.data,
        bench.protocol.model_copy(update=few),
        resolution=record.height,
        device=str(bench.pipeline.execution.device),
    )
