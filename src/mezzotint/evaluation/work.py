"""The folder in which an evaluation keeps what it has done, until its card is there."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.shards import ranks, tell_failure
from mezzotint.models.weights import cache_directory

__all__ = ["CARD", "working_folder"]

CARD = "card.json"
_SETTINGS = "settings.json"
_LOCK = ".lock"


@contextlib.contextmanager
def working_folder(work: str | Path | None, settings: dict[str, Any]) -> Generator[Path]:
    """Begin in a folder, or go on in one that was begun with the same settings.

    It is one process's at a time; torchrun's ranks share the one of rank 0.

    Args:
        work: The folder. None is one in the cache folder, named after the settings; it is removed
            when all is done, and stays where it was stopped by an error.
        settings: What decides the numbers, as plain values.

    Raises:
        ConfigError: If the folder was begun with other settings, holds something else, or another
            process works there.
    """
    rank, world = ranks()
    with contextlib.ExitStack() as stack:
        folder = Path(work) if work is not None else _default(settings)
        if rank == 0:
            folder = _take(stack, folder, settings, may_move=work is None and world == 1)
            for path in (folder / CARD, *folder.glob(".left-*")):  # of an earlier run
                path.unlink(missing_ok=True)
        else:
            _claim(folder, settings)
        try:
            yield folder
        except Exception as error:
            tell_failure(folder, error)
            raise
        if work is None:
            _clear(folder)


def _default(settings: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "evaluations" / digest[:16]


def _take(
    stack: contextlib.ExitStack, folder: Path, settings: dict[str, Any], *, may_move: bool
) -> Path:
    """Claim a folder and lock it; where another process is, one beside it if that will do."""
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        _claim(place, settings)
        lock = _lock(place / _LOCK)
        if lock is not None:
            stack.enter_context(lock)
            return place
        if not may_move:
            raise ConfigError(
                f"{folder}: another evaluation is at work there; wait for it, or choose another"
                " folder by work (--work DIR)"
            )
    raise AssertionError("itertools.count never ends")


def _lock(path: Path) -> IO[bytes] | None:
    """Lock a file until it is closed, by the end of the process at the latest.

    Returns:
        The open file; None if another process has it, or has just removed it.
    """
    try:
        file = path.open("ab")
    except FileNotFoundError:
        return None
    if sys.platform == "win32":
        return file
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks
        return file
    file.close()
    return None


def _clear(folder: Path) -> None:
    """Remove a folder; of several ranks the last one does."""
    rank, world = ranks()
    if world > 1:
        (folder / f".left-{rank}").touch()
        if not all((folder / f".left-{k}").exists() for k in range(world)):
            return
    shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / _SETTINGS
    # looked for before the settings: another rank writes these first, and under a hidden name
    others = _others(folder)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(f"{path}: damaged; delete the folder or choose another work") from None
        differing = _differing(before, settings)
        if differing:
            raise ConfigError(
                f"{folder}: begun with other values of {', '.join(differing)}; choose another"
                " folder by work (--work DIR), or delete this one"
            )
    elif folder.is_file() or others:
        raise ConfigError(f"{folder}: holds something else; choose another folder by work (--work)")
    else:
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def _others(folder: Path) -> list[str]:
    """Return what is in a folder beside the settings and hidden files."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if not name.startswith(".") and name != _SETTINGS]


def _differing(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the dotted keys under which two plain values differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [key]
    first, second = cast(dict[str, Any], before), cast(dict[str, Any], now)
    return [
        name
        for part in sorted(first.keys() | second.keys())
        for name in _differing(first.get(part), second.get(part), f"{key}.{part}".lstrip("."))
    ]
