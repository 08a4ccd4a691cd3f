"""The pictures that requests begin from: known by what they are, opened where they lie."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.generation.request import InputImage

__all__ = ["InputPictures", "pixel_sum", "to_colour", "to_grey", "to_pixels", "to_values"]

Picture = str | Path | Image.Image


def pixel_sum(picture: Image.Image) -> str:
    """Return the sha256 that identifies a picture without a file: of its mode, size and pixels.

    Where pixels are numbers of colours, the colours count too.
    """
    head = f"{picture.mode} {picture.width}x{picture.height}"
    if picture.mode in ("P", "PA"):
        head += f" {picture.getpalette()}"
    if (clear := picture.info.get("transparency")) is not None:
        head += f" {clear!r}"
    return hashlib.sha256(f"{head}\n".encode() + picture.tobytes()).hexdigest()


class InputPictures:
    """Pictures by their sums. A request names sums; this finds the pixels.

    Example:
        >>> pictures = InputPictures()
        >>> named = pictures.add(Image.new("RGB", (8, 8), "red"))
        >>> pictures.get(named).getpixel((0, 0))
        (255, 0, 0)
    """

    def __init__(self) -> None:
        self._known: dict[str, Image.Image] = {}

    def add(self, picture: Picture) -> InputImage:
        """Take a picture in, and return what a request says of it.

        Args:
            picture: A file, or a picture in memory.

        Raises:
            RequestError: If there is no such file, or it is no picture.
        """
        if isinstance(picture, Image.Image):
            settled = _settle(picture, "the picture")
            sum_ = pixel_sum(settled)
            self._known[sum_] = settled
            return InputImage(sha256=sum_, of="pixels")
        path = Path(picture)
        content = _read(path)
        sum_ = hashlib.sha256(content).hexdigest()
        opened = _open(content, path)
        self._known[sum_] = opened
        # the same picture from memory is known by its pixels
        self._known[pixel_sum(opened)] = opened
        return InputImage(sha256=sum_, path=str(path))

    def get(self, wanted: InputImage) -> Image.Image:
        """Return a picture that a request names.

        Raises:
            RequestError: If it was not taken in and is not where the request says, or the file
                there has other bytes.
        """
        if wanted.sha256 in self._known:
            return self._known[wanted.sha256]
        what = f"the input picture with the sha256 {wanted.sha256[:12]}…"
        if wanted.path is None:
            raise RequestError(f"{what} came from memory: supply it with --input FILE")
        path = Path(wanted.path)
        if not path.is_file():
            raise RequestError(f"{path}: no such file; supply {what} with --input FILE")
        found = self.add(path)
        if found.sha256 != wanted.sha256:
            raise RequestError(
                f"{path}: refused: its sha256 is {found.sha256[:12]}…, but the request was made"
                f" with {wanted.sha256[:12]}…; supply that picture with --input FILE"
            )
        return self._known[wanted.sha256]

    def supply(self, picture: Path, wanted: list[InputImage]) -> None:
        """Take in a file that stands for one of a request's inputs.

        Raises:
            RequestError: If it is none of them.
        """
        named = self.add(picture)
        either = {named.sha256, pixel_sum(self._known[named.sha256])}
        if not any(item.sha256 in either for item in wanted):
            sums = ", ".join(f"{item.sha256[:12]}…" for item in wanted) or "none"
            raise RequestError(
                f"{picture}: refused: it is no input of this request, whose inputs are {sums}"
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None


def _open(content: bytes, path: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as file:
            return _settle(file, str(path))
    except RequestError:
        raise
    except Image.UnidentifiedImageError:
        raise RequestError(f"{path}: is no picture that can be read") from None
    # decoders raise what they please on damaged files
    except Exception as error:
        raise RequestError(f"{path}: is no picture that can be read: {error}") from None


def _settle(picture: Image.Image, name: str) -> Image.Image:
    """A copy that stands upright, of at most 8 bits a channel."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):
        values = np.asarray(upright)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise RequestError(f"{name}: its grey values go beyond 16 bits")
        return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
    if upright.mode == "F":
        raise RequestError(f"{name}: floating-point pixels have no known range; store 8 or 16 bits")
    return upright.copy()


def to_colour(picture: Image.Image) -> Image.Image:
    """Turn a picture into RGB, or RGBA if something of it is transparent."""
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def to_grey(mask: Image.Image) -> Image.Image:
    """Turn a mask into grey values; what is transparent is black."""
    if mask.has_transparency_data:
        seen = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", seen.size, "black"), seen)
    return mask.convert("L")


def to_pixels(picture: Image.Image) -> Tensor:
    """Turn a picture into ``(3, H, W)`` in -1..1; what is transparent is white."""
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    values = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1)


def to_values(picture: Image.Image, name: str) -> Tensor:
    """Turn a picture of grey values or of a palette's indices into ``(H, W)`` int64, 0..255.

    Raises:
        RequestError: If it has more than one channel.
    """
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode not in ("L", "P"):
        raise RequestError(
            f"{name}: expected a picture of grey values or with a palette, whose values are the"
            f" classes; got mode {picture.mode}"
        )
    return torch.from_numpy(np.array(picture, dtype=np.int64))
