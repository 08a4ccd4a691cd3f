"""How well a shipped model enlarges pictures, of emoji that it was trained on and of others."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.data.base import Example
from mezzotint.data.degradation import bicubic_down, degrade
from mezzotint.data.emoji import emoji_concepts
from mezzotint.data.portraits import PortraitsData
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import perceptual_metric, psnr
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.sampling import to_images
from mezzotint.rng import keyed_generator
from mezzotint.training.recipe import DiffusionRecipe
from tools.shipped_card.scoring import Card, draw, floats, pixels, portraits_of, recipe_of

__all__ = ["card"]

_COLUMNS = 8
_KEY = 0xDE6  # of what is chosen by chance when pictures are made small


def card(pipeline: Pipeline, folder: Path, stage: str, most: int) -> Card:
    """Measure a model that enlarges, and enlarge some; see `tools.shipped_card.text.card`."""
    recipe = recipe_of(folder, stage)
    data, validation = portraits_of(recipe)
    known = [validation.load(k) for k in range(min(most, len(validation)))]
    names = {concept.name for concept in data.concepts}
    strange = [concept.name for concept in emoji_concepts() if concept.name not in names]
    chosen = tuple(strange[k] for k in evenly(min(most, len(strange)), len(strange)))
    others = PortraitsData(validation.config.model_copy(update={"concepts": chosen}))
    unknown = [others.load(k) for k in range(len(chosen))]
    numbers: dict[str, float] = {"pictures": len(known), "of_other_emoji": len(unknown)}
    rows: list[tuple[str, str]] = []
    sheets: list[tuple[list[Tensor], list[str]]] = []
    for group, examples in (("trained emoji", known), ("other emoji", unknown)):
        small = [degrade(e.image, recipe.degradation, _chance(k)) for k, e in enumerate(examples)]
        told = _measure(pipeline, recipe, examples, small)
        key = group.replace(" ", "_")
        numbers |= {f"{key}_{name}": value for name, value in told.numbers.items()}
        rows += [(f"{what}, {group}", value) for what, value in told.rows]
        sheets.append((told.columns, told.labels))
    limits = [
        "Limits: pictures like its training's, one emoji on a plain colour, from 64 to 128 pixels;",
        "larger ones in tiles.",
    ]
    shown = "Small, enlarged by bicubic interpolation, drawn, and true; trained emoji, then others:"
    return Card(numbers, rows, limits, shown, _sheet(sheets))


def _chance(number: int) -> torch.Generator:
    return keyed_generator(_KEY, number)


@dataclass(frozen=True, eq=False)
class _Told:
    numbers: dict[str, float]
    rows: list[tuple[str, str]]
    columns: list[Tensor]  # of pictures
    labels: list[str]


def _measure(
    pipeline: Pipeline, recipe: DiffusionRecipe, examples: list[Example], small: list[Tensor]
) -> _Told:
    pictures = InputPictures()
    fields = [
        {"prompt": e.caption or "", "image": pictures.add(to_images(s[None])[0])}
        for e, s in zip(examples, small, strict=True)
    ]
    drawn = floats([pixels(image) for image in draw(pipeline, fields, pictures)])
    real, low = floats([e.image for e in examples]), floats(small)
    plain = F.interpolate(low, real.shape[-2:], mode="bicubic").clamp(-1, 1)
    shrunk = bicubic_down(drawn, recipe.degradation.factor).clamp(-1, 1)
    numbers = {
        "distance": _distance(drawn, real),
        "distance_of_bicubic": _distance(plain, real),
        "psnr": float(psnr(drawn, real).mean()),
        "psnr_of_bicubic": float(psnr(plain, real).mean()),
        "psnr_of_shrunk": float(psnr(shrunk, low).mean()),
    }
    rows = [
        (
            "perceptual distance to the true picture (bicubic)",
            f"{numbers['distance']:.3f} ({numbers['distance_of_bicubic']:.3f})",
        ),
        (
            "PSNR (bicubic)",
            f"{numbers['psnr']:.1f} dB ({numbers['psnr_of_bicubic']:.1f} dB)",
        ),
        ("PSNR of the shrunk picture to the small one", f"{numbers['psnr_of_shrunk']:.1f} dB"),
    ]
    nearest = F.interpolate(low, real.shape[-2:], mode="nearest")
    captions = [example.caption or "" for example in examples]
    return _Told(numbers, rows, [nearest, plain, drawn, real], captions)


def _distance(images: Tensor, real: Tensor) -> float:
    distance = perceptual_metric()
    parts = zip(images.split(16), real.split(16), strict=True)
    return float(torch.cat([distance(ours, theirs) for ours, theirs in parts]).mean())


def _sheet(groups: list[tuple[list[Tensor], list[str]]]) -> Image.Image:
    """A row of each kind of picture, of each group of examples."""
    images: list[Image.Image] = []
    labels: list[str] = []
    for columns, captions in groups:
        chosen = evenly(min(_COLUMNS, len(captions)), len(captions))
        for pictures in columns:
            shown = to_images(pictures[chosen].clamp(-1, 1))
            blank = [Image.new("RGB", shown[0].size, "white")] * (_COLUMNS - len(shown))
            images += [*shown, *blank]
        labels += [""] * (_COLUMNS * (len(columns) - 1))
        labels += [captions[k] for k in chosen] + [""] * (_COLUMNS - len(chosen))
    return image_grid(images, columns=_COLUMNS, labels=labels)
