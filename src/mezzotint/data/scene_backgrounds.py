"""What scenes stand on: soft colours and patterns, drawn from arithmetic alone."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mezzotint.data.chance import Chance
from mezzotint.data.wording import with_article
from mezzotint.rng import keyed_generator

__all__ = ["COLOURS", "GROUNDS", "PATTERNED", "Background", "Ground", "Kind", "draw_background"]
__all__ += ["paint", "plain_background"]

Ground = Literal["plain", "gradient", "texture"]
Kind = Literal["plain", "gradient", "noise", "stripes", "checks", "dots"]
RGB = tuple[int, int, int]

GROUNDS: dict[Ground, tuple[Kind, ...]] = {
    "plain": ("plain",),
    "gradient": ("gradient",),
    "texture": ("noise", "stripes", "checks", "dots"),
}
PATTERNED: tuple[Kind, ...] = ("gradient", "noise", "stripes", "checks", "dots")
_ADJECTIVES: dict[Kind, str] = {
    "plain": "",
    "gradient": "gradient ",
    "noise": "cloudy ",
    "stripes": "striped ",
    "checks": "checked ",
    "dots": "dotted ",
}
# light and weak enough that emoji, which are strongly coloured, stand out from all of them
COLOURS: dict[str, RGB] = {
    "blue": (166, 196, 235),
    "green": (172, 214, 172),
    "yellow": (241, 227, 156),
    "pink": (245, 190, 208),
    "purple": (203, 184, 236),
    "orange": (249, 206, 160),
    "grey": (196, 199, 205),
}
_JITTER = 6  # of 255
_LIGHTEN, _DARKEN = 0.35, 0.08  # a pattern's two shades, of the colour's way to white and to black
_RADIUS = 0.27  # of a dot, in periods
_CELLS = 5  # of smooth noise, along a side
_NOISE = 0x6E01


@dataclass(frozen=True, slots=True)
class Background:
    """All that decides a background.

    Attributes:
        kind: The pattern.
        colour: The name of its colour.
        shades: The two colours that it mixes, light and dark, as red, green and blue from 0 to
            255; twice the same if it is plain.
        angle: Of the pattern, in radians.
        period: Of stripes, checks and dots, as a share of the side.
        phase: Where the pattern begins, in periods, across and along.
        seed: Of the noise.
    """

    kind: Kind
    colour: str
    shades: tuple[RGB, RGB]
    angle: float
    period: float
    phase: tuple[float, float]
    seed: int

    @property
    def caption(self) -> str:
        """What it is called, such as ``"a blue striped background"``."""
        return with_article(f"{self.colour} {_ADJECTIVES[self.kind]}background")


def draw_background(
    kind: Kind, chance: Chance, colours: Sequence[str] = tuple(COLOURS)
) -> Background:
    """Draw a background of one kind, in one of some colours."""
    colour = chance.choose(colours)
    middle = [part + chance.uniform(-_JITTER, _JITTER) for part in COLOURS[colour]]
    light = _rgb([part + _LIGHTEN * (255 - part) for part in middle])
    dark = _rgb([part * (1 - _DARKEN) for part in middle])
    turns = 8 if kind == "gradient" else 4
    return Background(
        kind=kind,
        colour=colour,
        shades=(_rgb(middle), _rgb(middle)) if kind == "plain" else (light, dark),
        angle=chance.whole(0, turns - 1) * 2 * math.pi / 8,
        period=chance.uniform(1 / 8, 1 / 4),
        phase=(chance.share(), chance.share()),
        seed=chance.whole(0, 2**31 - 1),
    )


def plain_background(colour: str) -> Background:
    """Return a plain background of a named colour as it is in the middle of its draws, or white."""
    shade = (255, 255, 255) if colour == "white" else COLOURS[colour]
    return Background("plain", colour, (shade, shade), 0.0, 0.0, (0.0, 0.0), 0)


def _rgb(parts: list[float]) -> RGB:
    red, green, blue = (min(255, max(0, round(part))) for part in parts)
    return red, green, blue


def paint(background: Background, side: int) -> NDArray[np.uint8]:
    """Paint a background.

    Args:
        background: What to paint.
        side: Pixels of a side.

    Returns:
        ``(side, side, 3)`` uint8, sRGB.
    """
    light, dark = (np.asarray(shade, np.float32) for shade in background.shades)
    if background.kind == "plain":
        return np.full((side, side, 3), background.shades[0], np.uint8)
    mixed = light + _pattern(background, side)[..., None] * (dark - light)
    return (mixed + 0.5).astype(np.uint8)


def _pattern(background: Background, side: int) -> NDArray[np.float32]:
    """The dark shade's share of every pixel; edges are one pixel wide, as if antialiased."""
    if background.kind == "noise":
        return _smooth_noise(background.seed, side)
    places = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    cosine, sine = math.cos(background.angle), math.sin(background.angle)
    across = places[None, :] * cosine + places[:, None] * sine
    along = places[:, None] * cosine - places[None, :] * sine
    if background.kind == "gradient":
        return (across / (abs(cosine) + abs(sine)) + 0.5).astype(np.float32)
    u, v = across / background.period + background.phase[0], along / background.period
    v = v + background.phase[1]
    pixels = background.period * side  # of a period
    if background.kind == "dots":
        distance = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
        return np.clip((_RADIUS - distance) * pixels + 0.5, 0, 1).astype(np.float32)
    wave = np.sin(2 * math.pi * u)
    if background.kind == "checks":
        wave = wave * np.sin(2 * math.pi * v)
    return np.clip(wave * (pixels / (2 * math.pi)) + 0.5, 0, 1).astype(np.float32)


def _smooth_noise(seed: int, side: int) -> NDArray[np.float32]:
    grid = torch.rand(_CELLS + 1, _CELLS + 1, generator=keyed_generator(_NOISE, seed)).numpy()
    weights = _between(side)
    return weights @ grid @ weights.T


@functools.lru_cache(maxsize=16)
def _between(side: int) -> NDArray[np.float32]:
    """Smooth interpolation of a line of grid points at every pixel, ``(side, _CELLS + 1)``."""
    places = (np.arange(side, dtype=np.float32) + 0.5) / side * _CELLS
    share = np.clip(1 - np.abs(places[:, None] - np.arange(_CELLS + 1)), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)
