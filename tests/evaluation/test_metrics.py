"""Measures against closed forms."""

import math
import sys

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.data import EmojiDataConfig, open_data
from mezzotint.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from mezzotint.evaluation.metrics import (
    PerceptualDistance,
    image_features,
    perceptual_metric,
    psnr,
    retrieval,
    retrieval_accuracy,
    shifted_psnr,
    ssim,
)
from mezzotint.models.features import load_features


def test_psnr_of_a_constant_error():
    """An error of 0.2 on a range of 2 is 20 log10(10) dB."""
    a = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(psnr(a + 0.2, a), torch.full((3,), 20.0, dtype=torch.float64))
    assert math.isinf(float(psnr(a, a)[0]))


def test_a_shift_within_reach_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((1, 3, 32, 32), 1.0)
    picture[..., 10:20, 10:20] = torch.rand(1, 3, 10, 10, generator=generator)
    moved = picture.roll((2, -1), dims=(2, 3))
    assert float(psnr(moved, picture)) < 25
    assert math.isinf(float(shifted_psnr(moved, picture, reach=2)))
    assert math.isfinite(float(shifted_psnr(moved, picture, reach=1)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


def test_ssim_of_flat_images_compares_their_brightness():
    """Without structure (2 a b + c) / (a^2 + b^2 + c) is left, with c = (0.01 range)^2."""
    dark, light = torch.full((2, 3, 16, 16), -0.5), torch.full((2, 3, 16, 16), 0.8)
    a, b, c = 0.25, 0.9, 0.01**2  # on a range of 1
    expected = (2 * a * b + c) / (a**2 + b**2 + c)
    # float32 leaves flat images a variance of some 1e-7, against the formula's 9e-4
    torch.testing.assert_close(ssim(dark, light), torch.full((2,), expected), rtol=1e-3, atol=0)


def test_ssim_equals_its_definition_image_by_image():
    x, y = noise(2, 3, 24, 17), noise(2, 3, 24, 17, seed=1) * 0.4
    y += 0.6 * x
    taps = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    expected = []
    for pair in zip(x.double().numpy(), y.double().numpy(), strict=True):
        channels = []
        padded = [
            np.pad(127.5 * (image + 1), ((0, 0), (5, 5), (5, 5)), mode="reflect") for image in pair
        ]
        for a, b in zip(*padded, strict=True):
            means = [scipy.signal.correlate2d(s, window, "valid") for s in (a, b)]
            variances = [
                scipy.signal.correlate2d(s * t, window, "valid") - m * n
                for s, t, m, n in (
                    (a, a, means[0], means[0]),
                    (b, b, means[1], means[1]),
                    (a, b, means[0], means[1]),
                )
            ]
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            brightness = (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)
            structure = (2 * variances[2] + c2) / (variances[0] + variances[1] + c2)
            channels.append((brightness * structure).mean())
        expected.append(np.mean(channels))
    found = ssim(x, y)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    torch.testing.assert_close(ssim(x[:1], y[:1]), found[:1])


def test_ssim_needs_room_for_its_window():
    with pytest.raises(DataError, match="8x32 pixels are smaller than its window.*11x11"):
        ssim(noise(1, 3, 8, 32), noise(1, 3, 8, 32))


def test_ssim_without_torchmetrics_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MissingExtraError, match=r"SSIM needs .*'torchmetrics'.*mezzotint\[train\]"):
        ssim(noise(1, 3, 16, 16), noise(1, 3, 16, 16))


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return perceptual_metric()


def test_the_perceptual_distance_is_the_formula_on_mobilenets_stages(distance: PerceptualDistance):
    """Equation 1 of LPIPS with weights 1, averaged over the five strides."""
    x, y = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    network = load_features("mobilenet-v2")
    mean, std = (getattr(network, n) for n in ("mean", "std"))
    expected = torch.zeros(2)
    a, b = (((s + 1.0) * 127.5 - mean) / std for s in (x, y))
    sizes = []
    with torch.no_grad():
        for i, layer in enumerate(network.trunk.features):
            a, b = layer(a), layer(b)
            if i in (1, 3, 6, 13, 17):
                unit = [s / s.square().sum(1, keepdim=True).sqrt() for s in (a, b)]
                expected += (unit[0] - unit[1]).square().sum(1).mean((1, 2)) / 5.0
                sizes.append(a.shape[-1])
    assert sizes == [32, 16, 8, 4, 2]
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-5)


def test_the_perceptual_distance_is_a_metric_and_not_a_loss(distance: PerceptualDistance):
    assert distance.name == "lpips_mobilenet_v2"
    x = noise(2, 3, 40, 40).requires_grad_()
    assert torch.equal(distance(x, x), torch.zeros(2))
    assert not distance(x, noise(2, 3, 40, 40, seed=1)).requires_grad
    names = {type(module).__name__ for module in distance.modules()}
    assert "MobileNetV2" not in names  # its stages alone, and nothing of the loss
    assert not any("EfficientNet" in name for name in names)


def test_the_perceptual_distance_sees_blur_that_psnr_forgives(distance: PerceptualDistance):
    """A blur and a shift of brightness of the same error: the blur is farther."""
    data = open_data(EmojiDataConfig(resolution=64, background="grey"))
    images = torch.stack([data.load(i).image for i in range(0, 600, 100)]) / 127.5 - 1
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    error = (blurred - images).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert (distance(images, images + error) < distance(images, blurred)).all()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mobilenet", {}, ConfigError, "did you mean 'mobilenet-v2'"),
        ("efficientnet-lite0", {}, ConfigError, "unknown perceptual metric"),
        ("mobilenet-v2", {"weights": "a.pth"}, ConfigError, "is shipped and takes no weights"),
        ("lpips-vgg16", {}, ConfigError, "'lpips-vgg16' needs weights"),
        ("lpips-vgg16", {"weights": "none.pth"}, CheckpointError, "none.pth: no such file"),
    ],
)
def test_wrong_perceptual_metrics(
    name: str, options: dict[str, str], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        perceptual_metric(name, **options)


def test_retrieval_finds_the_nearest_direction():
    candidates = torch.eye(4)
    found = retrieval(torch.tensor([[0.1, 3.0, 0.2, 0.0], [0.0, 0.0, 0.1, 0.2]]), candidates)
    assert found.tolist() == [1, 3]


def test_retrieval_accuracy_is_a_share_and_its_error():
    pictures = torch.eye(4)[[0, 1, 2, 3, 3]] + 0.1
    found = retrieval_accuracy(pictures, torch.eye(4), torch.tensor([0, 1, 2, 3, 0]))
    assert found.value == pytest.approx(0.8)
    assert found.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    with pytest.raises(DataError, match="0 images are too few"):
        retrieval_accuracy(pictures[:0], torch.eye(4), torch.zeros(0))


def test_features_do_not_depend_on_the_batch():
    network = load_features("mobilenet-v2")
    images = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = image_features(network, images), image_features(network, images, batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
