"""From the name of a model to the folder that holds it."""

from pathlib import Path

from mezzotint.errors import CheckpointError, nearest

__all__ = ["resolve_model"]

INDEX = "model_index.json"


def resolve_model(name: str | Path) -> Path:
    """Find a model: a model folder, or a run folder whose training has written ``model/``.

    Args:
        name: A path.

    Returns:
        The folder that holds ``model_index.json``.

    Raises:
        CheckpointError: If there is no model; it says what is there instead, or what is near.
    """
    path = Path(name)
    for candidate in (path, path / "model"):
        if (candidate / INDEX).is_file():
            return candidate
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{path}: this run is not finished; go on with mezzotint train … --resume"
            )
        raise CheckpointError(f"{path}: no model here: expected {INDEX} in it or in its model/")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    models = [s for s in siblings if _holds_model(path.parent / s)]
    hint = f"; {nearest(path.name, models)}" if models else ""
    raise CheckpointError(f"{path}: no such model folder{hint}")


def _holds_model(path: Path) -> bool:
    return (path / INDEX).is_file() or (path / "model" / INDEX).is_file()
