"""How good the pictures of a model are by sampler, by number of steps and by guidance scale."""

from pathlib import Path
from typing import Any

from rich.console import Console

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import to_yaml
from mezzotint.data import EmojiDataConfig, FolderDataConfig, open_data
from mezzotint.errors import ConfigError, RequestError, nearest
from mezzotint.evaluation.drawing import emoji_labels
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.studies.plots import plot_style
from mezzotint.studies.sampling_points import Bench, Key, MeasuredPoint, SamplingStudy
from mezzotint.studies.sampling_report import write_report
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = ["SamplingStudy", "run_sampling_study"]

_EMOJI = "emoji"
_SPLITS = ("train", "validation", "all")


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
        against: A folder of pictures, ``emoji`` or ``emoji:SPLIT``; by default the data that the
            run was trained on.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        console: Where progress is shown.
        **settings: Fields of `SamplingStudy`; what is left out takes its default, which for the
            guidance scale is that of the run's recipe.

    Returns:
        ``report.html``.

    Raises:
        CheckpointError: If there is no such model.
        ConfigError: If a setting is wrong, or a point was measured under another.
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
    data = data_config(pipeline, recipe, against)
    study = SamplingStudy.from_dict(
        {"model": str(model), "data": data.to_dict(), **settings}, "sampling study"
    )
    _check_steps(study, pipeline)
    bench = Bench(pipeline, open_data(data), study, output)
    points = _measure(bench, study, console)
    write_atomically(output / "study.yaml", to_yaml(study).encode())
    page = write_report(bench, points, output)
    console.print(f"look at {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def _measure(bench: Bench, study: SamplingStudy, console: Console) -> dict[Key, MeasuredPoint]:
    guided = bench.pipeline.model.conditioner.wants is not None
    # one point may stand in both rows
    keys = list(dict.fromkeys(study.by_steps() + (study.by_scale() if guided else [])))
    # every file is read before anything is drawn: one that does not fit is told at once
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
                f"{done} of {len(keys)}: {sampler}, {steps} steps, guidance {scale:g}: KID"
                f" {point.kid:.4f} ± {point.kid_standard_error:.4f},"
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


def data_config(
    pipeline: Pipeline, recipe: DiffusionRecipe | None, against: str | None
) -> EmojiDataConfig | FolderDataConfig:
    """Say what a model is compared with, at the size of its pictures.

    Args:
        pipeline: The model.
        recipe: Of its run; what it says of the data holds for other data of its kind.
        against: What the user asked for, if anything.

    Raises:
        ConfigError: If nothing was asked for and there is no recipe, or there is no such split.
        RequestError: If the model draws pictures that are not square.
    """
    height, width = pipeline.model.image_size
    if height != width:
        raise RequestError(
            f"{pipeline.name}: draws {width}x{height} pixels, and only square pictures are studied"
        )
    trained_on = recipe.data if recipe is not None else None
    if against is None:
        if trained_on is None:
            raise ConfigError(
                f"{pipeline.name}: no recipe.yaml says what it was trained on; say what to compare"
                " with, by --against FOLDER or --against emoji"
            )
        return trained_on.model_copy(update={"resolution": height})
    kind, colon, split = against.partition(":")
    if kind == _EMOJI and not Path(against).exists():
        if colon and split not in _SPLITS:
            raise ConfigError(f"--against {against}: {nearest(split, _SPLITS)}")
        emoji = trained_on if isinstance(trained_on, EmojiDataConfig) else None
        like = emoji or EmojiDataConfig.from_dict({"labels": emoji_labels(pipeline)})
        update = {"split": split or "train", "subset": None, "names": None, "resolution": height}
        return like.model_copy(update=update)
    if isinstance(trained_on, FolderDataConfig):
        return trained_on.model_copy(update={"path": against, "split": None, "resolution": height})
    return FolderDataConfig(path=against, resolution=height)


def _check_steps(study: SamplingStudy, pipeline: Pipeline) -> None:
    most = pipeline.model.schedule_config.num_train_timesteps
    asked = max(*study.steps, study.scale_steps)
    if asked > most:
        raise RequestError(
            f"steps: {asked} is more than the {most} noise levels that the model was trained on"
        )
