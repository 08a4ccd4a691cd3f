"""Pictures in the panels of a figure."""

import functools
import io
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mezzotint.data.emoji import emoji_image

__all__ = ["emoji", "pixels", "show", "webp"]

_COLOURS = 200  # a PNG of a palette is a third of one of all colours


@functools.cache
def emoji(name: str, size: int) -> Tensor:
    """Return an emoji on white, ``(3, size, size)`` in -1..1."""
    picture = emoji_image(name, size)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    values = np.asarray(white.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """Return an image ``(3, H, W)`` in -1..1 as bytes ``(H, W, 3)``; what lies beyond is cut."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def show(panel: Axes, picture: np.ndarray[Any, Any], **options: Any) -> None:
    """Put a picture into a panel, without axes."""
    panel.imshow(picture, interpolation="nearest", **options)
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set_visible(False)


def webp(figure: Figure) -> bytes:
    """Return a figure in few colours as a WebP file without loss."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    picture = Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    small = io.BytesIO()
    picture.convert("RGB").save(small, format="WEBP", lossless=True, method=6)
    return small.getvalue()
