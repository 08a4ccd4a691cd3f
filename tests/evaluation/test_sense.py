"""Do the metrics say what people see? Worse pictures must score worse, on emoji and on photographs.

Half of the pictures is damaged more and more; distributions are compared with the other half, which
is whole, and pictures with what they were.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mezzotint.data import EmojiDataConfig, open_data
from mezzotint.evaluation.distributions import (
    Estimate,
    FeatureStatistics,
    frechet_distance,
    kid,
)
from mezzotint.evaluation.metrics import perceptual_metric, psnr, ssim
from mezzotint.models.features import load_features
from mezzotint.rng import keyed_generator

SIDE = 64
REFERENCE, DAMAGED = 112, 32
# Beside the checkout: 3,781 photographs of clothing, CC0, which are not part of the repository.
# Where they are not, emoji alone are tested: a stranger's run has nothing to skip.
PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "clothing-160.tar"

Pixels = np.ndarray


def with_noise(image: Pixels, deviation: float) -> Pixels:
    noise = torch.randn(image.shape, generator=keyed_generator(0, int(image.sum()))).numpy()
    return (image + deviation * noise).clip(0, 255).round().astype(np.uint8)


def blurred(image: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def compressed(image: Pixels, quality: float) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


DAMAGES: dict[str, tuple[Callable[[Pixels, float], Pixels], tuple[float, ...]]] = {
    "noise": (with_noise, (8, 16, 32, 64, 128)),
    "blur": (blurred, (0.6, 1, 2, 4, 8)),
    "jpeg": (compressed, (70, 40, 20, 8, 2)),
}


def emoji() -> list[Pixels]:
    data = open_data(EmojiDataConfig(resolution=SIDE, split="all"))
    order = torch.randperm(len(data), generator=keyed_generator(0))[: REFERENCE + DAMAGED]
    return [data.load(int(k)).image.permute(1, 2, 0).numpy() for k in order]


def photographs() -> list[Pixels]:
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".jpg")]
        order = torch.randperm(len(members), generator=keyed_generator(0))
        files = [archive.extractfile(members[k]) for k in order[: REFERENCE + DAMAGED].tolist()]
        return [square(Image.open(file)) for file in files if file is not None]


def square(image: Image.Image) -> Pixels:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    middle = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(middle.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Scores:
    """Of rising damage; the first is of whole pictures."""

    fid: list[float]
    kid: list[float]
    lpips: list[float]
    psnr: list[float]
    ssim: list[float]


@dataclass(frozen=True)
class Measured:
    halves: Estimate
    scores: dict[str, Scores]


def tensor(images: list[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=[emoji, photographs] if PHOTOGRAPHS.is_file() else [emoji])
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    images = request.param()
    network, perceptual = load_features("mobilenet-v2"), perceptual_metric("mobilenet-v2")

    def look(pictures: list[Pixels]) -> Tensor:
        return torch.cat([network.extract(part)[0] for part in tensor(pictures).split(4)])

    whole = images[REFERENCE:]
    reference, clean = look(images[:REFERENCE]), look(whole)
    truth = FeatureStatistics.of(reference)
    y = tensor(whole) / 127.5 - 1
    scores: dict[str, Scores] = {}
    for name, (damage, levels) in DAMAGES.items():
        found = Scores([], [], [], [], [])
        for level in (None, *levels):
            pictures = whole if level is None else [damage(image, level) for image in whole]
            features = clean if level is None else look(pictures)
            x = tensor(pictures) / 127.5 - 1
            found.fid.append(frechet_distance(FeatureStatistics.of(features), truth))
            found.kid.append(kid(features, reference).value)
            found.lpips.append(float(perceptual(x, y).mean()))
            found.psnr.append(float(psnr(x, y).mean()))
            found.ssim.append(float(ssim(x, y).mean()))
        scores[name] = found
    yield Measured(kid(clean, reference), scores)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("metric", ["fid", "kid", "lpips", "psnr", "ssim"])
def test_more_damage_scores_worse(measured: Measured, damage: str, metric: str) -> None:
    values = np.array(getattr(measured.scores[damage], metric))
    assert len(values) == 6
    worse = np.diff(values) if metric in ("fid", "kid", "lpips") else -np.diff(values)
    assert (worse > 0).all(), values


def test_two_halves_of_the_same_data_are_alike(measured: Measured) -> None:
    assert abs(measured.halves.value) <= 2 * measured.halves.standard_error
    worst = min(scores.kid[2] for scores in measured.scores.values())
    assert worst > 4 * measured.halves.standard_error  # so small that it tells damage apart
