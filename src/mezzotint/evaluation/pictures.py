"""Pictures that are measured: a folder's as they are, or the emoji; by index, in any process."""

import difflib
import hashlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.decoding import PICTURE_SUFFIXES, read_image
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.device import threads
from mezzotint.errors import DataError, nearest
from mezzotint.evaluation.card import PictureRecord

__all__ = [
    "SPLITS",
    "EmojiPictures",
    "PictureFolder",
    "PictureSource",
    "evenly",
    "find_split",
    "near",
    "square",
    "write_sheet",
]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_NAMED = 3  # broken files that an error names
_MAX_BROKEN = 0.01  # as in training


class PictureSource(Protocol):
    """Pictures whose pixels are a pure function of the index; can be sent to another process."""

    @property
    def record(self) -> PictureRecord:
        """What the card says of them."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Return the pictures from ``start`` to before ``stop``: ``(B, 3, H, W)`` uint8, sRGB."""
        ...


def evenly(count: int, available: int) -> list[int]:
    """Choose ``count`` of ``available`` indices, rising and evenly spread.

    Example:
        >>> evenly(3, 9)
        [0, 3, 6]
    """
    count = min(count, available)
    return [k * available // count for k in range(count)]


def find_split(root: Path, split: str | None, default: str) -> tuple[Path, str | None]:
    """Find the part of a data set that is meant.

    Args:
        root: The folder of the data set.
        split: What the user asked for: ``train``, ``validation``, ``test``, a sub-folder's own
            name, or ``all``.
        default: The protocol's, used only if the folder has nothing but splits in it.

    Returns:
        The folder, and the name of the split; None if the folder has none.

    Raises:
        DataError: If there is no such split.
    """
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    names = {name for aliases in SPLITS.values() for name in aliases}
    if split is None and not (folders and folders <= names):
        return root, None
    wanted = split or default
    if wanted == "all":
        return root, "all"
    for name in (wanted, *SPLITS.get(wanted, ())):
        if name in folders:
            return root / name, name
    there = f"; {nearest(wanted, folders)}" if folders else ": it has no sub-folders"
    raise DataError(f"split: no folder {wanted!r} in {root}{there}")


class _File(NamedTuple):
    path: Path
    width: int
    height: int
    kind: str | None  # of conversion
    digest: bytes


class PictureFolder:
    """The pictures of a folder and its sub-folders, in the order of their names.

    Grey pictures become RGB, transparent ones are composited on white, and all are turned upright
    as their EXIF data say. With neither ``resolution`` nor ``like`` they must have one size, and
    are left as they are.

    Args:
        folder: Where they are.
        resolution: Side in pixels: each picture's central square is resized to it, antialiased.
        like: Height and width of pictures that these are compared with: if all have them they are
            left as they are, else they are brought to them as to a resolution.
        limit: At most this many, evenly spread.
        description: What the user called them.
        split: The part of a data set that they are.
        max_broken: Share of the files that may be broken; these are skipped and counted.

    Raises:
        DataError: If there is no picture, or more are broken; if their sizes differ where they must
            not, or cannot be brought to ``like``, which is no square.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resolution: int | None = None,
        like: tuple[int, int] | None = None,
        limit: int | None = None,
        description: str | None = None,
        split: str | None = None,
        max_broken: float = _MAX_BROKEN,
    ) -> None:
        paths = list_pictures(folder)
        if not paths:
            raise DataError(f"{folder}: no pictures in this folder (.png, .jpg, .webp and others)")
        chosen = evenly(limit, len(paths)) if limit is not None else range(len(paths))
        self._files, self._broken = _scan(folder, [paths[k] for k in chosen], max_broken)
        self._folder = folder
        if resolution is None and like is not None and not _all_have(self._files, like):
            resolution = square(like, description or str(folder))
        self._resolution = resolution
        self._size = (resolution, resolution) if resolution else _one_size(self._files)
        self._available = len(paths)
        self._description = description or str(folder)
        self._split = split

    def __len__(self) -> int:
        return len(self._files)

    @property
    def names(self) -> list[str]:
        """What each is called: its path in the folder."""
        return [str(file.path.relative_to(self._folder)) for file in self._files]

    @property
    def record(self) -> PictureRecord:
        """What the card says of them; the fingerprint is of bytes, order and size, not of names."""
        content = hashlib.sha256(f"pictures {self._size}".encode())
        converted: dict[str, int] = {}
        for file in self._files:
            content.update(file.digest)
            if file.kind is not None:
                converted[file.kind] = converted.get(file.kind, 0) + 1
        return PictureRecord(
            description=self._description,
            fingerprint=content.hexdigest(),
            count=len(self._files),
            available=self._available,
            height=self._size[0],
            width=self._size[1],
            split=self._split,
            converted=converted,
            broken=self._broken,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Return pictures; see `PictureSource.read`.

        Raises:
            DataError: If a file cannot be decoded; it is named.
        """
        files = self._files[start:stop]
        with warnings.catch_warnings(), ThreadPoolExecutor(threads()) as pool:
            warnings.simplefilter("ignore")  # of untidy metadata in pictures that are read well
            return torch.stack(list(pool.map(self._decode, files)))

    def _decode(self, file: _File) -> Tensor:
        side = self._resolution
        try:
            content = file.path.read_bytes()
            pixels = read_image(content, side or min(self._size), square=side is not None)
        except Exception as error:  # a damaged file makes decoders raise anything
            raise DataError(f"{file.path}: broken: {_one_line(error)}: mend or remove it") from None
        if pixels.shape[:2] != self._size:
            raise DataError(f"{file.path}: has changed since the folder was opened")
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class EmojiPictures:
    """Emoji in the middle of their background, as a validation sees them.

    Args:
        config: Which emoji, at which resolution.
        limit: At most this many, evenly spread.
    """

    def __init__(self, config: EmojiDataConfig, limit: int | None = None) -> None:
        self._data = EmojiData(config)
        self._config, self._limit = config, limit
        total = len(self._data)
        self._indices = evenly(limit if limit is not None else total, total)

    def __reduce__(self) -> tuple[type["EmojiPictures"], tuple[EmojiDataConfig, int | None]]:
        # without the pictures that were decoded meanwhile
        return EmojiPictures, (self._config, self._limit)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def names(self) -> list[str]:
        """What each is called: the name of its concept."""
        return [self._data.concepts[k].name for k in self._indices]

    @property
    def record(self) -> PictureRecord:
        """What the card says of them."""
        content = f"{self._data.fingerprint} {self._indices}"
        named = self._config.names is not None or self._config.subset is not None
        return PictureRecord(
            description="emoji",
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
            count=len(self._indices),
            available=len(self._data),
            height=self._config.resolution,
            width=self._config.resolution,
            split=None if named else self._config.split,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Return pictures; see `PictureSource.read`."""
        return torch.stack([self._data.load(k).image for k in self._indices[start:stop]])


def list_pictures(folder: Path) -> list[Path]:
    """Return the files with a picture's suffix in a folder and its sub-folders, sorted by path.

    Raises:
        DataError: If there is no such folder; it names what is near.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}{near(folder)}")
    found = (p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    return sorted(p for p in found if not _hidden(p.relative_to(folder)))


def near(missing: Path) -> str:
    """Return a clause that names the nearest sibling of a path, or nothing if none is near."""
    place = missing.absolute().parent
    names = [p.name for p in place.iterdir() if p.is_dir()] if place.is_dir() else []
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"; did you mean {missing.with_name(close[0])}?" if close else ""


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _scan(folder: Path, paths: Sequence[Path], max_broken: float) -> tuple[list[_File], int]:
    """Return the files that are whole, and how many are not.

    Every one is decoded once, so that all processes number the same pictures; JPEG at an eighth of
    its size. Pixels are kept of none.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(threads()) as pool:
        warnings.simplefilter("ignore")
        found = list(pool.map(_look, paths))
    files = [f for f in found if isinstance(f, _File)]
    broken = [f for f in found if isinstance(f, str)]
    if not files or len(broken) > max_broken * len(found):
        named = "; ".join(broken[:_NAMED])
        more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise DataError(
            f"{folder}: {len(broken)} of {len(found)} pictures are broken, and at most"
            f" {max_broken:.1%} are skipped: {named}{more}: mend or remove"
            f" {'it' if len(broken) == 1 else 'them'}"
        )
    return files, len(broken)


def _look(path: Path) -> "_File | str":
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # orientation: lies on its side
                width, height = height, width
            kind = _kind(picture)
        read_image(content, 1, square=True)
        return _File(path, width, height, kind, hashlib.sha256(content).digest())
    except Exception as error:  # a damaged file makes decoders raise anything
        return f"{path}: broken: {_one_line(error)}"


def _kind(picture: Image.Image) -> str | None:
    """What a picture is converted from, if it is not RGB."""
    if picture.has_transparency_data:
        return "transparent"
    if picture.mode == "RGB":
        return None
    return "grey" if picture.mode[0] in "1LIF" and picture.mode != "LAB" else "other"


def square(size: tuple[int, int], called: str) -> int:
    """Return the side of a square.

    Raises:
        DataError: If it is none; it says what real pictures, so called, can be brought to.
    """
    height, width = size
    if height != width:
        raise DataError(
            f"{called}: the measured pictures are {width} x {height}, and these are not: bring both"
            " to a square by resolution (--resolution N)"
        )
    return height


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a picture of pictures; its folder is made if need be.

    Raises:
        DataError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise DataError(f"grid: {path}: cannot be written: {error.strerror or error}") from None


def _all_have(files: Sequence[_File], size: tuple[int, int]) -> bool:
    return all((file.height, file.width) == size for file in files)


def _one_size(files: Sequence[_File]) -> tuple[int, int]:
    """Return the height and width that all have."""
    first = files[0]
    for file in files:
        if (file.width, file.height) != (first.width, first.height):
            raise DataError(
                f"{first.path} is {first.width} x {first.height} pixels, {file.path} is"
                f" {file.width} x {file.height}: pictures of one size are measured; choose one by"
                " resolution (--resolution N), to which each one's central square is resized"
            )
    return first.height, first.width


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # Pillow names the object that it read from, which says nothing to a user
    return lines[0].partition(" <_io.")[0] if lines else type(error).__name__
