"""Stored images of a user, decoded once and cut to a view: what data sets of files share."""

import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mezzotint.data.base import Fault
from mezzotint.data.decoding import DecodedImage, Pixels, frame_size
from mezzotint.errors import DataError

__all__ = [
    "ImageFile",
    "ImageFiles",
    "Stored",
    "View",
    "check_faults",
    "choose_view",
    "cut",
    "existing_folder",
    "missing_path",
    "one_line",
    "seen_share",
]

_AT_ONCE = 512  # files handed to the threads before their results are taken
_NAMED = 3  # broken files that an error names


def existing_folder(path: str) -> Path:
    """Return a folder that a user names.

    Raises:
        DataError: Naming the nearest that exists, if it doesn't.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        reason = "is a file, not a folder" if root.is_file() else "no such folder"
        raise DataError(f"{root}: {reason}{missing_path(root)}")
    return root


def missing_path(missing: Path, *, files: bool = False) -> str:
    """Return a clause that names the nearest sibling of a path that doesn't exist.

    Args:
        missing: The path.
        files: Whether it may be a file.
    """
    place = missing.absolute()
    while not place.parent.is_dir():
        place = place.parent
    names = [p.name for p in place.parent.iterdir() if files or p.is_dir()]
    close = difflib.get_close_matches(place.name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {place.parent / close[0]}?"
    return f"; {place.parent} is the nearest that exists"


class Stored(Protocol):
    """An image whose bytes can be read any number of times: a file, a row, a part of a shard."""

    @property
    def name(self) -> str:
        """What messages call it, inside its data set."""
        ...

    @property
    def place(self) -> str:
        """Where it is."""
        ...

    def read(self) -> bytes:
        """Return the bytes of the image file; from several threads at once."""
        ...


class ImageFile(NamedTuple):
    """Where an image is, and what messages call it."""

    path: Path
    name: str

    @property
    def place(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return self.path.read_bytes()


class ImageFiles:
    """The pixels of files that could be decoded, in memory if they fit.

    Every file is decoded once when this is made, so that broken ones are known before training
    begins.

    Args:
        files: Which.
        decode: From the bytes of a file to its pixels; whatever it raises is a fault.
        limit_mib: Pixels are kept in memory up to this.

    Attributes:
        whole: The positions in ``files`` of those that are whole; other indices count only these.
        sizes: Width and height of each as it was stored, upright.
        faults: The others, and why.
        digests: SHA-256 of the bytes of each.
        digest: Hash of the bytes of all.
    """

    def __init__(
        self,
        files: Sequence[Stored],
        decode: Callable[[bytes], DecodedImage],
        limit_mib: float,
    ) -> None:
        self.whole: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.faults: list[Fault] = []
        self._decode = decode
        self._files: list[Stored] = []
        self._kept: list[Pixels] | None = []
        self.digests: list[bytes] = []
        room = limit_mib * 2**20
        for position, (file, result) in enumerate(
            zip(files, _in_threads(files, decode), strict=True)
        ):
            if isinstance(result, str):
                self.faults.append(Fault(file.name, result))
                continue
            self.whole.append(position)
            self._files.append(file)
            self.sizes.append((result.image.width, result.image.height))
            self.digests.append(result.digest)
            room -= result.image.pixels.nbytes
            if room < 0:
                self._kept = None
            if self._kept is not None:
                self._kept.append(result.image.pixels)
        # of all that were whole, whatever is selected of them
        self.digest = hashlib.sha256(b"".join(self.digests)).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels fit."""
        return self._kept is not None

    def select(self, indices: Sequence[int]) -> None:
        """Keep only some of the whole files, in this order; the digest stays."""
        self.whole = [self.whole[k] for k in indices]
        self.sizes = [self.sizes[k] for k in indices]
        self._files = [self._files[k] for k in indices]
        self.digests = [self.digests[k] for k in indices]
        if self._kept is not None:
            self._kept = [self._kept[k] for k in indices]

    def content(self, index: int, seen: Mapping[str, object]) -> str:
        """Return a hash of a file's bytes.

        Args:
            index: Of the file.
            seen: How it is seen, which is part of the hash.
        """
        told = json.dumps(seen, sort_keys=True)
        return hashlib.sha256(self.digests[index] + told.encode()).hexdigest()

    def pixels(self, index: int) -> Pixels:
        """Return what ``decode`` gave for a file: ``(H, W, 3)`` or ``(H, W)`` uint8.

        Raises:
            DataError: If the pixels are not in memory and the file has gone since.
        """
        if self._kept is not None:
            return self._kept[index]
        file = self._files[index]
        result = _read(file, self._decode)
        if isinstance(result, str):
            raise DataError(f"{file.place}: {result}; it was whole when the data were opened")
        return result.image.pixels


class View(NamedTuple):
    """Which part of decoded pixels is seen, and whether mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def choose_view(
    height: int,
    width: int,
    size: int | tuple[int, int],
    flip: bool,
    generator: torch.Generator | None,
) -> View:
    """Choose a part of a picture.

    Args:
        height: Of the decoded pixels.
        width: Of the decoded pixels.
        size: Side of a square, or height and width.
        flip: Whether it may be mirrored.
        generator: Decides the view by three draws; without one it is the central part.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    down, right = height - high, width - wide
    if generator is None:
        return View(down // 2, right // 2, high, wide, mirrored=False)
    draws: list[float] = torch.rand(3, generator=generator).tolist()
    top, left = int(draws[0] * (down + 1)), int(draws[1] * (right + 1))
    return View(top, left, high, wide, flip and draws[2] < 0.5)


def cut(pixels: Pixels, view: View) -> Tensor:
    """Return a view as a tensor: ``(3, h, w)`` of a picture, ``(h, w)`` of a map."""
    seen = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    if view.mirrored:
        seen = seen[:, ::-1]
    channels_first = np.moveaxis(seen, -1, 0) if seen.ndim == 3 else seen
    # a copy, even of a whole map: what is kept in memory must not be written to
    return torch.from_numpy(np.array(channels_first, order="C"))


def seen_share(
    width: int, height: int, view: View, *, square: bool
) -> tuple[float, float, float, float]:
    """Say which part of a whole picture a view shows.

    Args:
        width: Of the picture as it was stored.
        height: Of the picture as it was stored.
        view: A square of its decoded pixels.
        square: Whether only the central square was decoded.

    Returns:
        Left, top, width and height of that part, as shares of the picture's width and height.

    Example:
        >>> seen_share(200, 100, View(0, 0, 64, 64, mirrored=False), square=True)
        (0.25, 0.0, 0.5, 1.0)
    """
    if square:
        short = min(width, height)
        return (1 - short / width) / 2, (1 - short / height) / 2, short / width, short / height
    wide, high = frame_size(width, height, view.height)
    return view.left / wide, view.top / high, view.width / wide, view.height / high


def check_faults(
    where: object, faults: Sequence[Fault], whole: int, max_broken: float, what: str = "images"
) -> None:
    """Refuse data of which too much is broken.

    Args:
        where: What the message calls the data.
        faults: What is broken.
        whole: How many are not.
        max_broken: Share of all that may be broken.
        what: What they are.

    Raises:
        DataError: Naming the first few, if they are too many or nothing is whole.
    """
    total = whole + len(faults)
    if whole and len(faults) <= max_broken * total:
        return
    named = ", ".join(f"{fault.name} ({fault.reason})" for fault in faults[:_NAMED])
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    raise DataError(
        f"{where}: {len(faults)} of {total} {what} are broken ({len(faults) / total:.1%};"
        f" max_broken allows {max_broken:.1%}): {named}{more}; mend or remove them, or raise"
        " max_broken"
    )


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Read(NamedTuple):
    image: DecodedImage
    digest: bytes


def _in_threads(
    files: Sequence[Stored], decode: Callable[[bytes], DecodedImage]
) -> Iterator["_Read | str"]:
    # Pillow warns of untidy metadata in pictures that it reads well; the filter is the process's,
    # so it is set here once and not in the threads
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        for start in range(0, len(files), _AT_ONCE):
            part = files[start : start + _AT_ONCE]
            yield from pool.map(lambda file: _read(file, decode), part)


def _read(file: Stored, decode: Callable[[bytes], DecodedImage]) -> "_Read | str":
    """The pixels of a file, or why there are none."""
    try:
        content = file.read()
        return _Read(decode(content), hashlib.sha256(content).digest())
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # a damaged file makes decoders raise anything
        return one_line(error)
