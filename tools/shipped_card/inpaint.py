"""How well a shipped inpainting model draws under masks what a caption says and the rest shows."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.masks import draw_mask
from mezzotint.data.portraits import PortraitsData, portrait_caption
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import perceptual_metric
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.sampling import to_images
from mezzotint.rng import keyed_generator
from mezzotint.studies.conditions.measures import diffusion_fill
from tools.shipped_card.scoring import (
    Asked,
    Card,
    concept_accuracy,
    draw,
    floats,
    pixels,
    portraits_of,
    recipe_of,
)

__all__ = ["card"]

_FRAME = 0.06  # of the side, that is left around what hides an emoji
_COLUMNS, _ROWS = 8, 2
_MASKED = (255, 0, 255)
_KEY = 0x5CA  # of the masks


def card(pipeline: Pipeline, folder: Path, stage: str, most: int) -> Card:
    """Measure a model that draws under masks, and draw some; see `tools.shipped_card.text.card`."""
    recipe = recipe_of(folder, stage)
    data, validation = portraits_of(recipe)
    labels = evenly(min(most, len(data.concepts)), len(data.concepts))
    asked = [Asked(k, data.held_out_colour(k)) for k in labels]
    named = _hidden(pipeline, data, asked, named=True)
    unnamed = _hidden(pipeline, data, asked, named=False)
    ours = [validation.load(k) for k in range(min(most, len(validation)))]
    masks = [
        draw_mask(recipe.masks, *e.image.shape[1:], keyed_generator(_KEY, k))
        for k, e in enumerate(ours)
    ]
    real = floats([example.image for example in ours])
    fields = [
        {"prompt": e.caption or "", "image": to_images(e.image[None])[0], "mask": _picture(m)}
        for e, m in zip(ours, masks, strict=True)
    ]
    drawn = floats([pixels(image) for image in _draw(pipeline, fields)])
    hidden = torch.stack(masks) >= 0.5
    changed = float((drawn - real).abs().masked_fill(hidden, 0.0).max()) * 127.5
    numbers = {
        "hidden": concept_accuracy(data, asked, named),
        "hidden_without_caption": concept_accuracy(data, asked, unnamed),
        "distance": _distance(drawn, real),
        "distance_of_diffusion_fill": _distance(diffusion_fill(real, hidden), real),
        "changed_outside": round(changed, 3),
        "pictures": len(ours),
    }
    rows = [
        (
            "right concept among 64, all of it hidden, on the colour held out of it",
            f"{numbers['hidden']:.1%}",
        ),
        ("the same without a caption", f"{numbers['hidden_without_caption']:.1%}"),
        (
            f"perceptual distance to the picture that was masked ({len(ours)} random masks)",
            f"{numbers['distance']:.3f}",
        ),
        (
            "the same of a fill by diffusion of heat",
            f"{numbers['distance_of_diffusion_fill']:.3f}",
        ),
        ("largest change outside the masks, of 255", f"{changed:.0f}"),
    ]
    limits = [
        "Limits: pictures like its training's, one emoji of the trained concepts on a plain",
        "colour, at 64 pixels.",
    ]
    shown = "What is masked (magenta), and what was drawn there under the caption:"
    return Card(numbers, rows, limits, shown, _sheet(fields, drawn, [e.caption for e in ours]))


def _hidden(
    pipeline: Pipeline, data: PortraitsData, asked: list[Asked], *, named: bool
) -> list[Tensor]:
    """Let emoji be drawn that are hidden but for the edge of their background."""
    side = data.config.resolution
    mask = torch.zeros(1, side, side)
    frame = max(1, round(_FRAME * side))
    mask[:, frame:-frame, frame:-frame] = 1.0
    fields = [
        {
            "prompt": portrait_caption(data.concepts[a.label], a.colour, a.style) if named else "",
            "image": to_images(data.picture(data.plain(a.label, a.colour, a.style))[None])[0],
            "mask": _picture(mask),
        }
        for a in asked
    ]
    return [pixels(image) for image in _draw(pipeline, fields)]


def _draw(pipeline: Pipeline, fields: list[dict[str, Any]]) -> list[Image.Image]:
    pictures = InputPictures()
    told = [
        {**each, "image": pictures.add(each["image"]), "mask": pictures.add(each["mask"])}
        for each in fields
    ]
    return draw(pipeline, told, pictures)


def _picture(mask: Tensor) -> Image.Image:
    return Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())


def _distance(images: Tensor, real: Tensor) -> float:
    distance = perceptual_metric()
    parts = zip(images.split(32), real.split(32), strict=True)
    return float(torch.cat([distance(ours, theirs) for ours, theirs in parts]).mean())


def _sheet(fields: list[dict[str, Any]], drawn: Tensor, captions: list[str | None]) -> Image.Image:
    """Rows of what was masked, each above a row of what was drawn."""
    images: list[Image.Image] = []
    labels: list[str] = []
    chosen = evenly(min(_COLUMNS * _ROWS, len(fields)), len(fields))
    for start in range(0, len(chosen), _COLUMNS):
        part = chosen[start : start + _COLUMNS]
        for k in part:
            masked = fields[k]["image"].copy()
            masked.paste(_MASKED, mask=fields[k]["mask"])
            images.append(masked)
        shown = ((drawn[part].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images += to_images(shown)
        labels += [""] * len(part) + [captions[k] or "" for k in part]
    return image_grid(images, columns=min(_COLUMNS, len(chosen)), labels=labels, scale=2)
