"""Latents of a data set, encoded once and kept, each under what it was made from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.data.base import ContentAddressed, Example, ImageData
from mezzotint.data.kept import CacheReport, KeptTensors, Peers, keep_tensors
from mezzotint.data.latent_store import LATENTS
from mezzotint.latent_diffusion import (
    FirstStage,
    LatentNormalization,
    encode_moments,
    fingerprint,
)
from mezzotint.rng import keyed_generator

__all__ = ["LatentCache", "build_latent_cache", "load_view"]

_BATCH = 32


class LatentCache:
    """Moments of every image under several augmentations, mapped from the disk.

    Args:
        kept: Of every view of every image, image by image.
        views: How many views K an image has; 0 is the plain one.
        report: What became of the cache.

    Attributes:
        key: Hash of all keys.
        unused: The shards that hold nothing of these data.
    """

    def __init__(self, kept: KeptTensors, views: int, report: CacheReport) -> None:
        self.views, self.report = views, report
        self.key, self.unused = kept.key, kept.unused
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept) // self.views

    def moments(self, index: int, view: int) -> Tensor:
        """Return ``(C', h, w)`` float32 on the CPU, as `encode_moments` gave it.

        Args:
            index: Of the image.
            view: From 0 to K - 1.
        """
        return self._kept.read(index * self.views + view)


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
    keys = _keys(data, variants, seed, _stage_key(first_stage, normalization, dtype))

    def load(place: int) -> Example:
        return load_view(data, place // variants, place % variants, seed)

    def make(views: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Tensor]]:
        return _encode(views, load, first_stage, device)

    kept, report = keep_tensors(
        folder, LATENTS, keys, make, dtype=dtype, peers=peers, on_progress=on_progress
    )
    return LatentCache(kept, variants, report)


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
