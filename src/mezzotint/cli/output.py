"""Where pictures go: names from words and seeds, and nothing overwritten."""

import itertools
import re
from collections.abc import Collection
from pathlib import Path

from mezzotint.errors import RequestError
from mezzotint.generation.metadata import FORMATS

__all__ = ["free", "picture_path", "slug"]

DEFAULT_FOLDER = Path("outputs")

_OF_PICTURES = frozenset({*FORMATS, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic"})


def slug(text: str, length: int = 48) -> str:
    """Turn words into a file name: ``"A red apple!"`` becomes ``a-red-apple``."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")
    return words[:length].rstrip("-_") or "image"


def picture_path(
    output: Path | None, name: str, *, suffixes: Collection[str] = tuple(FORMATS)
) -> Path:
    """Say where one picture goes.

    Args:
        output: What the user wrote: a file, a folder for PNGs, or nothing for ``outputs/``.
        name: The picture's own name, without a suffix, unless ``output`` is a file.
        suffixes: What a file's name may end in.

    Returns:
        A path at which there is nothing yet.

    Raises:
        RequestError: If ``output`` names a picture of a format that is not written.
    """
    folder = output or DEFAULT_FOLDER
    suffix = folder.suffix.lower()
    if suffix not in _OF_PICTURES or folder.is_dir():
        return free(folder / f"{name}.png")
    if suffix not in suffixes:
        names = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise RequestError(f"--output {folder}: expected a folder, or a file named {names}")
    return free(folder)


def free(path: Path) -> Path:
    """Return ``path``, or with a number added if something is there already."""
    numbered = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
