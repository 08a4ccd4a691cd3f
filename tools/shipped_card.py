"""Measure a shipped model on what training held out; write its card and docs/results/shipped.md.

python -m tools.shipped_card emoji
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.emoji import EmojiData, EmojiDataConfig, Style
from mezzotint.data.portraits import PortraitsData, portrait_caption
from mezzotint.errors import CheckpointError, MezzotintError
from mezzotint.evaluation.distributions import kid, nearest_neighbours, precision_recall
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import image_features, psnr, retrieval
from mezzotint.evaluation.pictures import evenly
from mezzotint.evaluation.reconstruction import restore
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.features import load_features
from mezzotint.studies.demo import demo_captions, trained_portraits
from tools.train_shipped.ship import CARD, MODELS, ROOT, describe_training, read_made

__all__ = ["Scores", "concept_accuracy", "measure", "report"]

_CANDIDATES = 64
_STEPS = 25
_BATCH = 16
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


@dataclass(frozen=True)
class Asked:
    """A picture that is asked for by what it shows."""

    label: int
    colour: str = "white"
    style: Style = "fluent"


def portraits_of(folder: Path) -> tuple[PortraitsData, PortraitsData]:
    """Return the data that a model was trained on, and those that were held out.

    Raises:
        ConfigError: If it was trained on others than portraits.
    """
    data = trained_portraits(folder)
    return data, PortraitsData(data.config.model_copy(update={"split": "validation"}))


def draw(pipeline: Pipeline, captions: list[str], seed: int = 0) -> list[Image.Image]:
    """Draw a picture under each caption."""
    requests = [
        pipeline.request(prompt=caption, seed=seed + k, steps=_STEPS)
        for k, caption in enumerate(captions)
    ]
    return [item.image for item in generate_each(pipeline, requests, batch_size=_BATCH)]


def features(images: list[Tensor]) -> Tensor:
    """MobileNetV2's features of pictures ``(3, H, W)`` uint8."""
    network = load_features("mobilenet-v2")
    return image_features(network, _floats(torch.stack(images)))


def _floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


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


def _accuracy(pipeline: Pipeline, data: PortraitsData, asked: list[Asked]) -> float:
    captions = [portrait_caption(data.concepts[a.label], a.colour, a.style) for a in asked]
    return concept_accuracy(data, asked, [pixels(image) for image in draw(pipeline, captions)])


def measure(pipeline: Pipeline, folder: Path, most: int = 256) -> Scores:
    """Measure a shipped model.

    Args:
        pipeline: The model.
        folder: Its files, its recipes among them.
        most: Pictures of each kind at most.
    """
    data, validation = portraits_of(folder)
    chosen = evenly(min(most, len(data.concepts)), len(data.concepts))
    styled = [k for k in range(len(data.concepts)) if data.holds_out_style(k)][:most]
    ours = [validation.load(k) for k in range(min(most, len(validation)))]
    # concept by concept in turn, so that the first of them are as many of each
    training = [data.load(k).image for k in range(min(_TRAINING, len(data)))]
    drawn = features([pixels(i) for i in draw(pipeline, [e.caption or "" for e in ours])])
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


def _psnr(pipeline: Pipeline) -> float:
    side = pipeline.model.image_size[0]
    emoji = EmojiData(EmojiDataConfig(split="validation", resolution=side))
    images = torch.stack([emoji.load(k).image for k in range(len(emoji))])
    restored = restore(pipeline.model.first_stage, images)
    return float(psnr(_floats(restored), _floats(images)).mean())


def report(scores: Scores) -> list[str]:
    """Return the numbers as the lines of a card."""
    style = "–" if scores.held_out_style is None else f"{scores.held_out_style:.1%}"
    return [
        "",
        "Measured by `python -m tools.shipped_card`, on MobileNetV2's features.",
        "",
        "| | |",
        "|---|---|",
        f"| right concept among 64, captions that training showed | {scores.known:.1%} |",
        f"| the same, on the colour held out of each concept | {scores.held_out_colour:.1%} |",
        f"| the same, in the style held out of some | {style} |",
        f"| KID to the validation pictures ({scores.pictures}) | {scores.kid:.4f} ±"
        f" {scores.kid_error:.4f} |",
        f"| precision, recall | {scores.precision:.2f}, {scores.recall:.2f} |",
        f"| nearest training picture, median distance | {scores.nearest_training:.3f} |",
        f"| the same, of validation pictures | {scores.nearest_training_of_validation:.3f} |",
        f"| PSNR of the first stage on validation emoji | {scores.psnr:.1f} dB |",
        "",
        "Limits: single emoji of the trained concepts. Words that no caption has mean nothing to",
        "it, and it cannot count, write or compose several things.",
    ]


def grid(pipeline: Pipeline, data: PortraitsData) -> Image.Image:
    """Draw known and held-out captions in turn."""
    captions, labels = demo_captions(data, _ON_GRID)
    return image_grid(draw(pipeline, captions, seed=1000), columns=8, labels=labels, scale=2)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; exit code 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.shipped_card", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", help="the shipped model's name, such as emoji")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of shipped models")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/results", metavar="FOLDER")
    parser.add_argument("--pictures", type=int, default=256, help="of each kind, at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    told = parser.parse_args(arguments)
    folder = told.models / told.model
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such model; train it, then ship it by --ship")
        pipeline = load(folder, told.device)
        scores = measure(pipeline, folder, told.pictures)
        card = [*describe_training(told.model, read_made(folder)), *report(scores)]
        (folder / CARD).write_text("\n".join(card) + "\n", encoding="utf-8")
        told.docs.mkdir(parents=True, exist_ok=True)
        sheet = grid(pipeline, portraits_of(folder)[0])
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    sheet.save(told.docs / "shipped.webp", quality=85)
    (told.docs / "shipped.json").write_text(json.dumps(asdict(scores), indent=1) + "\n")
    shown = [*card, "", "Known captions and held-out ones in turn:", "", "![drawn](shipped.webp)"]
    (told.docs / "shipped.md").write_text("\n".join(shown) + "\n", encoding="utf-8")
    print("\n".join(card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
