"""The demonstration: a shipped model draws captions, half of which its training never showed."""

import time
from pathlib import Path

from rich.console import Console

from mezzotint.checkpoints.shipped import find_shipped
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig, portrait_caption
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.generate import generate_each
from mezzotint.generation.metadata import write_image
from mezzotint.generation.pipeline import load
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = ["demo_captions", "run_demo", "trained_portraits"]

MODEL, TRAINED_BY = "emoji", "text-to-image.yaml"
_PICTURES, _COLUMNS, _SCALE = 16, 8, 2


def trained_portraits(folder: Path) -> PortraitsData:
    """Return the data that a shipped model was trained on, which say what was held out.

    Args:
        folder: Its files, the recipe that it was trained by among them.

    Raises:
        ConfigError: If it was trained on others than portraits.
    """
    recipe = load_recipe(folder / TRAINED_BY)
    if not isinstance(recipe, DiffusionRecipe) or not isinstance(recipe.data, PortraitsDataConfig):
        raise ConfigError(
            f"{folder / TRAINED_BY}: expected a text model of portraits, to say what is held out"
        )
    return PortraitsData(recipe.data)


def demo_captions(data: PortraitsData, count: int) -> tuple[list[str], list[str]]:
    """Return captions of concepts from all over the data, and what to write under their pictures.

    Every other one names the colour that training held out of its concept, and says so.

    Args:
        data: What the model was trained on.
        count: How many.
    """
    labels = evenly(count, len(data.concepts))
    captions = [
        portrait_caption(data.concepts[label], data.held_out_colour(label) if n % 2 else "white")
        for n, label in enumerate(labels)
    ]
    return captions, [f"{c} *" if n % 2 else c for n, c in enumerate(captions)]


def run_demo(output: Path, console: Console | None = None) -> Path:
    """Draw sixteen pictures with the shipped model, and lay them out under their captions.

    Args:
        output: Folder of the pictures and of ``grid.png``.
        console: Where the results are shown.

    Returns:
        The grid's file.

    Raises:
        CheckpointError: If the model is not there or is damaged.
    """
    console = console or Console()
    folder = find_shipped(MODEL)
    if folder is None:
        raise CheckpointError(f"the model {MODEL!r} is not in this package; reinstall Mezzotint")
    begun = time.monotonic()
    captions, labels = demo_captions(trained_portraits(folder), _PICTURES)
    pipeline = load(folder)
    requests = [pipeline.request(prompt=caption, seed=k) for k, caption in enumerate(captions)]
    drawing = time.monotonic()
    drawn = generate_each(pipeline, requests, batch_size=_PICTURES)
    seconds = time.monotonic() - drawing
    output.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(drawn):
        write_image(item.image, item.request, output / f"{number:02d}.png")
    grid = output / "grid.png"
    pictures = [item.image for item in drawn]
    image_grid(pictures, columns=_COLUMNS, labels=labels, scale=_SCALE).save(grid)
    lines = (
        f"{_PICTURES} pictures drawn in {seconds:.1f} s, after {drawing - begun:.1f} s of loading",
        "* on a colour that training never showed this emoji on",
        f"look at the labelled grid: {grid}",
        f'now draw your own: mezzotint sample {MODEL} "a red apple on a blue background"',
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return grid
