"""An unconditional model led by small pictures: how well it agrees, and what diversity is left."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.device import Execution
from mezzotint.evaluation.grids import labelled_rows
from mezzotint.evaluation.metrics import perceptual_metric, psnr
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import InputPictures, to_pixels
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.request import GuideUse
from mezzotint.generation.sampling import to_images
from mezzotint.studies.conditions.judging import SINGLE, scenes_of
from mezzotint.studies.conditions.results import GuidedResult
from mezzotint.studies.machine import this_machine

__all__ = ["measure_guided"]

SIDE, STEPS, SAMPLER = 8, 50, "ddpm"
_SEED, _BATCH = 5000, 16


def measure_guided(
    pipeline: Pipeline,
    execution: Execution,
    *,
    targets: int = 12,
    each: int = 4,
    picture: Path | None = None,
) -> GuidedResult:
    """Lead a model to pictures of 8 x 8 pixels.

    A target is what remains of a picture that the model drew by itself, so that this picture is one
    draw from all that agree with the target. If those that were led there are such draws too, they
    are as far from one another as from it: the ratio of the two distances is what is left of the
    diversity beyond what the target itself takes.

    Args:
        pipeline: An unconditional model.
        execution: What it runs on.
        targets: How many targets.
        each: Pictures led to each.
        picture: Where to show some.
    """
    plain = _draw(pipeline, [None] * targets, _SEED)
    small = _small(plain)
    guided = _draw(pipeline, [t for t in small for _ in range(each)], _SEED + targets)
    agreement = psnr(_small(guided), small.repeat_interleave(each, 0))
    chance = psnr(small, small.roll(1, 0))
    data = scenes_of(SINGLE, "validation", targets)
    real = torch.stack([data.load(k).image for k in range(targets)])
    real_small = _small(real.float() / 127.5 - 1.0)
    of_real = _draw(pipeline, list(real_small), _SEED)
    groups = guided.unflatten(0, (targets, each))
    if picture is not None:
        _sheet(plain, small, groups).save(picture)
    return GuidedResult(
        side=SIDE,
        steps=STEPS,
        sampler=SAMPLER,
        targets=targets,
        each=each,
        chance_psnr=float(chance.mean()),
        guided_psnr=float(agreement.mean()),
        least_guided_psnr=float(agreement.min()),
        real_psnr=float(psnr(_small(of_real), real_small).mean()),
        between_guided=_between(groups),
        to_true_draw=_distance(guided, plain.repeat_interleave(each, 0)),
        between_plain=_distance(plain, plain.roll(1, 0)),
        machine=this_machine(execution),
    )


def _draw(pipeline: Pipeline, targets: Sequence[Tensor | None], seed: int) -> Tensor:
    """Draw a picture for each target; None leads nowhere. ``(N, 3, H, W)`` in -1..1."""
    pictures = InputPictures()
    requests = [
        pipeline.request(
            seed=seed + k,
            steps=STEPS,
            sampler=SAMPLER,
            spacing="trailing",
            guides=() if t is None else (_towards(t, pictures),),
        )
        for k, t in enumerate(targets)
    ]
    drawn = generate_each(pipeline, requests, pictures=pictures, batch_size=_BATCH)
    return torch.stack([to_pixels(item.image) for item in drawn])


def _towards(target: Tensor, pictures: InputPictures) -> GuideUse:
    return GuideUse(kind="low-res", image=pictures.add(to_images(target[None])[0]))


def _small(images: Tensor) -> Tensor:
    """Averages, ``(N, 3, 8, 8)``, as an 8-bit picture holds them."""
    return ((F.adaptive_avg_pool2d(images, SIDE) + 1) * 127.5).round() / 127.5 - 1


def _distance(a: Tensor, b: Tensor) -> float:
    distance: Callable[[Tensor, Tensor], Tensor] = perceptual_metric()
    return float(distance(a, b).mean())


def _between(groups: Tensor) -> float:
    """The mean perceptual distance of two pictures of one target, ``(targets, each, …)``."""
    pairs = list(itertools.combinations(range(groups.shape[1]), 2))
    return sum(_distance(groups[:, i], groups[:, j]) for i, j in pairs) / len(pairs)


def _sheet(plain: Tensor, small: Tensor, groups: Tensor) -> Image.Image:
    size = 2 * plain.shape[-1]

    def row(images: Tensor, how: Image.Resampling) -> list[Image.Image]:
        return [image.resize((size, size), how) for image in to_images(images)]

    smooth = Image.Resampling.LANCZOS
    rows = {"target": row(small, Image.Resampling.NEAREST)}
    rows |= {f"led, {k + 1}": row(groups[:, k], smooth) for k in range(groups.shape[1])}
    rows["it came from"] = row(plain, smooth)
    return labelled_rows(rows)
