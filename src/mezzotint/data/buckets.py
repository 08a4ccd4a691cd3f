"""Sizes of about one area and several aspect ratios, of which each image is given the nearest.

A batch whose images are all of one size need not be of squares, so that nobody's head is cropped
off (NovelAI, "Improvements on Stable Diffusion", 2022).
"""

import math
from collections.abc import Sequence

from pydantic import Field

from mezzotint.config import Config

__all__ = ["BucketsConfig", "bucket_sizes", "nearest_bucket"]


class BucketsConfig(Config):
    """Which aspect ratios images are brought to.

    Attributes:
        multiple: Sides are multiples of so many pixels: f of the first stage times what the UNet
            halves, 64 for the public models.
        max_ratio: Of the longer side to the shorter; what is longer still is cropped.
    """

    multiple: int = Field(default=64, ge=1)
    max_ratio: float = Field(default=2.0, ge=1, le=16)


def bucket_sizes(resolution: int, config: BucketsConfig) -> tuple[tuple[int, int], ...]:
    """Return the sizes that are no larger than a square, from the tallest to the widest.

    Args:
        resolution: Side of the square whose area is not exceeded; a multiple of ``multiple``.
        config: Which ratios.

    Returns:
        ``(width, height)`` of each; the square is among them.

    Example:
        >>> bucket_sizes(256, BucketsConfig())
        ((192, 320), (256, 256), (320, 192))
    """
    step, area = config.multiple, resolution**2
    wide: dict[int, int] = {}  # height to the largest width beside it
    for width in range(resolution, int(resolution * config.max_ratio) + 1, step):
        height = area // width // step * step
        if height and width <= config.max_ratio * height:
            wide[height] = width
    across = [(width, height) for height, width in wide.items()]
    sizes = {*across, *((height, width) for width, height in across)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


def nearest_bucket(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Return the index of the size whose aspect ratio is nearest, by its logarithm.

    Args:
        width: Of the image.
        height: Of the image.
        sizes: As `bucket_sizes` gives them.

    Example:
        >>> nearest_bucket(1600, 900, bucket_sizes(256, BucketsConfig()))
        2
    """
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k][0] / sizes[k][1]) - ratio))
