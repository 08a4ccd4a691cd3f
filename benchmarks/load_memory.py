"""Loading a model and drawing one picture: the peak of memory of the process.

    python -m benchmarks.load_memory MODEL [--make] [--against diffusers] [--precision bfloat16]

MODEL is a folder or a single file. With ``--make`` it is a folder that is written first, unless it
is there: float16, of Stable Diffusion 1.5's shape, random (2.1 GB). Loads it and draws ``--side``
pixels in ``--steps`` steps with guidance, in a process of its own, and for comparison another in
which diffusers does the same, for which MODEL must be a folder. Memory is what is resident: of the
process's own and of files that it has mapped, libraries' and weights' alike (``RssAnon`` and
``RssFile``; ``ru_maxrss`` counts so too). Printed are the peaks while loading and while drawing,
and what stood before, which is Python, the packages and no model. Linux only.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.processes import answer, child, forget_peak, status

LIMIT = 3.6  # GB; Stable Diffusion 1.5, 512 x 512 pixels, in bfloat16
MODULE = "benchmarks.load_memory"
PROMPT, NEGATIVE, SCALE = "a red apple on a table", "blurry", 7.5


def make(folder: str) -> dict[str, Any]:
    """Write a model of random float16 weights, holding each once."""
    from mezzotint.checkpoints.pipelines import save_pipeline
    from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
    from mezzotint.conditioning.vocabularies import clip_tokenizer
    from mezzotint.diffusion.schedule import ScheduleConfig
    from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
    from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
    from mezzotint.models.unet import UNet, UNetConfig

    with torch.device("meta"):
        parts = (
            AutoencoderKL(AutoencoderKLConfig()),
            UNet(UNetConfig()),
            ClipConditioner(ClipConditionerConfig(), clip_tokenizer()),
        )
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        fill(part, generator)
    schedule = ScheduleConfig(steps_offset=1, set_alpha_to_one=False)
    scale = LatentNormalization.from_scale_factor(0.18215)
    save_pipeline(LatentDiffusion(*parts, schedule, scale, (512, 512)), Path(folder))
    return {}


def fill(part: nn.Module, generator: torch.Generator) -> None:
    """Give a part random weights, at which values keep their size."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in part.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            noise /= math.prod(value.shape[1:]) ** 0.5
        else:
            noise = 0.1 * noise + ("norm" in name and "weight" in name)
        weights[name] = noise.half()
    part.load_state_dict(weights, assign=True)


def mezzotint(model: str, precision: str, side: int, steps: int) -> dict[str, Any]:
    """Load and draw with Mezzotint."""
    from transformers import CLIPTextModel  # noqa: F401, what loading would import

    from mezzotint.generation.pipeline import load

    before, begun = forget_peak(), time.perf_counter()
    pipeline = load(model, "cpu", precision)
    loaded, seconds = status("VmHWM"), time.perf_counter() - begun
    at_rest = forget_peak()
    pipeline.generate(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=steps,
        guidance_scale=SCALE,
        width=side,
        height=side,
    )
    return told(before, loaded, at_rest, seconds)


def diffusers(model: str, precision: str, side: int, steps: int) -> dict[str, Any]:
    """Load and draw with diffusers."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel  # noqa: F401

    before, begun = forget_peak(), time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=getattr(torch, precision), local_files_only=True
    )
    loaded, seconds = status("VmHWM"), time.perf_counter() - begun
    at_rest = forget_peak()
    with torch.inference_mode():
        pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=steps,
            guidance_scale=SCALE,
            width=side,
            height=side,
        )
    return told(before, loaded, at_rest, seconds)


def told(before: float, loaded: float, at_rest: float, seconds: float) -> dict[str, Any]:
    """Return what was measured, the peak of drawing being that since loading."""
    mib = {
        "before": before,
        "loading": loaded,
        "loaded": at_rest,
        "drawing": status("VmHWM"),
        "anonymous": status("RssAnon"),
    }
    gb = {f"{name}_gb": value * 2**20 / 1e9 for name, value in mib.items()}
    return {**gb, "peak_gb": max(gb["loading_gb"], gb["drawing_gb"]), "load_seconds": seconds}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="runs/sd15-random")
    parser.add_argument("--make", action="store_true", help="write it first, if it is not there")
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/load-memory.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return answer(options.child, {f.__name__: f for f in (make, mezzotint, diffusers)})
    console = Console(soft_wrap=True)
    if options.make and not (Path(options.model) / "model_index.json").is_file():
        child(MODULE, make, options.model)
    results: dict[str, Any] = {}
    for run in (mezzotint, *([diffusers] if options.against else [])):
        arguments = (options.model, options.precision, options.side, options.steps)
        result = results[run.__name__] = child(MODULE, run, *arguments)
        console.print(
            f"{run.__name__}: {result['peak_gb']:.2f} GB at most; {result['before_gb']:.2f} before,"
            f" {result['loading_gb']:.2f} while loading ({result['load_seconds']:.1f} s),"
            f" {result['loaded_gb']:.2f} loaded, {result['drawing_gb']:.2f} while drawing"
        )
    if options.precision == "bfloat16":
        console.print(f"at most {LIMIT} GB is expected of Stable Diffusion 1.5 at 512 pixels")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("precision", "side", "steps")}
    settings = {"model": Path(options.model).name, **settings}
    options.output.write_text(json.dumps(settings | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
