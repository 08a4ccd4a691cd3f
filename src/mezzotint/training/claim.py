"""Which recipe a run folder belongs to."""

import os
from pathlib import Path
from typing import Any

from mezzotint.config import read_yaml, to_yaml
from mezzotint.errors import ConfigError, TrainingError
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.checkpoint import list_checkpoints
from mezzotint.training.log import WANDB_ID

__all__ = ["claim", "differences"]

# what may differ between a run and its continuation without making it another run
_CHANGEABLE = {"budget", "run", "optimizer", "description", "format_version", "precision"}


def claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Make a run folder the recipe's, or refuse it.

    Args:
        folder: Of the run.
        recipe: That is to be trained in it; it is written there.
        resume: Whether the run that the folder holds is gone on with.

    Raises:
        ConfigError: If that run was begun with other values.
        TrainingError: If the folder holds no run to go on with, or one that is not to be gone on
            with, or cannot be written.
    """
    record = folder / "recipe.yaml"
    if resume and not record.is_file():
        raise TrainingError(f"{folder}: holds no run to go on with; check --output")
    if resume:
        stored = type(recipe).from_dict(read_yaml(record), str(record))
        different = differences(stored, recipe)
        if different:
            raise ConfigError(
                f"{folder}: this run was begun with other values of {', '.join(different)};"
                " go on with the same ones, or start anew with another --output"
            )
    elif _holds_run(folder) or _holds_run(folder / "first_stage"):
        raise TrainingError(
            f"{folder}: already holds a run; go on with it by --resume, or choose another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("tokenizer.json", WANDB_ID):
                (folder / name).unlink(missing_ok=True)
        temporary = record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(to_yaml(recipe), encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written: {error}") from None


def _holds_run(folder: Path) -> bool:
    there = any((folder / name).exists() for name in ("model", "best"))
    return there or bool(list_checkpoints(folder / "checkpoints"))


def differences(stored: Recipe, wanted: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes of a kind train another model.

    Those aside that may change when a run goes on, such as the budget.
    """
    return _differences(stored.to_dict(), wanted.to_dict())


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, those aside that may."""
    different: list[str] = []
    for key in sorted(stored.keys() | wanted.keys()):
        if not prefix and key in _CHANGEABLE:
            continue
        mine, theirs = stored.get(key), wanted.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            different += _differences(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            different.append(f"{prefix}{key}")
    return different
