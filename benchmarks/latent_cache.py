"""Images a second that a diffusion model is fed with: from the caches, and without them.

    python -m benchmarks.latent_cache [--count 512] [--size 64] [--batch 32] [--precision float32]
        [--captions 64]

JPEG files of smooth noise are written to a temporary folder and read through the first stage of
the paper's f = 4. Building the cache, opening it again, batches from it, and batches that are
decoded and encoded each time are measured; the UNet is not, so these are the most that training
could see. With ``--captions`` the same is done of so many captions, read by an untrained text
encoder of the shape of Stable Diffusion 1's.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mezzotint.cli.progress import progress
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.vocabularies import clip_tokenizer
from mezzotint.data import FolderData, FolderDataConfig
from mezzotint.data.latents import LatentCache, build_latent_cache
from mezzotint.data.texts import build_text_cache
from mezzotint.device import select_device
from mezzotint.latent_diffusion import encode_moments
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from mezzotint.training.batches import DataOrder

SECONDS = 10.0  # that each way of feeding is measured


def write_pictures(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of 8 x 8 blocks in random colours, smoothly enlarged."""
    rng = np.random.default_rng(0)
    for k in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        blocks.resize((size * 5 // 4, size), Image.Resampling.BICUBIC).save(folder / f"{k:06d}.jpg")


def rate(feed: Callable[[int], object], batch: int) -> float:
    """Return images a second."""
    feed(0)
    begun, step = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        step += 1
        feed(step)
    return step * batch / (time.perf_counter() - begun)


def measure(options: argparse.Namespace, place: Path, device: torch.device) -> dict[str, object]:
    """Build the cache, and feed batches with it and without."""
    write_pictures(place, options.count, options.size)
    config = {"path": str(place), "resolution": options.size, "cache_limit_mib": 0}
    data = FolderData(FolderDataConfig.from_dict(config))
    stage = AutoencoderKL(
        AutoencoderKLConfig(block_out_channels=(64, 128, 256), mid_attention=False)
    )
    stage = stage.to(device).eval()
    order = DataOrder(len(data), 0)

    def build(on_progress: Callable[[int, int], None] | None = None) -> LatentCache:
        return build_latent_cache(
            data,
            stage,
            variants=1,
            seed=0,
            folder=place / "latents",
            device=device,
            dtype=getattr(torch, options.precision),
            on_progress=on_progress,
        )

    begun = time.perf_counter()
    with progress("latents") as on_progress:
        build(on_progress)
    built = time.perf_counter() - begun
    begun = time.perf_counter()
    cache = build()
    opened = time.perf_counter() - begun

    def batch_of(step: int) -> list[int]:
        return [order.index(step * options.batch + k) for k in range(options.batch)]

    def cached(step: int) -> torch.Tensor:
        return torch.stack([cache.moments(k, 0) for k in batch_of(step)]).to(device)

    @torch.inference_mode()
    def encoded(step: int) -> torch.Tensor:
        images = torch.stack([data.load(k).image for k in batch_of(step)]).to(device)
        return encode_moments(stage, images.float() / 127.5 - 1.0).cpu()

    with_cache, without = rate(cached, options.batch), rate(encoded, options.batch)
    return {
        "images": options.count,
        "size": options.size,
        "device": str(device),
        "precision": options.precision,
        "building_images_per_second": options.count / built,
        "opening_seconds": opened,
        "disk_mib": sum(p.stat().st_size for p in (place / "latents").iterdir()) / 2**20,
        "with_cache_images_per_second": with_cache,
        "without_images_per_second": without,
        "ratio": with_cache / without,
    }


def measure_texts(
    options: argparse.Namespace, place: Path, device: torch.device
) -> dict[str, object]:
    """Build the cache of texts, and make conditions with it and without."""
    captions = [f"a picture of {k} red apples" for k in range(options.captions)]
    encoder = ClipConditioner(ClipConditionerConfig(), clip_tokenizer())
    begun = time.perf_counter()
    cache = build_text_cache(
        captions,
        encoder,
        folder=place / "texts",
        device=device,
        dtype=getattr(torch, options.precision),
    )
    built = time.perf_counter() - begun

    @torch.no_grad()
    def condition(step: int, *, kept: bool) -> object:
        places = (step * options.batch + k for k in range(options.batch))
        said = [captions[place % len(captions)] for place in places]
        tokens = cache if kept else None
        cond = encoder(ConditionInputs(count=options.batch, captions=said, tokens=tokens))
        return cond.crossattn.sum().item()  # waits for the device

    with_cache = rate(partial(condition, kept=True), options.batch)
    without = rate(partial(condition, kept=False), options.batch)
    return {
        "captions": options.captions,
        "building_captions_per_second": options.captions / built,
        "text_disk_mib": sum(p.stat().st_size for p in (place / "texts").iterdir()) / 2**20,
        "with_cache_captions_per_second": with_cache,
        "without_captions_per_second": without,
        "text_ratio": with_cache / without,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["float32", "float16"], default="float32")
    parser.add_argument("--captions", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/latent-cache.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(options, Path(temporary), select_device(options.device))
        if options.captions:
            result |= measure_texts(options, Path(temporary), select_device(options.device))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(soft_wrap=True)
    console.print(result)
    console.print(
        f"{result['with_cache_images_per_second']:,.0f} images a second with the cache,"
        f" {result['without_images_per_second']:,.1f} without: {result['ratio']:,.0f} times as many"
    )
    if options.captions:
        console.print(
            f"{result['with_cache_captions_per_second']:,.0f} captions a second with the cache,"
            f" {result['without_captions_per_second']:,.1f} without"
        )


if __name__ == "__main__":
    main()
