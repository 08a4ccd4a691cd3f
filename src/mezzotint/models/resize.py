"""How images are brought to a feature network's size: what moves FID most between programs."""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Resize", "resize_images"]

Resize = Literal["bicubic-antialias", "tf1-bilinear", "pil-bicubic"]


def resize_images(images: Tensor, size: int, mode: Resize) -> Tensor:
    """Resize images to squares.

    Args:
        images: ``(B, 3, H, W)`` float32 in 0..255.
        size: Side in pixels.
        mode: ``bicubic-antialias`` is torch's filter. ``tf1-bilinear`` is TensorFlow 1's, in which
            pixel i of n comes from ``i H / n`` and not from centre to centre, and which does not
            average when it shrinks; the canonical FID has it. ``pil-bicubic`` is Pillow's filter on
            each channel in floating point, as in clean-fid (arXiv 2104.11222). Bicubic filters
            overshoot at edges and are clipped there, as 8-bit images would be; none is rounded.

    Returns:
        ``(B, 3, size, size)`` float32 in 0..255; images of that size are left alone.
    """
    if images.shape[2:] == (size, size):
        return images
    match mode:
        case "bicubic-antialias":
            resized = F.interpolate(
                images, (size, size), mode="bicubic", antialias=True, align_corners=False
            )
        case "tf1-bilinear":
            return _tf1_bilinear(images, size)
        case "pil-bicubic":
            resized = _pil_bicubic(images, size)
    return resized.clamp(0.0, 255.0)


def _tf1_bilinear(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    above, below, down = _corners(height, size, images.device)
    left, right, across = _corners(width, size, images.device)
    rows = torch.lerp(images[:, :, above], images[:, :, below], down[:, None])
    return torch.lerp(rows[..., left], rows[..., right], across)


def _corners(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each new one lies between, and its place between them in 0..1."""
    place = torch.arange(size, dtype=torch.float32, device=device) * (length / size)
    before = place.floor().long().clamp(max=length - 1)
    return before, (before + 1).clamp(max=length - 1), place - before


def _pil_bicubic(images: Tensor, size: int) -> Tensor:
    planes = images.flatten(0, 1).cpu().numpy()
    resized = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    return torch.from_numpy(np.stack(resized)).view(-1, 3, size, size).to(images.device)
