"""Public checkpoints at full size, with random weights: inspecting, loading, and the same picture.

    python -m benchmarks.public_checkpoints [--kinds sd1 sd2-v sd1-inpainting] [--size 256]

Builds pipelines of the true architectures, writes each as a folder as diffusers does and as a
single float16 file, and measures, each in a process of its own: the time of ``mezzotint inspect
FILE``; the peak of memory of loading the file, above that of the process after its imports, beside
diffusers'; and by how much the pictures of both differ, drawn in float32 from the same noise. It
needs the extra "dev", 12 GB of disk and 16 GB of memory, and half an hour.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.processes import child, forget_peak, status
from benchmarks.random_models import build

KINDS = ("sd1", "sd2-v", "sd1-inpainting")
PROMPT, NEGATIVE, SEED, STEPS, SCALE = "a red apple on a table", "blurry", 7, 10, 7.5
INSPECT_LIMIT, MEMORY_LIMIT, PICTURE_LIMIT = 1.5, 1.25, 2


def write_file(folder: str, file: str) -> dict[str, Any]:
    """Convert a folder to a single file as it is."""
    from mezzotint.checkpoints.load import load_any
    from mezzotint.checkpoints.single_file import save_single_file

    left_out = save_single_file(load_any(Path(folder), dtype=None).model, Path(file))
    return {"left_out": left_out}


def load_ours(file: str, precision: str) -> dict[str, Any]:
    """Load a single file with Mezzotint, and say how much memory that took at most."""
    from transformers import CLIPTextModel  # noqa: F401, what loading would import

    from mezzotint.generation.pipeline import load

    before, begun = forget_peak(), time.perf_counter()
    pipeline = load(file, device="cpu", precision=precision)
    seconds = time.perf_counter() - begun
    tensors = pipeline.model.state_dict().values()
    weights = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    return {"seconds": seconds, "peak_mib": status("VmHWM") - before, "weights_mib": weights}


def load_theirs(file: str, precision: str, folder: str, name: str) -> dict[str, Any]:
    """Load a single file with diffusers, and say how much memory that took at most."""
    import diffusers
    from transformers import CLIPTextModel  # noqa: F401

    reader = getattr(diffusers, name)
    before, begun = forget_peak(), time.perf_counter()
    pipeline = reader.from_single_file(
        file, config=folder, local_files_only=True, torch_dtype=getattr(torch, precision)
    )
    seconds = time.perf_counter() - begun
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    tensors = [t for part in parts for t in part.state_dict().values()]
    weights = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    return {"seconds": seconds, "peak_mib": status("VmHWM") - before, "weights_mib": weights}


def picture_and_mask(size: int) -> tuple[Any, Any]:
    """A picture to begin from, and white where to draw."""
    from PIL import Image

    y, x = np.mgrid[0:size, 0:size]
    values = np.stack([x * 255 // size, y * 255 // size, (x + 2 * y) % 256], axis=-1)
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 4, size // 4, size // 4 * 3, size // 2))
    return Image.fromarray(values.astype(np.uint8)), mask


def draw_ours(file: str, size: int, inpainting: bool, output: str) -> dict[str, Any]:
    """Draw with Mezzotint from a single file."""
    from mezzotint.generation.pipeline import load

    pipeline = load(file, device="cpu", precision="float32")
    begun: dict[str, Any] = {"width": size, "height": size}
    if inpainting:
        begun["image"], begun["mask"] = picture_and_mask(size)
    drawn = pipeline.generate(
        PROMPT,
        negative_prompt=NEGATIVE,
        seed=SEED,
        steps=STEPS,
        guidance_scale=SCALE,
        sampler="ddim",
        spacing="leading",
        **begun,
    )
    drawn[0].image.save(output)
    return {}


def draw_theirs(folder: str, size: int, inpainting: bool, output: str) -> dict[str, Any]:
    """Draw with diffusers from the folder."""
    import diffusers
    from PIL import Image

    from mezzotint.rng import SampleNoise

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    begun: dict[str, Any] = {"width": size, "height": size}
    mask = None
    if inpainting:
        begun["image"], mask = picture_and_mask(size)
        begun |= {"mask_image": mask, "strength": 1.0}
    drawn = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=SampleNoise([SEED]).normal((4, size // 8, size // 8)),
        output_type="np",
        **begun,
    ).images[0]
    values = (drawn * 255).round().astype(np.uint8)
    if mask is not None:
        # what is kept is kept exactly by us, which diffusers leaves to its caller
        kept = np.asarray(mask) == 0
        values[kept] = np.asarray(begun["image"])[kept]
    Image.fromarray(values).save(output)
    return {}


MODULE = "benchmarks.public_checkpoints"
CHILDREN = {
    f.__name__: f for f in (build, write_file, load_ours, load_theirs, draw_ours, draw_theirs)
}


def seconds_of_inspect(file: Path) -> float:
    """Return the median time of ``mezzotint inspect``, from start to end of its process."""
    command = [str(Path(sys.executable).with_name("mezzotint")), "inspect", str(file)]
    times: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """Return by how much two pictures differ, of 255, and how varied they are."""
    from PIL import Image

    a, b = (np.asarray(Image.open(path), dtype=int) for path in (ours, theirs))
    return {"largest_difference": int(abs(a - b).max()), "contrast": float(b.std())}


def measure(kind: str, size: int, work: Path, console: Console) -> dict[str, Any]:
    """Measure one architecture."""
    folder, file = work / kind, work / f"{kind}.safetensors"
    inpainting = kind.endswith("inpainting")
    child(MODULE, build, kind, str(folder))
    result: dict[str, Any] = {"kind": kind, "size": size}
    result |= child(MODULE, write_file, str(folder), str(file))
    result["file_mib"] = file.stat().st_size / 2**20
    result["inspect_seconds"] = seconds_of_inspect(file)
    name = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    for precision in ("float32", "bfloat16"):
        ours = child(MODULE, load_ours, str(file), precision)
        theirs = child(MODULE, load_theirs, str(file), precision, str(folder), name)
        result[precision] = {
            who: told | {"peak_over_weights": told["peak_mib"] / told["weights_mib"]}
            for who, told in (("mezzotint", ours), ("diffusers", theirs))
        }
    pictures = work / f"{kind}-ours.png", work / f"{kind}-theirs.png"
    child(MODULE, draw_ours, str(file), size, inpainting, str(pictures[0]))
    child(MODULE, draw_theirs, str(folder), size, inpainting, str(pictures[1]))
    result |= difference(*pictures)
    console.print(result)
    return result


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--work", type=Path, help="where the checkpoints are written and kept")
    parser.add_argument("--output", type=Path, default=Path("runs/public-checkpoints.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        if name == "build":
            arguments[1] = Path(arguments[1])
        told = CHILDREN[name](*arguments) or {}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(told | {"process_peak_mib": peak}))
        return
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = [measure(kind, options.size, work, console) for kind in options.kinds]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    for told in results:
        ratio = told["float32"]["mezzotint"]["peak_over_weights"]
        console.print(
            f"{told['kind']}: inspect {told['inspect_seconds']:.2f} s (at most {INSPECT_LIMIT});"
            f" loading takes {ratio:.2f} x its weights (at most {MEMORY_LIMIT});"
            f" pictures differ by {told['largest_difference']} of 255 (at most {PICTURE_LIMIT})"
        )


if __name__ == "__main__":
    main()
