"""Aspect ratios instead of squares."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import FolderData, FolderDataConfig
from mezzotint.data.buckets import BucketsConfig, bucket_sizes, nearest_bucket
from mezzotint.errors import ConfigError


@pytest.mark.parametrize(
    ("resolution", "multiple", "most"),
    [(512, 64, 2.0), (1024, 64, 4.0), (64, 8, 3.0), (256, 256, 2.0)],
)
def test_sizes_have_about_one_area(resolution: int, multiple: int, most: float) -> None:
    sizes = bucket_sizes(resolution, BucketsConfig(multiple=multiple, max_ratio=most))
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2 and max(width, height) <= most * min(width, height)
        assert (height, width) in sizes
        # no larger one of this height would do
        assert (max(width, height) + multiple) * min(width, height) > resolution**2 or (
            max(width, height) + multiple > most * min(width, height)
        )
    assert [w / h for w, h in sizes] == sorted(w / h for w, h in sizes)


def test_an_image_goes_to_the_nearest_ratio() -> None:
    sizes = bucket_sizes(512, BucketsConfig())
    for k, (width, height) in enumerate(sizes):
        assert nearest_bucket(3 * width, 3 * height, sizes) == k
    assert sizes[nearest_bucket(4000, 100, sizes)] == sizes[-1]
    # halfway between two by their logarithms
    (a, b), (c, d) = sizes[-2:]
    middle = math.sqrt(a / b * c / d)
    assert nearest_bucket(round(10_000 * middle) - 2, 10_000, sizes) == len(sizes) - 2
    assert nearest_bucket(round(10_000 * middle) + 2, 10_000, sizes) == len(sizes) - 1


def gradient(path: Path, width: int, height: int) -> None:
    """Red grows to the right and green downwards, both from 0 to 255."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    pixels = np.stack([red, green, np.zeros_like(red)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"a": (300, 100), "b": (90, 90), "c": (60, 100), "d": (640, 384)}.items():
        gradient(tmp_path / f"{name}.png", *size)
    return tmp_path


def open_folder(folder: Path, **settings: object) -> FolderData:
    values = {"path": str(folder), "resolution": 64, "buckets": {"multiple": 16}, **settings}
    return FolderData(FolderDataConfig.from_dict(values))


def test_views_fill_their_bucket(folder: Path) -> None:
    data = open_folder(folder)
    assert data.bucket_sizes == ((48, 80), (64, 64), (80, 48))
    assert [data.bucket(k) for k in range(4)] == [2, 1, 0, 2]
    shapes = [tuple(data.load(k).image.shape) for k in range(4)]
    assert shapes == [(3, 48, 80), (3, 64, 64), (3, 80, 48), (3, 48, 80)]
    wide = data.load(0).image
    # of 300 x 100 the middle 167 are seen: 0.222 to 0.778 of the width, and all of the height
    assert int(wide[0, 24, 0]) == pytest.approx(0.222 * 255, abs=3)
    assert int(wide[0, 24, -1]) == pytest.approx(0.778 * 255, abs=3)
    assert int(wide[1, 0, 40]) <= 4 and int(wide[1, -1, 40]) >= 251


def test_random_crops_move_along_the_longer_side(folder: Path) -> None:
    data = open_folder(folder, crop="random")
    assert torch.equal(data.load(3).image, open_folder(folder).load(3).image)  # nothing juts out
    firsts = [
        int(data.load(0, torch.Generator().manual_seed(seed)).image[0, 24, 0]) for seed in range(80)
    ]
    assert min(firsts) < 12 and 95 < max(firsts) <= 0.444 * 255 + 2


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="resolution 64 is not a multiple of buckets.multiple 48"):
        open_folder(Path("x"), buckets={"multiple": 48})
    with pytest.raises(ConfigError, match="balance: goes with squares alone"):
        open_folder(Path("x"), balance="class")
