"""An image file of any kind to 8-bit RGB pixels, upright and at a resolution."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

__all__ = ["Pixels", "read_image"]

Pixels = npt.NDArray[np.uint8]


def read_image(content: bytes, resolution: int, square: bool) -> Pixels:
    """Decode an image file and bring its short side to a resolution, antialiased.

    Args:
        content: The bytes of the file.
        resolution: Pixels of the short side.
        square: Whether to keep only the central square.

    Returns:
        ``(H, W, 3)`` uint8, sRGB.

    Raises:
        ValueError: If its pixels have no known range, as floating-point ones.
        OSError: If it is damaged, or no image. Decoders may raise others.
    """
    with Image.open(io.BytesIO(content)) as picture:
        short = min(picture.size)
        if short >= 4 * resolution:
            # JPEG can decode at a fraction of its size; half of it stays for the antialiasing
            factor = short // (2 * resolution)
            picture.draft(None, (picture.width // factor, picture.height // factor))
        upright = _to_rgb(ImageOps.exif_transpose(picture))
    width, height = upright.size
    short = min(width, height)
    if square:
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        size = (resolution, resolution)
    else:
        box = (0, 0, width, height)
        size = (
            max(resolution, round(width * resolution / short)),
            max(resolution, round(height * resolution / short)),
        )
    return np.asarray(upright.resize(size, Image.Resampling.LANCZOS, box=box))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"pixels of mode {picture.mode} have no known range; store 8 or 16 bits"
            )
        eight_bits = (values.astype(np.uint32) // 257).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return picture.convert("RGB")
