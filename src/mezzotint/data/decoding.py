"""Image files of any kind to 8-bit RGB pixels, upright and at a resolution; maps to classes."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

__all__ = [
    "PICTURE_SUFFIXES",
    "DecodedImage",
    "Pixels",
    "decode_image",
    "decode_map",
    "decode_to_cover",
    "frame_size",
    "read_image",
]

Pixels = npt.NDArray[np.uint8]
PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
)

_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class DecodedImage(NamedTuple):
    """Pixels at a resolution, and the size that the picture had, upright.

    Attributes:
        pixels: ``(H, W, 3)``, or ``(H, W)`` of a map.
        width: Of the whole picture as it was stored, in pixels.
        height: Likewise.
    """

    pixels: Pixels
    width: int
    height: int


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
    return decode_image(content, resolution, square).pixels


def decode_image(content: bytes, resolution: int, square: bool) -> DecodedImage:
    """Decode an image file; see `read_image`."""

    def frame(width: int, height: int) -> tuple[int, int]:
        return (resolution, resolution) if square else frame_size(width, height, resolution)

    return _decode(content, frame, square)


def decode_to_cover(
    content: bytes, size_of: Callable[[int, int], tuple[int, int]], exact: bool
) -> DecodedImage:
    """Decode an image file and shrink or stretch it until it just covers a size, antialiased.

    Args:
        content: The bytes of the file.
        size_of: From the picture's width and height, upright, to the width and height to cover.
        exact: Whether to cut off what juts out on two sides.

    Raises:
        ValueError: If its pixels have no known range, as floating-point ones.
        OSError: If it is damaged, or no image. Decoders may raise others.
    """

    def frame(width: int, height: int) -> tuple[int, int]:
        wide, high = size_of(width, height)
        if exact:
            return wide, high
        scale = max(wide / width, high / height)
        return max(wide, round(width * scale)), max(high, round(height * scale))

    return _decode(content, frame, exact)


def _decode(
    content: bytes, frame: Callable[[int, int], tuple[int, int]], crop: bool
) -> DecodedImage:
    """Decode to the size of a frame: the central part of its proportions, or all."""
    with Image.open(io.BytesIO(content)) as picture:
        stored = picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
        width, height = stored[::-1] if turned else stored
        wide, high = frame(width, height)
        # JPEG can decode at a fraction of its size; half of it stays for the antialiasing
        factor = min(width // (2 * wide), height // (2 * high))
        if factor >= 2:
            picture.draft(None, (picture.width // factor, picture.height // factor))
        upright = _to_rgb(ImageOps.exif_transpose(picture))
    seen = _resize(upright, (wide, high), crop, Image.Resampling.LANCZOS)
    return DecodedImage(np.asarray(seen), width, height)


def decode_map(
    content: bytes, resolution: int, square: bool, table: npt.NDArray[np.int16]
) -> DecodedImage:
    """Decode a picture whose values are classes, cut as `read_image` cuts and never mixed.

    Args:
        content: The bytes of the file: grey of 8 or 16 bits, a palette whose indices count, or
            colour whose channels are equal.
        resolution: Pixels of the short side.
        square: Whether to keep only the central square.
        table: What each value becomes, 0 to 255; -1 where there is no such value.

    Returns:
        ``pixels`` are ``(H, W)`` uint8.

    Raises:
        ValueError: If the picture is of another kind, or a value has no meaning.
        OSError: If it is damaged, or no image. Decoders may raise others.
    """
    with Image.open(io.BytesIO(content)) as picture:
        if picture.format == "JPEG":
            raise ValueError("is a JPEG, which does not keep classes; store maps as PNG")
        values = _class_values(picture)
    height, width = values.shape
    known = (values >= 0) & (values < len(table))
    if not known.all() or (table[values] < 0).any():
        wrong = values[~known] if not known.all() else values[table[values] < 0]
        raise ValueError(f"has the value {int(wrong[0])}, which is no class")
    classes = Image.fromarray(table[values].astype(np.uint8))
    size = (resolution, resolution) if square else frame_size(width, height, resolution)
    seen = _resize(classes, size, square, Image.Resampling.NEAREST)
    return DecodedImage(np.asarray(seen), width, height)


def frame_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return the ``(width, height)`` that a picture has once its short side is a resolution.

    Example:
        >>> frame_size(640, 480, 240)
        (320, 240)
    """
    short = min(width, height)
    return (
        max(resolution, round(width * resolution / short)),
        max(resolution, round(height * resolution / short)),
    )


def _resize(
    picture: Image.Image, size: tuple[int, int], crop: bool, how: Image.Resampling
) -> Image.Image:
    """Bring a picture, or the largest central part of a size's proportions, to the size."""
    if not crop:
        return picture.resize(size, how)
    (width, height), (wide, high) = picture.size, size
    scale = min(width / wide, height / high)
    left, top = max(0.0, width - wide * scale) / 2, max(0.0, height - high * scale) / 2
    return picture.resize(size, how, box=(left, top, width - left, height - top))


def _class_values(picture: Image.Image) -> npt.NDArray[np.int32]:
    if picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
        return np.asarray(picture).astype(np.int32)
    if picture.mode not in ("RGB", "RGBA", "LA"):
        raise ValueError(
            f"pixels of mode {picture.mode} are no classes; store 8 or 16 bits of grey"
        )
    channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    if (channels != channels[..., :1]).any():
        raise ValueError("is in colour; expected grey values or a palette's indices as classes")
    return channels[..., 0]


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
