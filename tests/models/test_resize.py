"""Resizing against its definitions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.models.resize import Resize, resize_images

MODES: tuple[Resize, ...] = ("bicubic-antialias", "tf1-bilinear", "pil-bicubic")


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255


@pytest.mark.parametrize("size", [7, 20, 64])
def test_tensorflows_pixels_come_from_their_corner(size: int) -> None:
    """Pixel i of n lies at i H / n, between the two around it; the last has no other after it."""
    image = pixels(1, 3, 20, 12)
    found = resize_images(image, size, "tf1-bilinear")
    source = image[0].double().numpy()
    for i in (0, 1, size // 2, size - 1):
        for j in (0, 2, size - 1):
            y, x = i * 20 / size, j * 12 / size
            above, left = int(y), int(x)
            below, right = min(above + 1, 19), min(left + 1, 11)
            down, across = y - above, x - left
            upper = (1 - across) * source[:, above, left] + across * source[:, above, right]
            lower = (1 - across) * source[:, below, left] + across * source[:, below, right]
            expected = (1 - down) * upper + down * lower
            np.testing.assert_allclose(found[0, :, i, j], expected, rtol=1e-5, atol=1e-3)


def test_tensorflow_doubles_by_the_mean_to_the_right() -> None:
    row = torch.tensor([0.0, 100.0, 50.0]).expand(1, 1, 3, 3)
    found = resize_images(row, 6, "tf1-bilinear")
    assert found[0, 0, 0].tolist() == [0.0, 50.0, 100.0, 75.0, 50.0, 50.0]


def test_pillows_filter_sees_each_channel_as_floats() -> None:
    images = pixels(2, 3, 40, 30).round()
    found = resize_images(images, 16, "pil-bicubic")
    for image, resized in zip(images, found, strict=True):
        for plane, channel in zip(image, resized, strict=True):
            expected = Image.fromarray(plane.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(channel, np.clip(np.asarray(expected), 0, 255))
    assert (found != found.round()).float().mean() > 0.9  # not rounded to bytes again


def test_bicubic_is_torchs_clipped() -> None:
    images = pixels(2, 3, 40, 30).round()
    expected = F.interpolate(images, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    found = resize_images(images, 16, "bicubic-antialias")
    torch.testing.assert_close(found, expected.clamp(0, 255))


@pytest.mark.parametrize("mode", MODES)
def test_what_every_filter_keeps(mode: Resize) -> None:
    flat = torch.full((1, 3, 11, 17), 77.0)
    torch.testing.assert_close(resize_images(flat, 29, mode), torch.full((1, 3, 29, 29), 77.0))
    images = pixels(3, 3, 24, 24)
    assert torch.equal(resize_images(images, 24, mode), images)
    checks = torch.zeros(1, 3, 16, 16)
    checks[..., ::2, 1::2] = checks[..., 1::2, ::2] = 255.0
    edges = resize_images(checks, 40, mode)  # bicubic filters overshoot here
    assert float(edges.min()) >= 0.0 and float(edges.max()) <= 255.0
    alone = torch.cat([resize_images(image[None], 40, mode) for image in images])
    torch.testing.assert_close(alone, resize_images(images, 40, mode), rtol=0, atol=1e-4)
