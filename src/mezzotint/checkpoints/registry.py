"""From the name of a model to what holds it on the disk."""

from pathlib import Path

from mezzotint.checkpoints.shipped import find_shipped, shipped_names
from mezzotint.errors import CheckpointError, nearest
from mezzotint.storage.tensors import PICKLES

__all__ = ["INDEX", "SINGLE_FILES", "resolve_model"]

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", *PICKLES)

_STEMS_OF_ADAPTERS = ("pytorch_lora_weights", "learned_embeds")
# what the folders of PEFT and of diffusers hold, and those of textual inversion
_OF_ADAPTERS = (
    "adapter_config.json",
    *(f"{stem}{suffix}" for stem in _STEMS_OF_ADAPTERS for suffix in (".safetensors", ".bin")),
)


def resolve_model(name: str | Path) -> Path:
    """Find a model: a folder, Mezzotint's own or of diffusers, a finished run, or a single file.

    Args:
        name: A path; or, where no model is at it, the name of a shipped model.

    Returns:
        The folder that holds ``model_index.json``, or the file.

    Raises:
        CheckpointError: If there is no model, or a shipped one is damaged; it says what is there
            instead, or what is near.
    """
    path = Path(name)
    if path.is_file():
        return _single_file(path)
    for candidate in (path, path / "model"):
        if (candidate / INDEX).is_file():
            return candidate
    if (shipped := find_shipped(str(name))) is not None:
        return shipped
    if path.is_dir():
        raise CheckpointError(f"{path}: {_instead(path)}")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    models = [s for s in siblings if _holds_model(path.parent / s)]
    models += shipped_names() if str(name) == path.name else []
    hint = f"; {nearest(path.name, models)}" if models else ""
    kind = "file" if path.suffix in SINGLE_FILES else "model folder"
    raise CheckpointError(f"{path}: no such {kind}{hint}")


def _single_file(path: Path) -> Path:
    if path.suffix in SINGLE_FILES:
        return path
    if path.name == INDEX:
        raise CheckpointError(f"{path}: this is a model's index; name its folder, {path.parent}")
    raise CheckpointError(
        f"{path}: no model; expected a folder with {INDEX}, or a file named"
        f" {' or '.join(f'*{suffix}' for suffix in SINGLE_FILES)}"
    )


def _instead(path: Path) -> str:
    """What a folder holds that is no model."""
    if any((folder / name).is_file() for folder in (path, path / "model") for name in _OF_ADAPTERS):
        return "this is an adapter and no model; give it with --adapter beside a model"
    if (path / "checkpoints").is_dir():
        return "this run is not finished; go on with mezzotint train … --resume"
    files = sorted(p.name for p in path.iterdir() if p.suffix in SINGLE_FILES and p.is_file())
    if (path / "config.json").is_file():
        parent = f"; the model is {path.parent}" if (path.parent / INDEX).is_file() else ""
        return f"this is one component of a model{parent}"
    if len(files) == 1:
        return f"no {INDEX} here, but one file; name the file itself: {path / files[0]}"
    if files:
        return f"no {INDEX} here, but several files; name one of them: {', '.join(files)}"
    return f"no model here: expected {INDEX} in it or in its model/"


def _holds_model(path: Path) -> bool:
    if path.is_file():
        return path.suffix in SINGLE_FILES
    return (path / INDEX).is_file() or (path / "model" / INDEX).is_file()
