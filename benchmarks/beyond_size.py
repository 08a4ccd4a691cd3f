"""Super-resolution far beyond the size that a model was trained at: memory, time and seams.

    python -m benchmarks.beyond_size MODEL PHOTO [--side 512] [--output runs/beyond-size]

MODEL is a run or model folder of super-resolution, ``emoji-super-resolution-x2`` for example. The
photograph is enlarged to ``--side`` pixels by Lanczos, and the model draws it at twice that in
tiles. Printed are the peak of memory above that of the process with the model loaded, and how steep
the picture is across the borders of tiles, beside how steep it is elsewhere. Linux only.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mezzotint.generation.pipeline import load
from mezzotint.generation.tiling import tile_borders, tile_of

MEMORY_LIMIT, SEAM_LIMIT = 3.0, 0.05  # GiB, share


def resident() -> float:
    """Return the memory of this process now, in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS:")) / 2**20


def steepness(picture: Image.Image, borders: list[int], axis: int) -> tuple[float, float]:
    """Return the mean step between neighbouring pixels across borders, and everywhere else.

    Args:
        picture: Any.
        borders: First pixel after each border.
        axis: 0 for borders between rows, 1 between columns.
    """
    values = np.asarray(picture, dtype=np.float32)
    steps = np.abs(np.diff(values, axis=axis)).mean(axis=(1 - axis, 2))
    at = np.zeros(len(steps), dtype=bool)
    at[[border - 1 for border in borders]] = True
    return float(steps[at].mean()), float(steps[~at].mean())


def main() -> None:
    """Draw, measure, print, and write the pictures and ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("photo", type=Path)
    parser.add_argument("--side", type=int, default=512, help="of the small picture, in pixels")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("runs/beyond-size"))
    options = parser.parse_args()
    console = Console()
    pipeline = load(options.model)
    side = options.side
    with Image.open(options.photo) as photo:
        square = min(photo.size)
        left, top = (photo.width - square) // 2, (photo.height - square) // 2
        box = (left, top, left + square, top + square)
        small = photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box=box)
    before, begun = resident(), time.perf_counter()
    drawn = pipeline.generate(
        image=small,
        seed=0,
        steps=options.steps,
        spacing="trailing",
        tiled_sampling=True,
        tiled_decoding=True,
    )[0].image
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    factor = pipeline.model.first_stage.factor
    tile = tile_of(*pipeline.model.latent_shape(*pipeline.model.image_size)[1:])
    seams: list[float] = []
    for axis, length in enumerate((drawn.height, drawn.width)):
        borders = sorted(
            {
                *tile_borders(length // factor, factor),
                *tile_borders(length // factor, factor, tile=tile, overlap=tile // 4),
            }
        )
        across, elsewhere = steepness(drawn, borders, axis)
        seams.append(across / elsewhere)
        console.print(
            f"between {('rows', 'columns')[axis]}: {across:.3f} across {len(borders)} borders of"
            f" tiles, {elsewhere:.3f} elsewhere: {across / elsewhere - 1:+.1%}"
            f" (within {SEAM_LIMIT:.0%} is expected)"
        )
    console.print(
        f"{side} to {drawn.width} pixels in {seconds:.0f} s on {torch.get_num_threads()} threads;"
        f" {peak - before:.2f} GiB above the loaded model (at most {MEMORY_LIMIT} is expected)"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    small.save(options.output / "small.png")
    drawn.save(options.output / "drawn.png")
    result = {
        "side": side,
        "drawn": list(drawn.size),
        "seconds": seconds,
        "gib_above_model": peak - before,
        "seam_ratio_rows": seams[0],
        "seam_ratio_columns": seams[1],
    }
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
