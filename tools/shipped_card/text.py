"""How well a shipped text model draws captions, those that training held out among them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.data.portraits import PortraitsData, portrait_caption
from mezzotint.evaluation.distributions import kid, nearest_neighbours, precision_recall
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import psnr
from mezzotint.evaluation.pictures import evenly
from mezzotint.evaluation.reconstruction import restore
from mezzotint.generation.pipeline import Pipeline
from mezzotint.studies.demo import demo_captions
from tools.shipped_card.scoring import (
    Asked,
    Card,
    concept_accuracy,
    draw,
    features,
    floats,
    pixels,
    portraits_of,
    recipe_of,
)

__all__ = ["Scores", "card", "measure"]

_ON_GRID = 32
_TRAINING = 2048  # training pictures among which copies are looked for


@dataclass(frozen=True)
class Scores:
    """What a shipped model reached; features are MobileNetV2's.

    Attributes:
        known: Share of pictures nearest to the concept that the caption names, among 64 on the same
            background, for captions that training showed.
        held_out_colour: The same on the colour that training held out of each concept.
        held_out_style: The same in the style that training held out of some.
        kid: Between pictures drawn under held-out captions and the validation pictures of these.
        kid_error: Its standard error.
        precision: Share of drawn pictures inside the manifold of the validation pictures.
        recall: The other way round.
        nearest_training: Median distance of a drawn picture to the nearest training picture.
        nearest_training_of_validation: The same of a validation picture.
        psnr: dB of the first stage on the emoji that it was not trained on.
        pictures: Drawn under held-out captions.
    """

    known: float
    held_out_colour: float
    held_out_style: float | None
    kid: float
    kid_error: float
    precision: float
    recall: float
    nearest_training: float
    nearest_training_of_validation: float
    psnr: float
    pictures: int


def card(pipeline: Pipeline, folder: Path, stage: str, most: int) -> Card:
    """Measure a model that draws from captions, and draw some.

    Args:
        pipeline: The model.
        folder: Its files, its recipes among them.
        stage: Of the programme, that it was trained in.
        most: Pictures of each kind at most.
    """
    data, validation = portraits_of(recipe_of(folder, stage))
    scores = measure(pipeline, data, validation, most)
    style = "–" if scores.held_out_style is None else f"{scores.held_out_style:.1%}"
    rows = [
        ("right concept among 64, captions that training showed", f"{scores.known:.1%}"),
        ("the same, on the colour held out of each concept", f"{scores.held_out_colour:.1%}"),
        ("the same, in the style held out of some", style),
        (
            f"KID to the validation pictures ({scores.pictures})",
            f"{scores.kid:.4f} ± {scores.kid_error:.4f}",
        ),
        ("precision, recall", f"{scores.precision:.2f}, {scores.recall:.2f}"),
        ("nearest training picture, median distance", f"{scores.nearest_training:.3f}"),
        ("the same, of validation pictures", f"{scores.nearest_training_of_validation:.3f}"),
        ("PSNR of the first stage on validation emoji", f"{scores.psnr:.1f} dB"),
    ]
    limits = [
        "Limits: single emoji of the trained concepts. Words that no caption has mean nothing to",
        "it, and it cannot count, write or compose several things.",
    ]
    shown = "Known captions and held-out ones in turn:"
    return Card(asdict(scores), rows, limits, shown, _grid(pipeline, data))


def measure(
    pipeline: Pipeline, data: PortraitsData, validation: PortraitsData, most: int = 256
) -> Scores:
    """Measure a shipped model.

    Args:
        pipeline: The model.
        data: That it was trained on.
        validation: That was held out.
        most: Pictures of each kind at most.
    """
    chosen = evenly(min(most, len(data.concepts)), len(data.concepts))
    styled = [k for k in range(len(data.concepts)) if data.holds_out_style(k)][:most]
    ours = [validation.load(k) for k in range(min(most, len(validation)))]
    # concept by concept in turn, so that the first of them are as many of each
    training = [data.load(k).image for k in range(min(_TRAINING, len(data)))]
    drawn = features(_draw(pipeline, [e.caption or "" for e in ours]))
    real, trained = features([example.image for example in ours]), features(training)
    distance = kid(drawn, real)
    precision, recall = precision_recall(drawn, real)
    return Scores(
        known=_accuracy(pipeline, data, [Asked(k) for k in chosen]),
        held_out_colour=_accuracy(
            pipeline, data, [Asked(k, data.held_out_colour(k)) for k in chosen]
        ),
        held_out_style=_accuracy(pipeline, data, [Asked(k, style="noto") for k in styled])
        if styled
        else None,
        kid=distance.value,
        kid_error=distance.standard_error,
        precision=precision,
        recall=recall,
        nearest_training=float(nearest_neighbours(drawn, trained)[0].median()),
        nearest_training_of_validation=float(nearest_neighbours(real, trained)[0].median()),
        psnr=_psnr(pipeline),
        pictures=len(ours),
    )


def _draw(pipeline: Pipeline, captions: list[str]) -> list[Tensor]:
    return [pixels(image) for image in draw(pipeline, [{"prompt": c} for c in captions])]


def _accuracy(pipeline: Pipeline, data: PortraitsData, asked: list[Asked]) -> float:
    captions = [portrait_caption(data.concepts[a.label], a.colour, a.style) for a in asked]
    return concept_accuracy(data, asked, _draw(pipeline, captions))


def _psnr(pipeline: Pipeline) -> float:
    side = pipeline.model.image_size[0]
    emoji = EmojiData(EmojiDataConfig(split="validation", resolution=side))
    images = torch.stack([emoji.load(k).image for k in range(len(emoji))])
    restored = restore(pipeline.model.first_stage, images)
    return float(psnr(floats([*restored]), floats([*images])).mean())


def _grid(pipeline: Pipeline, data: PortraitsData) -> Image.Image:
    """Draw known and held-out captions in turn."""
    captions, labels = demo_captions(data, _ON_GRID)
    drawn = draw(pipeline, [{"prompt": caption} for caption in captions], seed=1000)
    return image_grid(drawn, columns=8, labels=labels, scale=2)
