"""Latents of a data set, encoded once and kept, each under what it was made from."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mezzotint.data.base import ContentAddressed, Example, ImageData
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
from mezzotint.latent_diffusion import (
    FirstStage,
    LatentNormalization,
    encode_moments,
    fingerprint,
)
from mezzotint.rng import keyed_generator

__all__ = ["CacheReport", "LatentCache", "Peers", "build_latent_cache", "load_view"]

T = TypeVar("T")

_BATCH = 32
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
        kept: Views whose latents were there.
        encoded: Views that were encoded, by all processes.
        damaged: What was wrong with shards; what they held was encoded anew.
        unused: Latents in the folder that these data don't use.
    """

    kept: int
    encoded: int
    damaged: list[str] = field(default_factory=list[str])
    unused: int = 0


class LatentCache:
    """Moments of every image under several augmentations, mapped from the disk.

    Args:
        shards: Hold them.
        keys: Of every view of every image, image by image.
        views: How many views K an image has; 0 is the plain one.
        report: What became of the cache.

    Attributes:
        key: Hash of all keys.
        unused: The shards that hold nothing of these data.
    """

    def __init__(
        self,
        shards: Sequence[LatentShard],
        keys: Sequence[str],
        views: int,
        report: CacheReport,
    ) -> None:
        self.views, self.report = views, report
        self.key = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        self._shards = shards
        where = {key: number for number, shard in enumerate(shards) for key in shard.places}
        missing = sum(key not in where for key in keys)
        if missing:
            raise DataError(
                f"{missing:,} latents are not in the cache, though they were just written;"
                " do the processes see one folder?"
            )
        # numbers and not names: there may be millions of views
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
        return len(self._starts) // self.views

    def moments(self, index: int, view: int) -> Tensor:
        """Return ``(C', h, w)`` float32 on the CPU, as `encode_moments` gave it.

        Args:
            index: Of the image.
            view: From 0 to K - 1.
        """
        place = index * self.views + view
        dtype, shape = self._kinds[self._kind[place]]
        shard = self._shards[self._numbers[place]]
        return shard.read(Place(int(self._starts[place]), dtype, shape)).float()


@torch.inference_mode()
def build_latent_cache(
    data: ImageData,
    first_stage: FirstStage,
    *,
    variants: int,
    seed: int,
    folder: Path,
    device: torch.device,
    normalization: LatentNormalization | None = None,
    dtype: torch.dtype = torch.float32,
    peers: Peers | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode what isn't encoded yet of a data set, and open the whole.

    A view's key is a hash of the image's bytes, of how it is seen and of the view, and of the
    first stage's shape, weights and statistics. So an image that was edited, another crop or
    another autoencoder has other keys, and what did not change is found. Every shard is read once
    and held against its checksum; a damaged one is deleted, and what it held encoded anew.

    Moments are kept in float32 unless asked otherwise: then training on them is training on what
    the first stage gives, to the last bit but for the size of its batches. float16 halves the
    disk; it rounds a mean to 1/2048 of itself, which is far below the posterior's own deviation,
    and ends at 65,504.

    Args:
        data: The images.
        first_stage: Encodes; in float32 whatever the training's precision.
        variants: Views K per image: the plain one and K - 1 augmented ones.
        seed: Keys the augmentations.
        folder: Where the latents are kept; runs may share it.
        device: Where to encode.
        normalization: The statistics of the first stage's latents.
        dtype: float32 or float16.
        peers: The processes that share the work, each of which writes shards of its own.
        on_progress: Called with (views done, views to be encoded), of this process.

    Raises:
        DataError: If a moment is beyond what float16 can hold.
        OSError: If the folder cannot be written.
    """
    peers = peers or _Alone()
    keys = _keys(data, variants, seed, _stage_key(first_stage, normalization, dtype))
    damaged = _drop_damaged(folder, peers)
    shards = _open(folder, peers)
    there = {key for shard in shards for key in shard.places}
    missing = {key: place for place, key in enumerate(keys) if key not in there}
    own = list(missing.items())[peers.rank :: peers.world]

    def load(place: int) -> Example:
        return load_view(data, place // variants, place % variants, seed)

    written: dict[str, Tensor] = {}
    size = 0
    for done, (key, moments) in enumerate(_encode(own, load, first_stage, device), start=1):
        written[key] = _narrowed(moments, dtype)
        size += written[key].nbytes
        if size >= _SHARD or done == len(own):
            write_shard(folder, written)
            written, size = {}, 0
        if on_progress is not None:
            on_progress(done, len(own))
    peers.gather_values(None)  # until all have written
    unused = len(there - set(keys))
    report = CacheReport(len(set(keys)) - len(missing), len(missing), damaged, unused)
    return LatentCache(_open(folder, peers), keys, variants, report)


def load_view(data: ImageData, index: int, view: int, seed: int) -> Example:
    """Return an image as it is encoded for a cache.

    Args:
        data: The images.
        index: Of the image.
        view: Of the image: 0 is the plain one.
        seed: Keys the augmentations, with the content of the image where that is known: then an
            image is seen alike wherever it stands among the others.
    """
    if view == 0:
        return data.load(index)
    known = index
    if isinstance(data, ContentAddressed):
        known = int(data.content(index)[:15], 16)
    return data.load(index, keyed_generator(seed, 0x1A7, known, view))


def _keys(data: ImageData, variants: int, seed: int, stage: str) -> list[str]:
    whole = "" if isinstance(data, ContentAddressed) else data.fingerprint
    keys: list[str] = []
    for index in range(len(data)):
        # what is drawn by a rule is another as a whole, if the rule is
        known = isinstance(data, ContentAddressed)
        content = data.content(index) if known else f"{whole} {index}"
        for view in range(variants):
            parts = (stage, content, view, seed if view else None)
            keys.append(hashlib.sha256(repr(parts).encode()).hexdigest())
    return keys


def _stage_key(
    first_stage: FirstStage, normalization: LatentNormalization | None, dtype: torch.dtype
) -> str:
    tensors = [*first_stage.state_dict().items()]
    if normalization is not None:
        tensors += normalization.state_dict().items()
    shape = json.dumps(first_stage.config.to_dict(), sort_keys=True)
    return f"{shape} {fingerprint(tensors)} {dtype}"


def _drop_damaged(folder: Path, peers: Peers) -> list[str]:
    """Delete the shards that are damaged; every process reads its part of them."""
    names = peers.gather_values(find_shards(folder))[0]
    own = {name: verify_shard(folder / name) for name in names[peers.rank :: peers.world]}
    told = {name: fault for part in peers.gather_values(own) for name, fault in part.items()}
    damaged = {name: fault for name, fault in told.items() if fault is not None}
    if peers.rank == 0:
        remove_remains(folder)
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
    peers.gather_values(None)  # until they are gone
    return [damaged[name] for name in sorted(damaged)]


def _open(folder: Path, peers: Peers) -> list[LatentShard]:
    """Open all shards; those that other processes of another run write or delete are their own."""
    shards: list[LatentShard] = []
    for name in peers.gather_values(find_shards(folder))[0]:
        with contextlib.suppress(CheckpointError):
            shards.append(read_shard(folder / name))
    return shards


def _encode(
    views: Sequence[tuple[str, int]],
    load: Callable[[int], Example],
    first_stage: FirstStage,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Moments of views, in batches of one size of image."""
    waiting: dict[Any, list[tuple[str, Tensor]]] = {}
    for key, example in _ahead(views, load):
        group = waiting.setdefault(example.image.shape, [])
        group.append((key, example.image))
        if len(group) == _BATCH:
            yield from _encode_batch(waiting.pop(example.image.shape), first_stage, device)
    for group in waiting.values():
        yield from _encode_batch(group, first_stage, device)


def _encode_batch(
    group: Sequence[tuple[str, Tensor]], first_stage: FirstStage, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    pixels = torch.stack([image for _, image in group]).to(device).float() / 127.5 - 1.0
    moments = encode_moments(first_stage, pixels).float().cpu()
    for (key, _), each in zip(group, moments, strict=True):
        yield key, each.clone()


def _ahead(
    views: Sequence[tuple[str, int]], load: Callable[[int], Example]
) -> Iterator[tuple[str, Example]]:
    """Load images in threads, a batch ahead."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming: list[tuple[str, Future[Example]]] = []
        for start in range(0, len(views) + _BATCH, _BATCH):
            ready = coming
            part = views[start : start + _BATCH]
            coming = [(key, pool.submit(load, place)) for key, place in part]
            for key, future in ready:
                yield key, future.result()


def _narrowed(moments: Tensor, dtype: torch.dtype) -> Tensor:
    turned = moments.to(dtype)
    if not bool(turned.isfinite().all()) and bool(moments.isfinite().all()):
        raise DataError(
            f"a moment of {float(moments.abs().max()):,.0f} is beyond what float16 holds; set"
            " latent_precision: float32"
        )
    return turned
