"""Where pictures go: names from words and seeds, and nothing overwritten."""

import itertools
import re
from pathlib import Path

from mezzotint.errors import RequestError

__all__ = ["free", "picture_path", "slug"]

DEFAULT_FOLDER = Path("outputs")

_NOT_PNG = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


def slug(text: str, length: int = 48) -> str:
    """Turn words into a file name: ``"A red apple!"`` becomes ``a-red-apple``."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")
    return words[:length].rstrip("-_") or "image"


def picture_path(output: Path | None, name: str) -> Path:
    """Say where one picture goes.

    Args:
        output: What the user wrote: a file ``*.png``, a folder, or nothing for ``outputs/``.
        name: The picture's own name, without a suffix, unless ``output`` is a file.

    Returns:
        A path at which there is nothing yet.

    Raises:
        RequestError: If ``output`` names a file of another format.
    """
    folder = output or DEFAULT_FOLDER
    suffix = folder.suffix.lower()
    if suffix in _NOT_PNG and not folder.is_dir():
        raise RequestError(f"--output {folder}: pictures are written as PNG; name it *.png")
    if suffix == ".png" and not folder.is_dir():
        return free(folder)
    return free(folder / f"{name}.png")


def free(path: Path) -> Path:
    """Return ``path``, or with a number added if something is there already."""
    numbered = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
