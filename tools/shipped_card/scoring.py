"""What the cards of shipped models share: held-out pictures, and whether one shows its concept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.emoji import Style
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig
from mezzotint.errors import ConfigError
from mezzotint.evaluation.metrics import image_features, retrieval
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.models.features import load_features
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = [
    "Asked",
    "Card",
    "concept_accuracy",
    "draw",
    "features",
    "floats",
    "pixels",
    "portraits_of",
    "recipe_of",
    "table",
]

_CANDIDATES = 64
_STEPS = 25
_BATCH = 16


@dataclass(frozen=True)
class Asked:
    """A picture that is asked for by what it shows."""

    label: int
    colour: str = "white"
    style: Style = "fluent"


@dataclass(frozen=True, eq=False)
class Card:
    """What is said of a shipped model.

    Attributes:
        numbers: As they are kept in JSON.
        rows: The same for people: what was measured, and what came out.
        limits: What it cannot do, in lines.
        shown: What its sheet of pictures shows.
        sheet: That.
    """

    numbers: Mapping[str, Any]
    rows: Sequence[tuple[str, str]]
    limits: Sequence[str]
    shown: str
    sheet: Image.Image


def table(card: Card) -> list[str]:
    """Return the numbers as the lines of a card."""
    return [
        "",
        "Measured by `python -m tools.shipped_card`, on MobileNetV2's features.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in card.rows),
        "",
        *card.limits,
    ]


def recipe_of(folder: Path, stage: str) -> DiffusionRecipe:
    """Return the recipe that a shipped model was trained by.

    Args:
        folder: Its files.
        stage: Of the programme.

    Raises:
        ConfigError: If it was trained on others than portraits, which say what was held out.
    """
    recipe = load_recipe(folder / f"{stage}.yaml")
    if not isinstance(recipe, DiffusionRecipe) or not isinstance(recipe.data, PortraitsDataConfig):
        raise ConfigError(f"{folder / stage}.yaml: expected a model of portraits")
    return recipe


def portraits_of(recipe: DiffusionRecipe) -> tuple[PortraitsData, PortraitsData]:
    """Return the data that a model was trained on, and those that were held out."""
    assert isinstance(recipe.data, PortraitsDataConfig)
    held_out = recipe.data.model_copy(update={"split": "validation"})
    return PortraitsData(recipe.data), PortraitsData(held_out)


def draw(
    pipeline: Pipeline,
    asked: Sequence[Mapping[str, Any]],
    pictures: InputPictures | None = None,
    seed: int = 0,
) -> list[Image.Image]:
    """Draw a picture for each of some requests.

    Args:
        pipeline: The model.
        asked: Fields of requests.
        pictures: That the fields name.
        seed: Of the first; each has its own.
    """
    requests = [
        pipeline.request(**{"steps": _STEPS, "seed": seed + k, **fields})
        for k, fields in enumerate(asked)
    ]
    drawn = generate_each(pipeline, requests, batch_size=_BATCH, pictures=pictures)
    return [item.image for item in drawn]


def features(images: list[Tensor]) -> Tensor:
    """MobileNetV2's features of pictures ``(3, H, W)`` uint8."""
    network = load_features("mobilenet-v2")
    return image_features(network, floats(images))


def floats(images: Sequence[Tensor]) -> Tensor:
    """Pictures ``(3, H, W)`` uint8 as ``(N, 3, H, W)`` in -1..1."""
    return torch.stack(list(images)).float() / 127.5 - 1.0


def pixels(image: Image.Image) -> Tensor:
    """A picture as ``(3, H, W)`` uint8."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def concept_accuracy(data: PortraitsData, asked: list[Asked], drawn: list[Tensor]) -> float:
    """Return the share of pictures that are nearest to the concept that was asked for.

    Args:
        data: Says how a concept looks on a background.
        asked: What each picture is to show.
        drawn: The pictures, ``(3, H, W)`` uint8. Each is compared with 64 concepts on the
            background and in the style that were asked for, its own among them.
    """
    right = 0
    seen = features(drawn)
    for ground in dict.fromkeys((each.colour, each.style) for each in asked):
        places = [k for k, each in enumerate(asked) if (each.colour, each.style) == ground]
        for start in range(0, len(places), _CANDIDATES):
            part = places[start : start + _CANDIDATES]
            labels = [asked[k].label for k in part]
            others = [n for n in range(len(data.concepts)) if n not in labels]
            count = min(_CANDIDATES - len(labels), len(others))
            labels += [others[k] for k in evenly(count, len(others))] if count > 0 else []
            candidates = features([data.picture(data.plain(n, *ground)) for n in labels])
            found = retrieval(seen[part], candidates).tolist()
            # its own stands at the same place among the candidates
            right += sum(place == k for k, place in enumerate(found))
    return right / len(asked)
