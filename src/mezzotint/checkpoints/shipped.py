"""The models that are shipped in the package, by name."""

import hashlib
from importlib import resources
from pathlib import Path

from mezzotint.errors import CheckpointError

__all__ = ["SUMS", "check_sums", "find_shipped", "shipped_names", "write_sums"]

SUMS = "SHA256SUMS"
_FOLDER = Path(str(resources.files("mezzotint").joinpath("assets", "models")))


def shipped_names() -> list[str]:
    """Return the names of the models in the package."""
    names = (sums.parent.name for sums in _FOLDER.glob(f"*/{SUMS}"))
    return sorted(name for name in names if not name.startswith("."))  # what is half written


def find_shipped(name: str) -> Path | None:
    """Return the folder of a shipped model, its files held against their checksums.

    Args:
        name: Such as ``emoji``.

    Returns:
        None if none is called so.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    if name not in shipped_names():
        return None
    check_sums(_FOLDER / name)
    return _FOLDER / name


def check_sums(folder: Path) -> None:
    """Hold a shipped model's files against their checksums.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    for line in (folder / SUMS).read_text().splitlines():
        digest, _, file = line.partition("  ")
        path = folder / file
        if not path.is_file() or _sha256(path) != digest:
            state = "damaged" if path.is_file() else "missing"
            raise CheckpointError(f"{path}: the shipped file is {state}; reinstall Mezzotint")


def write_sums(folder: Path) -> None:
    """Write the checksums of a model's files, in the form that ``sha256sum --check`` reads.

    Args:
        folder: Of the model; what is written for people, ``*.md``, may change and has none.
    """
    left_out = {SUMS, *(path.name for path in folder.glob("*.md"))}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in left_out)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
