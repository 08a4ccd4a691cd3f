"""Where adapters are found by their names, and what was read of them lately."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from mezzotint.checkpoints.embeddings import Embedding, is_embedding, load_embedding
from mezzotint.checkpoints.lora import LoraAdapter, lora_files, read_lora
from mezzotint.errors import CheckpointError, RequestError, nearest
from mezzotint.storage.tensors import PICKLES

__all__ = ["VARIABLE", "adapter_folders", "find_adapter", "load_adapter"]

VARIABLE = "MEZZOTINT_ADAPTERS"
_DEFAULT = Path("adapters")
_SUFFIXES = (".safetensors", *PICKLES)
_EMBEDDING = "learned_embeds.safetensors"
_KEPT = 4  # adapters in memory; those of public models have 2 to 150 MB


def adapter_folders() -> tuple[Path, ...]:
    """Return where adapters are looked for: the folders that MEZZOTINT_ADAPTERS lists.

    They are separated as in PATH; without it, the folder ``adapters`` is meant.
    """
    listed = os.environ.get(VARIABLE, "")
    return tuple(Path(f) for f in listed.split(os.pathsep) if f) or (_DEFAULT,)


def find_adapter(name: str, folders: Sequence[Path] | None = None) -> Path:
    """Find an adapter.

    Args:
        name: The path of a file, of an adapter's folder or of the run that trained it; or a name
            in the folders, with or without suffix, with or without the sub-folder that it lies in.
        folders: Where to look, the first one first; by default `adapter_folders`.

    Raises:
        RequestError: If there is none, or several of that name in one folder; or if the name leads
            out of the folders.
    """
    trained = Path(name) / "model"
    for path in (Path(name), trained, trained / _EMBEDDING):
        if _is_adapter(path):
            return path
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if ".." in flavour.parts or flavour.is_absolute() or flavour.drive:
            raise RequestError(
                f"adapter {name!r}: no such file; expected a path that exists, or a name in the"
                " folders of adapters"
            )
    folders = adapter_folders() if folders is None else folders
    known: set[str] = set()
    for folder in folders:
        paths = list(_adapters(folder))
        # by the whole path, and only then by the name alone
        for called in (lambda p, f=folder: p.relative_to(f).as_posix(), lambda p: p.name):
            found = [path for path in paths if name in (called(path), _bare(called(path)))]
            if len(found) == 1:
                return found[0]
            if found:
                places = ", ".join(path.relative_to(folder).as_posix() for path in found)
                raise RequestError(f"adapter {name!r}: {folder} has several: {places}")
        known |= {_bare(path.relative_to(folder).as_posix()) for path in paths}
    looked = ", ".join(str(folder) for folder in folders)
    hint = nearest(name, known) if known else f"there is none; {VARIABLE} says where else to look"
    raise RequestError(f"adapter {name!r}: not in {looked}; {hint}")


def load_adapter(path: Path) -> LoraAdapter | Embedding:
    """Read a LoRA or an embedding, whichever it is; the last few are kept until they change.

    Raises:
        CheckpointError: If it is damaged or is neither.
    """
    files = lora_files(path)
    try:
        stamps = tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in (f.stat() for f in files))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _load(path.absolute(), stamps)


@lru_cache(maxsize=_KEPT)
def _load(path: Path, _: tuple[tuple[int, int, int], ...]) -> LoraAdapter | Embedding:
    if path.is_file() and is_embedding(path):
        return load_embedding(path)
    return read_lora(path)


def _is_adapter(path: Path) -> bool:
    try:
        if path.is_dir():
            return bool(lora_files(path))
        return path.suffix in _SUFFIXES and path.is_file()
    except (CheckpointError, OSError, ValueError):  # such as a name that is too long for a file
        return False


def _adapters(folder: Path) -> Iterator[Path]:
    """All adapters in a folder and its sub-folders, in order."""
    for place, subfolders, files in os.walk(folder):
        subfolders.sort()
        here = Path(place)
        if here != folder and _is_adapter(here):
            subfolders.clear()
            yield here
            continue
        for file in sorted(files):
            if Path(file).suffix in _SUFFIXES:
                yield here / file


def _bare(name: str) -> str:
    return next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
