"""Tensors that are computed once and kept in a folder, each under what it was made from."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mezzotint.data.latent_store import (
    LatentShard,
    Place,
    find_shards,
    read_shard,
    remove_remains,
    verify_shard,
    write_shard,
)
from mezzotint.errors import CheckpointError, DataError

__all__ = ["CacheReport", "KeptTensors", "Peers", "keep_tensors"]

T = TypeVar("T")

_SHARD = 64 << 20  # bytes; as much is lost at most by whoever is stopped


class Peers(Protocol):
    """The processes that build a cache together."""

    @property
    def rank(self) -> int:
        """Of this process."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    def gather_values(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks."""
        ...


class _Alone:
    rank = 0
    world = 1

    def gather_values(self, value: T) -> list[T]:
        return [value]


@dataclass(frozen=True)
class CacheReport:
    """What became of a cache when it was opened.

    Attributes:
        kept: Tensors that were there, of those asked for.
        encoded: Tensors that were computed, by all processes.
        damaged: What was wrong with shards; what they held was computed anew.
        unused: Tensors in the folder that were not asked for.
    """

    kept: int
    encoded: int
    damaged: list[str] = field(default_factory=list[str])
    unused: int = 0


class KeptTensors:
    """Tensors in the order of their keys, mapped from the disk.

    Args:
        shards: Hold them.
        keys: Of the tensors; the same may come several times.

    Attributes:
        key: Hash of all keys.
        unused: The shards that hold none of them.

    Raises:
        DataError: If one is in no shard.
    """

    def __init__(self, shards: Sequence[LatentShard], keys: Sequence[str]) -> None:
        self.key = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        self._shards = shards
        where = {key: number for number, shard in enumerate(shards) for key in shard.places}
        missing = sum(key not in where for key in keys)
        if missing:
            raise DataError(
                f"{missing:,} tensors are not in the cache, though they were just written;"
                " do the processes see one folder?"
            )
        # numbers and not names: there may be millions
        self._numbers = np.array([where[key] for key in keys], np.int32)
        places = [shards[where[key]].places[key] for key in keys]
        self._starts = np.array([place.start for place in places], np.int64)
        kinds = {(place.dtype, place.shape): number for number, place in enumerate(places)}
        self._kinds = [*kinds]
        numbers = {kind: number for number, kind in enumerate(self._kinds)}
        self._kind = np.array([numbers[place.dtype, place.shape] for place in places], np.int32)
        used = set(self._numbers.tolist())
        self.unused = [shard.path for number, shard in enumerate(shards) if number not in used]
        for shard in shards:
            shard.places = {}

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, place: int) -> Tensor:
        """Return a tensor, in float32 on the CPU, whatever it is kept in.

        Args:
            place: Of its key, from 0.
        """
        dtype, shape = self._kinds[self._kind[place]]
        shard = self._shards[self._numbers[place]]
        return shard.read(Place(int(self._starts[place]), dtype, shape)).float()


def keep_tensors(
    folder: Path,
    prefix: str,
    keys: Sequence[str],
    make: Callable[[Sequence[tuple[str, int]]], Iterable[tuple[str, Tensor]]],
    *,
    dtype: torch.dtype = torch.float32,
    peers: Peers | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[KeptTensors, CacheReport]:
    """Compute the tensors that aren't kept yet, and open all.

    Every shard is read once and held against its checksum; a damaged one is deleted, and what it
    held computed anew.

    Args:
        folder: Where they are kept; runs may share it.
        prefix: What the names of the shards begin with; those of others are left alone.
        keys: Hashes of all that each tensor is made from, in the order in which they are asked
            for.
        make: Called with pairs of a key and its place among ``keys``; gives the tensor of each
            key, on the CPU, in any order.
        dtype: float32 or float16.
        peers: The processes that share the work, each of which writes shards of its own.
        on_progress: Called with (tensors done, tensors to be made), of this process.

    Raises:
        DataError: If a value is beyond what float16 can hold.
        OSError: If the folder cannot be written.
    """
    peers = peers or _Alone()
    damaged = _drop_damaged(folder, prefix, peers)
    there = {key for shard in _open(folder, prefix, peers) for key in shard.places}
    missing = {key: place for place, key in enumerate(keys) if key not in there}
    own = list(missing.items())[peers.rank :: peers.world]
    written: dict[str, Tensor] = {}
    size = 0
    for done, (key, tensor) in enumerate(make(own), start=1):
        written[key] = _narrowed(tensor, dtype)
        size += written[key].nbytes
        if size >= _SHARD or done == len(own):
            write_shard(folder, written, prefix)
            written, size = {}, 0
        if on_progress is not None:
            on_progress(done, len(own))
    peers.gather_values(None)  # until all have written
    unused = len(there - set(keys))
    report = CacheReport(len(set(keys)) - len(missing), len(missing), damaged, unused)
    return KeptTensors(_open(folder, prefix, peers), keys), report


def _drop_damaged(folder: Path, prefix: str, peers: Peers) -> list[str]:
    """Delete the shards that are damaged; every process reads its part of them."""
    names = peers.gather_values(find_shards(folder, prefix))[0]
    own = {name: verify_shard(folder / name) for name in names[peers.rank :: peers.world]}
    told = {name: fault for part in peers.gather_values(own) for name, fault in part.items()}
    damaged = {name: fault for name, fault in told.items() if fault is not None}
    if peers.rank == 0:
        remove_remains(folder, prefix)
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
    peers.gather_values(None)  # until they are gone
    return [damaged[name] for name in sorted(damaged)]


def _open(folder: Path, prefix: str, peers: Peers) -> list[LatentShard]:
    """Open all shards; those that other processes of another run write or delete are their own."""
    shards: list[LatentShard] = []
    for name in peers.gather_values(find_shards(folder, prefix))[0]:
        with contextlib.suppress(CheckpointError):
            shards.append(read_shard(folder / name))
    return shards


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    turned = tensor.to(dtype)
    if not bool(turned.isfinite().all()) and bool(tensor.isfinite().all()):
        raise DataError(
            f"a value of {float(tensor.abs().max()):,.0f} is beyond what float16 holds; set"
            " latent_precision: float32"
        )
    return turned
