"""Latents of a data set, encoded once and kept."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mezzotint.data.base import Example, ImageData
from mezzotint.latent_diffusion import FirstStage, encode_moments, fingerprint
from mezzotint.rng import keyed_generator

__all__ = ["LatentCache", "build_latent_cache", "load_view"]

_BATCH = 32


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Moments of every image under several augmentations.

    Attributes:
        moments: ``(N, K, C', h, w)`` float32 on the CPU, as `encode_moments` gives them; variant 0
            is the plain view.
        key: Hash of data, first stage, seed and K: what else would give other latents.
    """

    moments: Tensor
    key: str


def cache_key(data: ImageData, first_stage: FirstStage, variants: int, seed: int) -> str:
    """Return the hash under which latents are kept."""
    parts = (data.fingerprint, fingerprint(first_stage.state_dict().items()), variants, seed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@torch.inference_mode()
def build_latent_cache(
    data: ImageData,
    first_stage: FirstStage,
    *,
    variants: int,
    seed: int,
    folder: Path,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode a data set, or read the latents that an earlier run kept for the very same inputs.

    Args:
        data: The images.
        first_stage: Encodes; in float32 whatever the training's precision.
        variants: Views K per image: the plain one and K - 1 augmented ones.
        seed: Keys the augmentations.
        folder: Where the latents are kept, as ``<key>.safetensors``.
        device: Where to encode.
        on_progress: Called with (images done, images in all).
    """
    key = cache_key(data, first_stage, variants, seed)
    path = folder / f"{key}.safetensors"
    try:
        return LatentCache(safetensors.torch.load_file(path)["moments"], key)
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or not whole: encode anew
    total = len(data) * variants
    encoded: list[Tensor] = []
    for start in range(0, total, _BATCH):
        images = [
            load_view(data, n // variants, n % variants, seed).image
            for n in range(start, min(total, start + _BATCH))
        ]
        pixels = torch.stack(images).to(device).float() / 127.5 - 1.0
        encoded.append(encode_moments(first_stage, pixels).float().cpu())
        if on_progress is not None:
            on_progress(min(total, start + _BATCH), total)
    moments = torch.cat(encoded).unflatten(0, (len(data), variants)).clone()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file({"moments": moments}, temporary)
    temporary.rename(path)
    return LatentCache(moments, key)


def load_view(data: ImageData, index: int, view: int, seed: int) -> Example:
    """Return an image as it is encoded for a cache.

    Args:
        data: The images.
        index: Of the image.
        view: Of the image: 0 is the plain one.
        seed: Keys the augmentations.
    """
    generator = None if view == 0 else keyed_generator(seed, 0x1A7, index, view)
    return data.load(index, generator)
