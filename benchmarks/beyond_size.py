"""Super-resolution far beyond the size that a model was trained at: memory, time and seams.

    python -m benchmarks.beyond_size MODEL PHOTO … [--side 512] [--output docs/results/beyond-size]

MODEL is a run or model folder of super-resolution, ``emoji-super-resolution-x2`` for example. Each
photograph is enlarged to ``--side`` pixels by Lanczos, and the model draws it at twice that: in
tiles, and once more as a whole. Printed are the peak of memory above that of the process with the
model loaded, and how steep the picture is across the borders of tiles beside how steep it is
elsewhere. A photograph has edges of its own where a border happens to lie, so that this is
compared with the same lines of the same picture drawn without tiles. ``beyond-size.md`` says the
same, with a cut of each picture; the pictures themselves go to ``runs/beyond-size``. Linux only.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mezzotint.evaluation.grids import labelled_rows
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.tiling import tile_borders, tile_of
from mezzotint.studies.machine import Machine, this_machine

MEMORY_LIMIT, SEAM_LIMIT = 3.0, 0.05  # GiB, share
PICTURES = Path("runs/beyond-size")
CUT = 384  # pixels of what is shown of each picture


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


def cut_square(path: Path, side: int) -> Image.Image:
    """Return the middle of a photograph as a square of so many pixels."""
    with Image.open(path) as photo:
        square = min(photo.size)
        left, top = (photo.width - square) // 2, (photo.height - square) // 2
        box = (left, top, left + square, top + square)
        return photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box=box)


def steepness_at_borders(picture: Image.Image, factor: int, tile: int) -> list[float]:
    """Return how steep a picture is across borders, over how steep it is elsewhere, by axis."""
    ratios: list[float] = []
    for axis, length in enumerate((picture.height, picture.width)):
        borders = sorted(
            {
                *tile_borders(length // factor, factor),
                *tile_borders(length // factor, factor, tile=tile, overlap=tile // 4),
            }
        )
        across, elsewhere = steepness(picture, borders, axis)
        ratios.append(across / elsewhere)
    return ratios


def draw(pipeline: Pipeline, small: Image.Image, steps: int, *, tiled: bool) -> Image.Image:
    """Draw a photograph at twice its size, in agreement with it."""
    return pipeline.generate(
        image=small,
        seed=0,
        steps=steps,
        spacing="trailing",
        back_projection=8,
        tiled_sampling=tiled,
        tiled_decoding=tiled,
    )[0].image


def sheet(
    small: list[Image.Image], tiled: list[Image.Image], whole: list[Image.Image]
) -> Image.Image:
    """Show the middle of each picture, whose tiles meet there."""

    def cut(picture: Image.Image) -> Image.Image:
        left, top = (picture.width - CUT) // 2, (picture.height - CUT) // 2
        return picture.crop((left, top, left + CUT, top + CUT))

    enlarged = [
        p.resize(d.size, Image.Resampling.BICUBIC) for p, d in zip(small, tiled, strict=True)
    ]
    rows = {"bicubic": enlarged, "in tiles": tiled, "as a whole": whole}
    return labelled_rows({name: [cut(p) for p in pictures] for name, pictures in rows.items()})


def page(result: dict[str, Any]) -> str:
    """Say in Markdown what was measured."""
    machine = Machine(**result["machine"])
    lines = [
        "# Beyond the training size",
        "",
        "Printed by `python -m benchmarks.beyond_size MODEL PHOTO …`: a model of super-resolution"
        f" that was trained at {result['trained']} pixels draws {len(result['photos'])} photographs"
        f" at {result['drawn'][0]} from {result['side']}, in {result['steps']} steps, in tiles and"
        f" as a whole. On {machine.processor}, {machine.threads} threads, {machine.precision}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| memory above the loaded model, in tiles (at most {MEMORY_LIMIT:.0f} GiB) |"
        f" {result['gib_above_model']:.2f} GiB |",
        f"| seconds a picture, in tiles | {result['seconds']:.0f} |",
    ]
    lines += [
        f"| steepness across borders of tiles over the same lines drawn as a whole, between {axis}"
        f" (within {SEAM_LIMIT:.0%}) | {result[f'excess_{axis}']:+.1%} |"
        for axis in ("rows", "columns")
    ]
    return "\n".join([*lines, "", "![The middle of each picture](beyond-size.webp)", ""])


def main() -> None:
    """Draw, measure, print, and write the pictures and ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--side", type=int, default=512, help="of the small picture, in pixels")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("docs/results/beyond-size"))
    options = parser.parse_args()
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    pipeline = load(options.model)
    factor = pipeline.model.first_stage.factor
    tile = tile_of(*pipeline.model.latent_shape(*pipeline.model.image_size)[1:])
    small = [cut_square(photo, options.side) for photo in options.photos]

    before, begun = resident(), time.perf_counter()
    tiled = [draw(pipeline, picture, options.steps, tiled=True) for picture in small]
    seconds = (time.perf_counter() - begun) / len(small)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"{options.side} to {tiled[0].width} pixels in {seconds:.0f} s on"
        f" {torch.get_num_threads()} threads; {peak - before:.2f} GiB above the loaded model"
        f" (at most {MEMORY_LIMIT} is expected)"
    )

    whole = [draw(pipeline, picture, options.steps, tiled=False) for picture in small]
    seams = np.array([steepness_at_borders(picture, factor, tile) for picture in tiled])
    without = np.array([steepness_at_borders(picture, factor, tile) for picture in whole])
    excess = (seams / without).mean(0) - 1
    for axis, lines in enumerate(("rows", "columns")):
        console.print(
            f"between {lines}, across borders over elsewhere: {seams[:, axis].mean():.3f} in tiles,"
            f" {without[:, axis].mean():.3f} at the same lines without tiles:"
            f" {excess[axis]:+.1%} (within {SEAM_LIMIT:.0%} is expected)"
        )
    for photo, picture, ours, plain in zip(options.photos, small, tiled, whole, strict=True):
        picture.save(PICTURES / f"{photo.stem}-small.png")
        ours.save(PICTURES / f"{photo.stem}-tiles.png")
        plain.save(PICTURES / f"{photo.stem}-whole.png")
    sheet(small, tiled, whole).save(options.output / "beyond-size.webp", quality=85)
    result = {
        "trained": pipeline.model.image_size[0],
        "steps": options.steps,
        "machine": this_machine(pipeline.execution).model_dump(),
        "side": options.side,
        "drawn": list(tiled[0].size),
        "photos": [photo.name for photo in options.photos],
        "seconds": seconds,
        "gib_above_model": peak - before,
        "at_borders": {
            lines: {"tiles": seams[:, axis].tolist(), "whole": without[:, axis].tolist()}
            for axis, lines in enumerate(("rows", "columns"))
        },
        "excess_rows": excess[0],
        "excess_columns": excess[1],
    }
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "beyond-size.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
