"""A user's own images with semantic maps: what semantic synthesis learns from."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.decoding import PICTURE_SUFFIXES, decode_image, decode_map, frame_size
from mezzotint.data.files import (
    ImageFile,
    ImageFiles,
    View,
    check_faults,
    choose_view,
    cut,
    existing_folder,
)
from mezzotint.errors import DataError, nearest

__all__ = ["MapFolderData", "MapFolderDataConfig"]

_MOST_CLASSES = 255  # maps are uint8, and 0 is no class
_MOST_NAMES = 1 << 20  # bytes of a file of names
_VALUES = 1 << 16


class MapFolderDataConfig(Config):
    """Which images and maps, and how they are seen.

    Attributes:
        images: The folder of images; sub-folders are read too.
        maps: The folder of maps, each under the name of its image but for the suffix. A map's grey
            values, or the indices of its palette, are classes.
        classes: The names of the classes.
        classes_file: Or a text file of them, one a line.
        first_value: The value of the first class in the files; the others follow.
        ignore: A value of pixels without a class; None if there is none.
        ignore_as: The class that such pixels are given; without one they become background.
        resolution: Side of the square views, in pixels.
        crop: The central square, or with a generator one anywhere.
        flip: Whether views are mirrored, half of them.
        max_broken: Share of the images that may be skipped.
        cache_limit_mib: Pixels are kept in memory up to this.
    """

    kind: Literal["maps"] = "maps"
    images: str
    maps: str
    classes: tuple[str, ...] | None = None
    classes_file: str | None = None
    first_value: int = Field(default=0, ge=0, lt=_VALUES)
    ignore: int | None = Field(default=255, ge=0, lt=_VALUES)
    ignore_as: str | None = None
    resolution: int = Field(default=64, gt=0)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    max_broken: float = Field(default=0.01, ge=0, le=1)
    cache_limit_mib: int = Field(default=2048, ge=0)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.classes is None) == (self.classes_file is None):
            raise ValueError("expected the names of the classes in either classes or classes_file")
        if self.ignore_as is not None and self.ignore is None:
            raise ValueError("ignore_as: says what ignore becomes, but no value is ignored")
        return self


class MapFolderData:
    """Images with semantic maps as a data set; no example has a caption or a label.

    Images are decoded as `mezzotint.data.FolderData` does, and sorted by name. A map has the size
    of its image, follows its crop and mirroring, and is resized without mixing: in `Example.map` a
    pixel of class k is k + 1, and 0 is none.

    Args:
        config: Which images and maps, and how they are seen.

    Raises:
        DataError: If a folder or the classes are missing or are not what they should be, or more
            than ``max_broken`` of the images or their maps are broken.
    """

    def __init__(self, config: MapFolderDataConfig) -> None:
        self.config = config
        self.class_names: tuple[str, ...] = _class_names(config)
        images, maps = existing_folder(config.images), existing_folder(config.maps)
        pairs, self.faults = _pairs(images, maps)
        square = config.crop == "center"
        # a pixel of an image is three bytes, and one of a map is one
        self._images = ImageFiles(
            [image for image, _ in pairs],
            partial(decode_image, resolution=config.resolution, square=square),
            config.cache_limit_mib * 3 / 4,
        )
        pairs = [pairs[k] for k in self._images.whole]
        self._maps = ImageFiles(
            [map_ for _, map_ in pairs],
            partial(
                decode_map,
                resolution=config.resolution,
                square=square,
                table=_table(config, self.class_names),
            ),
            config.cache_limit_mib / 4,
        )
        self.faults += [*self._images.faults, *self._maps.faults, *self._match(pairs)]
        check_faults(images, self.faults, len(self._names), config.max_broken)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def fingerprint(self) -> str:
        """Hash of the files' bytes, the classes and the view; not of where they lie."""
        places = {"images", "maps", "classes", "classes_file"}
        view = self.config.model_dump(exclude=places | {"cache_limit_mib", "max_broken"})
        content = [self._images.digest, self._maps.digest, self._names, self.class_names, view]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one image and its map; see `mezzotint.data.ImageData.load`.

        Without a generator it is the central crop. With one, a random crop and mirroring as
        configured.

        Raises:
            DataError: If the pixels are not in memory and a file has gone since.
        """
        view = self._view(index, generator)
        return Example(
            cut(self._images.pixels(index), view),
            None,
            None,
            self._names[index],
            map=cut(self._maps.pixels(index), view),
        )

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return the map, if asked for; see `mezzotint.data.ImageData.describe`.

        It is that of the view that `load` would give for a generator in the same state.
        """
        if not with_map:
            return Description(None, None)
        seen = cut(self._maps.pixels(index), self._view(index, generator))
        return Description(None, None, map=seen)

    def _view(self, index: int, generator: torch.Generator | None) -> View:
        side = self.config.resolution
        square = self.config.crop == "center"
        wide, high = (side, side) if square else frame_size(*self._images.sizes[index], side)
        return choose_view(high, wide, side, self.config.flip, generator)

    def _match(self, pairs: list[tuple[ImageFile, ImageFile]]) -> list[Fault]:
        """Leave out images without a whole map of their size."""
        faults: list[Fault] = []
        alike: list[int] = []
        whole = self._maps.whole
        for index, position in enumerate(whole):
            image, found = self._images.sizes[position], self._maps.sizes[index]
            if image == found:
                alike.append(index)
                continue
            reason = f"is {found[0]}x{found[1]}, but its image is {image[0]}x{image[1]}"
            faults.append(Fault(pairs[position][1].name, reason))
        self._images.select([whole[index] for index in alike])
        self._maps.select(alike)
        self._names = [pairs[whole[index]][0].name for index in alike]
        return faults


def _class_names(config: MapFolderDataConfig) -> tuple[str, ...]:
    names, key = config.classes, "classes"
    if names is None:
        assert config.classes_file is not None
        path = Path(config.classes_file).expanduser()
        names, key = _read_names(path), f"classes_file: {path}"
    if not 1 <= len(names) <= _MOST_CLASSES:
        raise DataError(f"{key}: expected 1 to {_MOST_CLASSES} classes, got {len(names)}")
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise DataError(f"{key}: expected names that differ, got {name!r} more than once")
    if config.ignore_as is not None and config.ignore_as not in names:
        raise DataError(
            f"ignore_as: no class {config.ignore_as!r}; {nearest(config.ignore_as, names)}"
        )
    return names


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_NAMES):
            raise DataError(f"classes_file: {path}: expected a text file of at most 1 MiB")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"classes_file: {path}: cannot be read: {error}") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise DataError(
            f"classes_file: {path}, line {lines.index('') + 1}: expected a name, got nothing"
        )
    return tuple(lines)


def _table(config: MapFolderDataConfig, names: tuple[str, ...]) -> npt.NDArray[np.int16]:
    """What each value of a file is in a map: 1 + class, 0 for no class, -1 if it has no meaning."""
    table = np.full(_VALUES, -1, np.int16)
    count = min(len(names), _VALUES - config.first_value)
    table[config.first_value : config.first_value + count] = np.arange(1, count + 1)
    if config.ignore is not None:
        table[config.ignore] = 1 + names.index(config.ignore_as) if config.ignore_as else 0
    return table


def _pairs(images: Path, maps: Path) -> tuple[list[tuple[ImageFile, ImageFile]], list[Fault]]:
    """Images with their maps, by name, and the images that have none."""
    found = _by_stem(maps)
    pairs: list[tuple[ImageFile, ImageFile]] = []
    faults: list[Fault] = []
    for stem, files in sorted(_by_stem(images).items()):
        others = found.get(stem, [])
        if len(files) > 1 or len(others) > 1:
            twice = files if len(files) > 1 else others
            names = " and ".join(file.name for file in twice)
            faults.append(Fault(files[0].name, f"{names} have the same name"))
        elif not others:
            faults.append(Fault(files[0].name, f"no map of this name in {maps}"))
        else:
            pairs.append((files[0], others[0]))
    if not pairs and not faults:
        raise DataError(
            f"{images}: no images in this folder (.jpg, .png, .webp and others are read)"
        )
    return pairs, faults


def _by_stem(root: Path) -> dict[str, list[ImageFile]]:
    files: dict[str, list[ImageFile]] = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and not hidden:
            stem = place.with_suffix("").as_posix()
            files.setdefault(stem, []).append(ImageFile(path, place.as_posix()))
    return files
