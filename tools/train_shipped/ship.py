"""From a finished programme to the folder that the package ships."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.changes import BASE, Base
from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import load_model
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.shipped import check_sums, write_sums
from mezzotint.errors import TrainingError
from mezzotint.training.recipe import DiffusionRecipe
from tools.train_shipped.programme import (
    HALF,
    PLANNED,
    Piece,
    Programme,
    is_finished,
    keep,
    must_follow,
    pieces_of,
    record,
    steps_done,
)

__all__ = [
    "CARD",
    "DRAWN",
    "MODELS",
    "ROOT",
    "describe_training",
    "read_made",
    "ship",
    "take_shipped",
]

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "src/mezzotint/assets/models"
CARD = "README.md"
_MADE = "made.json"
_MOST = 24_000_000  # bytes of all shipped models
DRAWN = "text-to-image"  # the stage whose model is shipped under the programme's own name
_DOES = {
    DRAWN: "Draws single emoji from captions.",
    "upscale": "Enlarges pictures of emoji twofold, told by a caption what they show.",
    "inpaint": "Draws what a mask covers of a picture of an emoji, from its caption.",
    "scenes": "Draws scenes of emoji from boxes and words.",
}


def ship(programme: Programme, models: Path = MODELS) -> list[Path]:
    """Write a programme's models as they are shipped, with checksums, licence and origin.

    The text model has the programme's name. What was trained from it for another task, as far as
    that is finished, is kept as what it changes of it, as ``<name>-<stage>``.

    Args:
        programme: Finished, up to the text model at least.
        models: The folder of all shipped models.

    Returns:
        The models' folders.

    Raises:
        ConfigError: If a stage was trained by another plan.
        TrainingError: If a stage is not finished, its training was not recorded, or the shipped
            models would be too large.
    """
    last = programme.stages.index(DRAWN) + 1
    first, further = programme.stages[:last], programme.stages[last:]
    base, shipped = models / programme.model, list[Path]()
    lacking = [stage for stage in first if not is_finished(programme.work / stage)]
    # what lies there already may have been taken from there, see `take_shipped`
    if DRAWN in lacking or (lacking and not base.is_dir()):
        raise TrainingError(f"{programme.work / lacking[0]}: not finished; train on, then ship")
    if not lacking:
        _keep_what_changes(programme, further, models)
        shipped.append(_ship(programme, first, programme.model, models))
    for stage in further:
        if is_finished(programme.work / stage):
            name = f"{programme.model}-{stage}"
            shipped.append(_ship(programme, (stage,), name, models, base))
    return shipped


def take_shipped(programme: Programme, models: Path = MODELS) -> None:
    """Begin a work folder with the text model that is shipped, to train other tasks from it.

    Args:
        programme: Its work folder has no text model yet.
        models: The folder of all shipped models.

    Raises:
        ConfigError: If the model was trained by another plan.
        CheckpointError: If a file of the model is damaged.
        TrainingError: If none is shipped, or the work folder has another.
    """
    folder = models / programme.model
    if not (folder / _MADE).is_file():
        raise TrainingError(f"{folder}: no model is shipped here")
    made = read_made(folder)
    check_sums(folder)
    parts = {"autoencoder": ("vae",), DRAWN: ("vae", "unet", "scheduler", "conditioner", INDEX)}
    taken = programme.work / DRAWN / HALF
    if (taken / INDEX).is_file() and Base(taken).sha256() == Base(folder).sha256():
        return  # it was taken before
    for stage in parts:
        if steps_done(programme.work / stage) or is_finished(programme.work / stage):
            raise TrainingError(f"{programme.work / stage}: is there already; go on with it")
        must_follow(programme, stage, folder, f"{stage}.yaml")
    for stage, names in parts.items():
        half = programme.work / stage / HALF
        shutil.rmtree(half, ignore_errors=True)  # left by one that was stopped here
        half.mkdir(parents=True)
        for name in names:
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
            copy(folder / name, half / name)
        shutil.copyfile(folder / f"{stage}.yaml", half / PLANNED)
    record(programme.work, [Piece(**piece) for piece in made["pieces"]])


def _keep_what_changes(programme: Programme, further: Sequence[str], models: Path) -> None:
    """Refuse to replace a model whose changes would then be of another."""
    anew = {
        f"{programme.model}-{stage}" for stage in further if is_finished(programme.work / stage)
    }
    sums = Base(programme.work / DRAWN / HALF).sha256()
    for index in sorted(models.glob(f"*/{INDEX}")):
        entry = read_json(index).get(BASE)
        if entry is None or index.parent.name in anew or entry["sha256"] == sums:
            continue
        if (index.parent / entry["model"]).resolve() == (models / programme.model).resolve():
            raise TrainingError(
                f"{index.parent}: holds changes of the model that would be replaced; remove it, or"
                " train its stage anew and ship both"
            )


def _ship(
    programme: Programme,
    stages: Sequence[str],
    name: str,
    models: Path,
    base: Path | None = None,
) -> Path:
    """Write the model of the last of some stages."""
    pieces = [piece for piece in pieces_of(programme.work) if piece.stage in stages]
    for stage in stages:
        must_follow(programme, stage, programme.work / stage / HALF)
        if all(piece.stage != stage for piece in pieces):
            raise TrainingError(f"{programme.work}: history.json says nothing of {stage}")
    folder, temporary = models / name, models / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    recipe = programme.recipe(stages[-1])
    assert isinstance(recipe, DiffusionRecipe)
    defaults = SamplingDefaults(
        sampler="dpmpp_2m", spacing="trailing", guidance_scale=recipe.guidance_scale
    )
    keep(load_model(programme.work / stages[-1] / HALF), recipe, temporary, base, defaults)
    shutil.copyfile(ROOT / "LICENSE", temporary / "LICENSE")
    begun = {stage: getattr(programme.recipe(stage), "initial", None) for stage in stages}
    made = {
        "plan": programme.plan.name,
        "stages": stages,
        "pieces": [asdict(piece) for piece in pieces],
        "changes_of": programme.model if recipe.lora_rank is not None else None,
        "begun_from": {stage: Path(path).parent.name for stage, path in begun.items() if path},
    }
    (temporary / _MADE).write_text(json.dumps(made, indent=1) + "\n")
    for stage in stages:
        shutil.copyfile(programme.plan / f"{stage}.yaml", temporary / f"{stage}.yaml")
    write_sums(temporary)
    text = "\n".join(describe_training(name, made))
    (temporary / CARD).write_text(f"{text}\n", encoding="utf-8")
    files = [path for path in models.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if not path.is_relative_to(folder))
    if size > _MOST:
        shutil.rmtree(temporary)
        raise TrainingError(f"{models}: {size:,} bytes, and {_MOST:,} at most are shipped")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return folder


def read_made(folder: Path) -> dict[str, Any]:
    """Return how a shipped model was made."""
    return json.loads((folder / _MADE).read_text())


def describe_training(name: str, made: dict[str, Any]) -> list[str]:
    """Say in the lines of a model card what a model was trained on, and how.

    Args:
        name: The model's.
        made: From `read_made`.
    """
    last = made["stages"][-1]
    of = name.removesuffix(f"-{last}")
    lines = [
        f"# {name}",
        "",
        f"{_DOES[last]} Trained by this repository from its own data, by",
        f"`python -m tools.train_shipped {of}` with the plan `{made['plan']}`; the recipes stand",
        "beside this file.",
        "",
        "- **Data**: Fluent Emoji (Microsoft, MIT) and Noto Emoji (Google, Apache 2.0), with names",
        "  and tags from emojibase (MIT); see the repository's `NOTICE`.",
        "- **Licence of the weights**: MIT (`LICENSE`).",
        "- **Weights**: averaged over training, in float16.",
    ]
    if made.get("changes_of"):
        lines.append(
            f"  They are what it changes of `{made['changes_of']}`: factors of low rank, and whole"
            " layers where these would be no smaller, or that are new."
        )
    for stage in made["stages"]:
        pieces = [piece for piece in made["pieces"] if piece["stage"] == stage]
        minutes = sum(piece["seconds"] for piece in pieces) / 60
        where = ", ".join(sorted({piece["device"] for piece in pieces}))
        steps = max((piece["end"] for piece in pieces), default=0)
        lines.append(f"- **{stage}**: {steps:,} steps in {minutes:.0f} minutes on {where}.")
        if first := made.get("begun_from", {}).get(stage):
            lines.append(f"  Begun from the weights of {first}.")
        if restarts := sum(piece["restarted"] for piece in pieces):
            lines.append(
                f"  {restarts} of {len(pieces)} pieces began with averaged float16 weights and a"
                " new optimizer."
            )
    return lines
