"""What is to be drawn anew: random masks for training inpainting (paper, section 4.5)."""

import math
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field, model_validator
from torch import Tensor

from mezzotint.config import Config
from mezzotint.data.chance import Chance

__all__ = ["MaskConfig", "MaskKind", "draw_mask"]

MaskKind = Literal["box", "strokes", "wide", "border"]


class MaskConfig(Config):
    """Which masks are drawn, and how much of the picture they cover.

    A ``box`` is one rectangle. ``strokes`` are many thin lines. ``wide`` are thick broken lines or
    several rectangles: the two settings follow the thin and the wide masks of LaMa (Suvorov et al.
    2021, arXiv 2109.07161), on whose masks the paper trains. ``border`` keeps an inner rectangle,
    or cuts off one side: outpainting.

    Attributes:
        kinds: Those that may be drawn.
        probabilities: One for each kind, of any sum; by default all are equally likely.
        min_area: Least share of the picture that is covered.
        max_area: Most.
        tries: Masks that are drawn before a plain rectangle of a fitting area is taken.
    """

    kinds: tuple[MaskKind, ...] = Field(default=("box", "strokes", "wide", "border"), min_length=1)
    probabilities: tuple[float, ...] | None = None
    min_area: float = Field(default=0.05, ge=0, lt=1)
    max_area: float = Field(default=0.6, gt=0, le=1)
    tries: int = Field(default=20, ge=1, le=1000)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds: one stands there twice: {', '.join(self.kinds)}")
        if self.min_area >= self.max_area:
            raise ValueError(
                f"min_area: expected less than max_area, which is {self.max_area},"
                f" got {self.min_area}"
            )
        weights = self.probabilities
        if weights is None:
            return self
        if len(weights) != len(self.kinds):
            raise ValueError(
                f"probabilities: expected one for each of the {len(self.kinds)} kinds,"
                f" got {len(weights)}"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise ValueError(
                f"probabilities: expected numbers of at least 0 and one above it, got"
                f" {list(weights)}"
            )
        return self


def draw_mask(config: MaskConfig, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a random mask.

    Args:
        config: Which masks there are.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        generator: Decides the mask, alone.

    Returns:
        ``(1, height, width)`` float32: 1 where to draw and 0 where to keep. Its area lies within
        the bounds wherever whole pixels allow that.

    Example:
        >>> config = MaskConfig(kinds=("box",), min_area=0.2, max_area=0.4)
        >>> mask = draw_mask(config, 64, 96, torch.Generator().manual_seed(0))
        >>> tuple(mask.shape), 0.2 <= float(mask.mean()) <= 0.4
        ((1, 64, 96), True)
    """
    chance = Chance(generator)
    # the kind stays through all tries: else kinds that seldom fit the bounds would become rarer
    kind = chance.choose(config.kinds, config.probabilities)
    canvas = _Canvas(height, width)
    for _ in range(config.tries):
        canvas.clear()
        _DRAW[kind](canvas, config, chance)
        if config.min_area <= canvas.area() <= config.max_area:
            return canvas.mask()
    canvas.clear()
    _fitting_box(canvas, config, chance)
    return canvas.mask()


class _Canvas:
    """A black picture on which white is drawn; lengths are shares of its shorter side."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.short = min(height, width)
        self._picture = Image.new("L", (width, height))
        self._draw = ImageDraw.Draw(self._picture)

    def clear(self) -> None:
        """Make it black."""
        self._draw.rectangle((0, 0, self.width, self.height), fill=0)

    def area(self) -> float:
        """Return the share that is white."""
        return np.count_nonzero(np.asarray(self._picture)) / (self.height * self.width)

    def mask(self) -> Tensor:
        """Return ``(1, H, W)`` float32, 1 where it is white."""
        return torch.from_numpy(np.asarray(self._picture) > 0).float()[None]

    def rectangle(self, left: int, top: int, width: int, height: int, fill: int = 255) -> None:
        """Fill a rectangle given in pixels."""
        if width > 0 and height > 0:
            # Pillow's rectangle includes its last row and column
            self._draw.rectangle((left, top, left + width - 1, top + height - 1), fill=fill)

    def line(self, points: list[tuple[float, float]], thickness: float) -> None:
        """Draw a broken line with round joints and ends, in pixels."""
        width = max(1, round(thickness))
        self._draw.line(points, fill=255, width=width)
        radius = (width - 1) / 2
        for x, y in points if width > 2 else ():
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _place(canvas: _Canvas, width: float, height: float, chance: Chance, fill: int = 255) -> None:
    """Fill a rectangle of a size in pixels at a random place inside the picture."""
    w = min(canvas.width, max(1, round(width)))
    h = min(canvas.height, max(1, round(height)))
    left, top = chance.whole(0, canvas.width - w), chance.whole(0, canvas.height - h)
    canvas.rectangle(left, top, w, h, fill)


def _sides(canvas: _Canvas, area: float, chance: Chance) -> tuple[float, float]:
    """Width and height of a rectangle of a share of the picture, less than it in both."""
    part = chance.uniform(0.3, 0.7)
    return canvas.width * area**part, canvas.height * area ** (1.0 - part)


def _box(canvas: _Canvas, config: MaskConfig, chance: Chance) -> None:
    area = chance.uniform(config.min_area, config.max_area)
    _place(canvas, *_sides(canvas, area, chance), chance)


def _strokes(canvas: _Canvas, config: MaskConfig, chance: Chance) -> None:
    for _ in range(chance.whole(4, 50)):
        _stroke(canvas, chance, longest=0.16, thickest=0.04)


def _wide(canvas: _Canvas, config: MaskConfig, chance: Chance) -> None:
    if chance.happens(0.5):
        for _ in range(chance.whole(1, 5)):
            _stroke(canvas, chance, longest=0.8, thickest=0.4)
        return
    for _ in range(chance.whole(1, 4)):
        width, height = (chance.uniform(0.12, 0.6) * canvas.short for _ in range(2))
        _place(canvas, width, height, chance)


def _stroke(canvas: _Canvas, chance: Chance, longest: float, thickest: float) -> None:
    """A walk of a few straight parts; lengths are shares of the shorter side, at most."""
    x, y = chance.uniform(0, canvas.width), chance.uniform(0, canvas.height)
    heading = chance.uniform(0, 2 * math.pi)
    points = [(x, y)]
    for _ in range(chance.whole(1, 5)):
        heading += chance.uniform(-0.75, 0.75) * math.pi
        length = chance.uniform(longest / 5, longest) * canvas.short
        x = min(max(x + length * math.cos(heading), 0.0), float(canvas.width))
        y = min(max(y + length * math.sin(heading), 0.0), float(canvas.height))
        points.append((x, y))
    canvas.line(points, chance.uniform(thickest / 5, thickest) * canvas.short)


def _border(canvas: _Canvas, config: MaskConfig, chance: Chance) -> None:
    area = chance.uniform(config.min_area, config.max_area)
    canvas.rectangle(0, 0, canvas.width, canvas.height)
    if chance.happens(0.5):
        _place(canvas, *_sides(canvas, 1.0 - area, chance), chance, fill=0)
        return
    kept_wide, kept_high = canvas.width, canvas.height
    left = top = 0
    if chance.happens(0.5):
        kept_wide = round(canvas.width * (1.0 - area))
        left = chance.choose((0, canvas.width - kept_wide))
    else:
        kept_high = round(canvas.height * (1.0 - area))
        top = chance.choose((0, canvas.height - kept_high))
    canvas.rectangle(left, top, kept_wide, kept_high, fill=0)


def _fitting_box(canvas: _Canvas, config: MaskConfig, chance: Chance) -> None:
    """A rectangle somewhere: of those that fit the bounds the squarest, else the nearest."""
    pixels = canvas.width * canvas.height
    wanted = (config.min_area + config.max_area) / 2 * pixels
    sizes = [(w, max(1, round(wanted / w))) for w in range(1, canvas.width + 1)]

    def unfit(size: tuple[int, int]) -> tuple[float, int]:
        width, height = size
        fits = config.min_area <= width * height / pixels <= config.max_area
        return 0.0 if fits else abs(width * height - wanted), abs(width - height)

    width, height = min((s for s in sizes if s[1] <= canvas.height), key=unfit)
    _place(canvas, width, height, chance)


_DRAW = {"box": _box, "strokes": _strokes, "wide": _wide, "border": _border}
