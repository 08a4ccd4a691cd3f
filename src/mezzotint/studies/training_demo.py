"""The demonstration of training: both stages on 48 emoji, drawn from their captions, and judged."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import image_features, psnr, retrieval, shifted_psnr
from mezzotint.generation.generate import GeneratedImage, generate_each
from mezzotint.generation.metadata import write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.features import load_features
from mezzotint.rng import keyed_generator
from mezzotint.training.run import train

__all__ = ["DemoScores", "run_training_demo", "score"]

RECIPE = "emoji-demo"
_GUIDANCE, _STEPS, _SHIFT = 1.5, 25, 2


@dataclass(frozen=True)
class DemoScores:
    """What the demonstration reached.

    Attributes:
        accuracy: Share of pictures whose nearest of 64 emoji (MobileNetV2 features; 16 of them
            never trained) is the one that the caption names.
        permuted_accuracy: The same with the captions permuted: what chance gives.
        psnr: Mean dB against the named emoji, best over shifts of up to 2 pixels.
        autoencoder_psnr: Mean dB of the first stage's reconstructions of the 48.
        unseen_autoencoder_psnr: The same on the 16 that were never trained.
    """

    accuracy: float
    permuted_accuracy: float
    psnr: float
    autoencoder_psnr: float
    unseen_autoencoder_psnr: float


def run_training_demo(output: Path, console: Console | None = None) -> DemoScores:
    """Train, draw and judge; what was interrupted goes on where it stood.

    Args:
        output: The run folder; ``grid.png`` and ``scores.json`` are written into it.
        console: Where progress and results are shown.
    """
    console = console or Console()
    begun = time.monotonic()
    trained = not (output / "model" / "model_index.json").is_file()
    if trained:
        train(RECIPE, output=output, resume=(output / "recipe.yaml").is_file(), console=console)
    pipeline = load(output)
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=pipeline.model.image_size[0]))
    captions = [concept.caption for concept in data.concepts]
    drawing = time.monotonic()
    drawn = _draw(pipeline, captions)
    seconds = time.monotonic() - drawing
    sheet = image_grid([d.image for d in drawn], columns=8, labels=captions, scale=2)
    sheet.save(output / "grid.png")
    for number, item in enumerate(drawn):
        write_image(item.image, item.request, output / "drawn" / f"{number:02d}.png")
    scores = score(pipeline, data, drawn)
    (output / "scores.json").write_text(json.dumps(asdict(scores), indent=1) + "\n")
    minutes = (time.monotonic() - begun) / 60
    _report(console, scores, output, seconds, minutes if trained else None)
    return scores


def _draw(pipeline: Pipeline, captions: list[str]) -> list[GeneratedImage]:
    requests = [
        pipeline.request(
            prompt=caption,
            seed=seed,
            steps=_STEPS,
            sampler="ddim",
            spacing="trailing",
            guidance_scale=_GUIDANCE,
        )
        for seed, caption in enumerate(captions)
    ]
    return generate_each(pipeline, requests, batch_size=16)


def _pixels(data: EmojiData) -> Tensor:
    images = torch.stack([data.load(k).image for k in range(len(data))])
    return images.float() / 127.5 - 1.0


def _drawn_pixels(drawn: list[GeneratedImage]) -> Tensor:
    size = drawn[0].image.height
    raw = [torch.frombuffer(bytearray(d.image.tobytes()), dtype=torch.uint8) for d in drawn]
    images = torch.stack([r.view(size, size, 3).permute(2, 0, 1) for r in raw])
    return images.float() / 127.5 - 1.0


def score(pipeline: Pipeline, data: EmojiData, drawn: list[GeneratedImage]) -> DemoScores:
    """Judge drawn pictures against the emoji that their captions name.

    Args:
        pipeline: The model that drew them; draws once more with permuted captions.
        data: The 48 trained emoji.
        drawn: One picture of each, in order.
    """
    size = data.config.resolution
    unseen = EmojiData(EmojiDataConfig(subset="demo-candidates-16", resolution=size))
    named, others = _pixels(data), _pixels(unseen)
    network = load_features("mobilenet-v2")
    candidates = image_features(network, torch.cat([named, others]))
    truth = torch.arange(len(data))
    order = torch.randperm(len(data), generator=keyed_generator(0, len(data))).tolist()
    permuted = _draw(pipeline, [data.concepts[k].caption for k in order])
    pictures = _drawn_pixels(drawn)

    def accuracy(images: Tensor) -> float:
        found = retrieval(image_features(network, images), candidates)
        return float((found == truth).float().mean())

    return DemoScores(
        accuracy=accuracy(pictures),
        permuted_accuracy=accuracy(_drawn_pixels(permuted)),
        psnr=float(shifted_psnr(pictures, named, _SHIFT).mean()),
        autoencoder_psnr=_reconstruction_psnr(pipeline, named),
        unseen_autoencoder_psnr=_reconstruction_psnr(pipeline, others),
    )


@torch.inference_mode()
def _reconstruction_psnr(pipeline: Pipeline, images: Tensor) -> float:
    model, device = pipeline.model, pipeline.execution.device
    restored = model.decode(model.encode(images.to(device))).clamp(-1, 1).cpu()
    return float(psnr(restored, images).mean())


def _report(
    console: Console, scores: DemoScores, output: Path, drawing: float, minutes: float | None
) -> None:
    took = "the model was there already" if minutes is None else f"all of it took {minutes:.1f} min"
    lines = (
        f"nearest to the emoji that the caption names, among 64: {scores.accuracy:.1%}"
        " (at least 95 % is expected)",
        f"the same with the captions permuted: {scores.permuted_accuracy:.1%} (chance is 1.6 %)",
        f"PSNR to the named emoji, best over shifts of {_SHIFT} pixels: {scores.psnr:.1f} dB"
        " (at least 20)",
        f"PSNR of the autoencoder: {scores.autoencoder_psnr:.1f} dB (at least 26);"
        f" {scores.unseen_autoencoder_psnr:.1f} dB on 16 emoji that it never saw",
        f"48 pictures drawn in {drawing:.1f} s; {took}",
        f"look at the labelled grid: {output / 'grid.png'}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
