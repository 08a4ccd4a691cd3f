"""From a finished programme to the folder that the package ships."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import load_model, save_model
from mezzotint.checkpoints.shipped import write_sums
from mezzotint.errors import TrainingError
from mezzotint.training.recipe import DiffusionRecipe
from tools.train_shipped.programme import (
    HALF,
    Programme,
    is_finished,
    must_follow,
    pieces_of,
)

__all__ = ["CARD", "MODELS", "ROOT", "describe_training", "read_made", "ship"]

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "src/mezzotint/assets/models"
CARD = "README.md"
_MADE = "made.json"
_MOST = 24_000_000  # bytes of all shipped models
_DRAWN = "text-to-image"  # the stage whose model is shipped under the programme's own name


def ship(programme: Programme, models: Path = MODELS) -> Path:
    """Write a finished programme's model as it is shipped, with checksums, licence and origin.

    Args:
        programme: Finished.
        models: The folder of all shipped models.

    Returns:
        The model's folder.

    Raises:
        ConfigError: If a stage was trained by another plan.
        TrainingError: If a stage is not finished, its training was not recorded, or the shipped
            models would be too large.
    """
    for stage in programme.stages:
        if not is_finished(programme.work / stage):
            raise TrainingError(f"{programme.work / stage}: not finished; train on, then ship")
        must_follow(programme, stage, programme.work / stage / HALF)
        if all(piece.stage != stage for piece in pieces_of(programme.work)):
            raise TrainingError(f"{programme.work}: history.json says nothing of {stage}")
    folder, temporary = models / programme.model, models / f".{programme.model}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    recipe = programme.recipe(_DRAWN)
    assert isinstance(recipe, DiffusionRecipe)
    defaults = SamplingDefaults(
        sampler="dpmpp_2m", spacing="trailing", guidance_scale=recipe.guidance_scale
    )
    model = load_model(programme.work / _DRAWN / HALF)
    save_model(model, temporary, dtype=torch.float16, defaults=defaults)
    shutil.copyfile(ROOT / "LICENSE", temporary / "LICENSE")
    pieces = [asdict(piece) for piece in pieces_of(programme.work)]
    begun = {stage: getattr(programme.recipe(stage), "initial", None) for stage in programme.stages}
    made = {
        "plan": programme.plan.name,
        "stages": programme.stages,
        "pieces": pieces,
        "begun_from": {stage: Path(path).parent.name for stage, path in begun.items() if path},
    }
    (temporary / _MADE).write_text(json.dumps(made, indent=1) + "\n")
    for stage in programme.stages:
        shutil.copyfile(programme.plan / f"{stage}.yaml", temporary / f"{stage}.yaml")
    write_sums(temporary)
    text = "\n".join(describe_training(programme.model, made))
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
    lines = [
        f"# {name}",
        "",
        "Draws single emoji from captions. Trained by this repository from its own data, by",
        f"`python -m tools.train_shipped {name}` with the plan `{made['plan']}`; the recipes stand",
        "beside this file.",
        "",
        "- **Data**: Fluent Emoji (Microsoft, MIT) and Noto Emoji (Google, Apache 2.0), with names",
        "  and tags from emojibase (MIT); see the repository's `NOTICE`.",
        "- **Licence of the weights**: MIT (`LICENSE`).",
        "- **Weights**: averaged over training, in float16.",
    ]
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
