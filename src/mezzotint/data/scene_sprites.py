"""Emoji cut out and resized, and how they are laid over a picture."""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mezzotint.data.emoji import Style, emoji_image

__all__ = ["Sprite", "cut_out", "lay_over", "mark"]

_SOLID = 128  # alpha from which on a pixel is the object's: more than half opaque


class Sprite(NamedTuple):
    """A resized emoji without empty rows and columns around it.

    Attributes:
        pixels: ``(h, w, 4)`` uint8, red, green and blue premultiplied by the alpha that follows.
        left: First column of its solid part, which is more than half opaque.
        top: Likewise the row.
        width: Of the solid part.
        height: Of the solid part.
    """

    pixels: NDArray[np.uint8]
    left: int
    top: int
    width: int
    height: int

    @property
    def flipped(self) -> "Sprite":
        """The same, mirrored left to right."""
        left = self.pixels.shape[1] - self.left - self.width
        return self._replace(pixels=self.pixels[:, ::-1], left=left)


def cut_out(name: str, style: Style, size: int) -> Sprite:
    """Resize an emoji until the longer side of its solid part is about ``size``; thin ends fade."""
    picture = _stored(name, style)
    left, top, right, bottom = _bounds(np.asarray(picture)[..., 3] >= _SOLID)
    side = max(1, round(picture.width * size / max(right - left, bottom - top)))
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.array(picture)
    # Lanczos may overshoot, and premultiplied colour would then exceed its alpha
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
    left, top, right, bottom = _bounds(pixels[..., 3] > 0)
    pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
    left, top, right, bottom = _bounds(pixels[..., 3] >= _SOLID)
    return Sprite(pixels, left, top, right - left, bottom - top)


@functools.lru_cache(maxsize=256)
def _stored(name: str, style: Style) -> Image.Image:
    """The stored picture with premultiplied alpha, in which pixels mix."""
    return emoji_image(name, style=style).convert("RGBa")


def _bounds(solid: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is true; the last two are exclusive."""
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def lay_over(pixels: NDArray[np.uint8], sprite: Sprite, left: int, top: int) -> None:
    """Composite a sprite onto a picture, in place.

    Args:
        pixels: ``(H, W, 3)`` uint8.
        sprite: What is laid over it; what lies outside is cut off.
        left: Column at which its pixels begin; may be negative.
        top: Likewise the row.
    """
    seen, drawn = _windows(sprite.pixels, left, top, len(pixels))
    part = sprite.pixels[drawn]
    behind = pixels[seen] * (255 - part[..., 3:].astype(np.uint16))
    pixels[seen] = part[..., :3] + ((behind + 127) // 255).astype(np.uint8)


def mark(classes: NDArray[np.uint8], sprite: Sprite, left: int, top: int, value: int) -> None:
    """Write a value, in place, where a sprite is solid; see `lay_over`.

    Args:
        classes: ``(H, W)`` uint8.
        sprite: What is laid over it.
        left: Column at which its pixels begin.
        top: Likewise the row.
        value: From 0 to 255.
    """
    seen, drawn = _windows(sprite.pixels, left, top, len(classes))
    classes[seen][sprite.pixels[drawn][..., 3] >= _SOLID] = value


def _windows(
    sprite: NDArray[np.uint8], left: int, top: int, side: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a picture that a sprite covers, and the part of the sprite that is inside."""
    height, width = sprite.shape[:2]
    bottom, right = min(side, top + height), min(side, left + width)
    seen = slice(max(0, top), bottom), slice(max(0, left), right)
    drawn = slice(max(0, -top), bottom - top), slice(max(0, -left), right - left)
    return seen, drawn
