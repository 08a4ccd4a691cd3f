"""Decoding in stripes: memory above the weights, time, and how far it is from decoding at once.

    python -m benchmarks.tiled_decode [--side 1024 2048] [--model MODEL] [--picture PHOTO]

MODEL is a model's or a run's folder, a first stage's, or a single file; without one, it is Stable
Diffusion's autoencoder with random weights, for which memory and time are the same, and differences
mean little. What is decoded is PHOTO, or a sheet of emoji, enlarged to ``--side`` and encoded whole
(for random weights, smooth noise). It is decoded at once and in stripes, in each ``--precision``,
each in a process of its own. The peak of memory is that of resident pages while decoding, above
those with the model loaded. Differences are of pixels from 0 to 255 that are not rounded. Linux
only.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks.processes import answer, child, forget_peak, status
from mezzotint.data.emoji import emoji_concepts, emoji_image
from mezzotint.device import autocast, select_precision
from mezzotint.latent_diffusion import FirstStage
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig

MEMORY_LIMITS = {1024: 1.5, 2048: 2.5}  # GB above the weights
LARGEST_LIMIT, MEAN_LIMIT = 2.0, 1.0  # of 255; the largest up to 1024 pixels, the mean beyond
MODULE = "benchmarks.tiled_decode"


def first_stage_of(model: str | None) -> FirstStage:
    """Return a model's first stage alone, in float32."""
    if model is None:
        torch.manual_seed(0)
        return AutoencoderKL(AutoencoderKLConfig()).eval()
    from mezzotint.checkpoints.first_stages import as_first_stage
    from mezzotint.checkpoints.folder import load_component
    from mezzotint.checkpoints.load import load_any

    path = Path(model)
    if (path / "config.json").is_file():
        return as_first_stage(load_component(path), path)
    return load_any(model).model.first_stage


def sheet(side: int) -> Image.Image:
    """Emoji of 128 pixels beside one another, on colours that vary slowly."""
    y, x = np.mgrid[0:side, 0:side] / side
    values = np.stack([96 + 96 * x, 96 + 96 * y, 224 - 128 * x * y], axis=-1)
    made = Image.fromarray(values.astype(np.uint8))
    concepts = emoji_concepts()
    for k, (top, left) in enumerate(np.ndindex(side // 128, side // 128)):
        if (top + left) % 3:  # some of it stays smooth, where seams would be seen
            emoji = emoji_image(concepts[k * 7 % len(concepts)])
            made.paste(emoji, (left * 128, top * 128), emoji)
    return made


@torch.inference_mode()
def encode(model: str | None, picture: str | None, side: int, output: str) -> None:
    """Write latents of a picture of this size."""
    stage = first_stage_of(model)
    if model is None:
        generator = torch.Generator().manual_seed(1)
        small = torch.randn(1, 4, side // 64, side // 64, generator=generator)
        torch.save(F.interpolate(small, scale_factor=8.0, mode="bicubic") * 4, output)
        return
    if picture is None:
        image = sheet(side)
    else:
        with Image.open(picture) as opened:
            image = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    encoded = stage.encode(values)
    torch.save(encoded if isinstance(encoded, Tensor) else encoded.mode(), output)


@torch.inference_mode()
def decode(
    model: str | None, latents: str, precision: str, in_stripes: bool, output: str
) -> dict[str, Any]:
    """Decode, and say what that took."""
    stage = first_stage_of(model)
    z = torch.load(latents)
    execution = select_precision(precision, torch.device("cpu"))
    with autocast(execution):
        stage.decode(z[..., :8, :8], in_stripes=in_stripes)  # what is made at the first call
        before, begun = forget_peak(), time.perf_counter()
        pixels = stage.decode(z, in_stripes=in_stripes)
        seconds, peak = time.perf_counter() - begun, status("VmHWM") - before
    torch.save(pixels.float(), output)
    return {"seconds": seconds, "peak_gb": peak * 2**20 / 1e9}


def difference(one: Path, other: Path) -> dict[str, float]:
    """Return by how much two pictures differ, of 255."""
    a, b = (torch.load(path).clamp(-1, 1) * 127.5 for path in (one, other))
    away = (a - b).abs()
    return {"largest": away.max().item(), "mean": away.mean().item()}


def measure(options: argparse.Namespace, side: int, work: Path) -> list[dict[str, Any]]:
    """Measure one size in every precision."""
    picture = None if options.picture is None else str(options.picture)
    latents = str(work / "latents.pt")
    child(MODULE, encode, options.model, picture, side, latents)
    results: list[dict[str, Any]] = []
    exact = None
    for precision in options.precision:
        paths = {way: work / f"{precision}-{way}.pt" for way in ("whole", "striped")}
        result: dict[str, Any] = {"side": side, "precision": precision}
        for way, path in paths.items():
            if way == "whole" and side > options.whole:
                continue
            result[way] = child(
                MODULE, decode, options.model, latents, precision, way == "striped", str(path)
            )
        if "whole" in result:
            result["difference"] = difference(*paths.values())
            exact = exact or (paths["whole"] if precision == "float32" else None)
        if exact is not None and precision != "float32":
            # how much of it is the rounding of the precision alone
            result["whole_to_float32"] = difference(paths["whole"], exact)
            result["striped_to_float32"] = difference(paths["striped"], exact)
        results.append(result)
    return results


def describe(result: dict[str, Any]) -> str:
    """Return a sentence on one size in one precision."""
    side, striped = result["side"], result["striped"]
    text = f"{side} x {side}, {result['precision']}: {striped['peak_gb']:.2f} GB above the weights"
    if side in MEMORY_LIMITS:
        text += f" (at most {MEMORY_LIMITS[side]})"
    text += f", {striped['seconds']:.1f} s"
    if "whole" in result:
        whole, away = result["whole"], result["difference"]
        text += (
            f"; at once {whole['peak_gb']:.2f} GB, {whole['seconds']:.1f} s; largest difference"
            f" {away['largest']:.3f} of 255 (at most {LARGEST_LIMIT:g} up to 1024 pixels), mean"
            f" {away['mean']:.4f} (at most {MEAN_LIMIT:g})"
        )
    if "whole_to_float32" in result:
        a, b = result["whole_to_float32"], result["striped_to_float32"]
        text += (
            f"; to float32: at once {a['largest']:.3f} and {a['mean']:.4f}, in stripes"
            f" {b['largest']:.3f} and {b['mean']:.4f}"
        )
    return text


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--model", help="without one, random weights of Stable Diffusion's shape")
    parser.add_argument("--picture", type=Path)
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
    )
    parser.add_argument(
        "--whole", type=int, default=2048, metavar="SIDE", help="decode at once too, up to this"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tiled-decode.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return answer(options.child, {f.__name__: f for f in (encode, decode)})
    console = Console(soft_wrap=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for side in options.side:
            for result in measure(options, side, Path(temporary)):
                results.append(result)
                console.print(describe(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    told = {"model": options.model or "random weights", "threads": torch.get_num_threads()}
    options.output.write_text(json.dumps(told | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
