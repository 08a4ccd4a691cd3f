"""A folder of encoded images and texts, each under the hash of what it was made from.

A shard is a safetensors file of some tens of MiB whose tensors are named by their keys; its
metadata hold the SHA-256 of everything after the header. It is written to a temporary name, synced
and renamed, and never changed.
"""

import hashlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.storage.safetensors_file import Entry, read_header, write_safetensors

__all__ = [
    "LATENTS",
    "TEXTS",
    "LatentShard",
    "Place",
    "find_shards",
    "read_shard",
    "remove_remains",
    "verify_shard",
    "write_shard",
]

LATENTS, TEXTS = "latents-", "texts-"  # what the names of shards begin with
_CHUNK = 1 << 20
_OLD = 3600.0  # seconds after which nobody is still writing a file


class Place(NamedTuple):
    """Where a tensor lies in a shard."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class LatentShard:
    """A shard that is mapped into memory: what was read of it may be dropped again by the system.

    Args:
        path: The file.
        places: Of its tensors, by their keys.
    """

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self.path, self.places = path, places
        # no file stays open for it, so there may be thousands
        self._bytes = torch.from_file(
            str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
        )

    def read(self, place: Place) -> Tensor:
        """Return a copy of a tensor."""
        size = place.dtype.itemsize * math.prod(place.shape)
        content = self._bytes[place.start : place.start + size].clone()
        return content.view(place.dtype).view(place.shape)


def find_shards(folder: Path, prefix: str = LATENTS) -> list[str]:
    """Return the names of the shards of a folder, which need not exist."""
    return sorted(path.name for path in folder.glob(f"{prefix}*.safetensors"))


def read_shard(path: Path) -> LatentShard:
    """Open a shard by its header.

    Raises:
        CheckpointError: If the header is damaged.
    """
    tensors, _ = read_header(path)
    return LatentShard(
        path, {key: Place(t.storage.start, t.dtype, t.shape) for key, t in tensors.items()}
    )


def verify_shard(path: Path) -> str | None:
    """Read a shard from its beginning to its end.

    Returns:
        What is wrong with it, if anything.
    """
    try:
        tensors, metadata = read_header(path)
        start = min((t.storage.start for t in tensors.values()), default=0)
        digest = hashlib.sha256(repr(sorted(tensors)).encode())
        with path.open("rb") as file:
            file.seek(start)
            while part := file.read(_CHUNK):
                digest.update(part)
    except (CheckpointError, OSError) as error:
        return str(error)
    if digest.hexdigest() != metadata.get("sha256"):
        return f"{path}: its bytes are not those that were written"
    return None


def write_shard(folder: Path, tensors: Mapping[str, Tensor], prefix: str = LATENTS) -> Path:
    """Write a shard, whole or not at all.

    Args:
        folder: Is made if it isn't there.
        tensors: By their keys, all of one type.
        prefix: What its name begins with.

    Raises:
        OSError: If it cannot be written.
    """
    digest = hashlib.sha256(repr(sorted(tensors)).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    name = hashlib.sha256(repr(sorted(tensors)).encode()).hexdigest()[:24]
    path = folder / f"{prefix}{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    entries: list[Entry] = [
        (key, tensor.dtype, tuple(tensor.shape), tensor.clone) for key, tensor in tensors.items()
    ]
    try:
        write_safetensors(temporary, entries, {"sha256": digest.hexdigest()})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def remove_remains(folder: Path, prefix: str = LATENTS) -> None:
    """Delete what processes that were killed have left half written."""
    for path in folder.glob(f"{prefix}*.tmp"):
        if time.time() - path.stat().st_mtime > _OLD:
            path.unlink(missing_ok=True)
