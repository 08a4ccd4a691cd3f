"""A user's own folder of images, with captions in a metadata file or classes as sub-folders."""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.decoding import decode_image
from mezzotint.data.files import (
    ImageFile,
    ImageFiles,
    check_faults,
    choose_view,
    cut,
    existing_folder,
    one_line,
)
from mezzotint.errors import DataError, MissingExtraError, nearest

__all__ = ["FolderData", "FolderDataConfig"]

_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing"}


class FolderDataConfig(Config):
    """Which folder, and how its images are seen."""

    kind: Literal["folder"] = "folder"
    path: str
    split: str | None = None  # a sub-folder: train, validation, test
    resolution: int = Field(default=64, gt=0)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    # columns of metadata.jsonl, .csv or .parquet; without class_column sub-folders are the classes
    caption_column: str | None = None
    class_column: str | None = None
    classes: tuple[str, ...] | None = None  # fixes their numbering; by default sorted by name
    max_broken: float = Field(default=0.01, ge=0, le=1)  # share of files that may be skipped
    cache_limit_mib: int = Field(default=2048, ge=0)  # pixels are kept in memory up to this


class FolderData:
    """A folder of images as a data set.

    Every file is decoded once when the folder is opened, so that broken ones are known before
    training begins; the pixels stay in memory if they fit ``cache_limit_mib``. Images are turned
    upright as their EXIF data say, converted to 8-bit RGB (transparency on white), resized with
    antialiasing until the short side is ``resolution``, and cropped to a square. Archives inside
    the folder are not read.

    Args:
        config: Which folder, and how its images are seen.

    Raises:
        DataError: If the folder, its images or a column is missing, or more than ``max_broken``
            of the files are broken.
        MissingExtraError: If the package ``datasets`` is not installed.
    """

    def __init__(self, config: FolderDataConfig) -> None:
        self.config = config
        root = _find_folder(config)
        table = _read_folder(root)
        entries, self.faults = _entries(table, root, config)
        self.class_names = _class_names(entries, table, root, config)
        self._files = ImageFiles(
            [ImageFile(e.path, e.name) for e in entries],
            partial(decode_image, resolution=config.resolution, square=config.crop == "center"),
            config.cache_limit_mib,
        )
        self.faults += self._files.faults
        entries = [entries[k] for k in self._files.whole]
        if not entries and not self.faults:
            raise DataError(f"{root}: its metadata file names no image")
        check_faults(root, self.faults, len(entries), config.max_broken)
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        self._labels = [None if e.class_name is None else numbers[e.class_name] for e in entries]
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def fingerprint(self) -> str:
        """Hash of the files' bytes, captions, labels and the view; not of where they lie."""
        view = self.config.model_dump(exclude={"path", "cache_limit_mib", "max_broken"})
        rows = [(e.caption, label) for e, label in zip(self._entries, self._labels, strict=True)]
        content = [self._files.digest, rows, self.class_names, view]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one image; see `mezzotint.data.ImageData.load`.

        Without a generator it is the central crop. With one, a random crop and mirroring as
        configured.

        Raises:
            DataError: If the pixels are not in memory and the file has gone since.
        """
        entry = self._entries[index]
        pixels = self._files.pixels(index)
        high, wide = pixels.shape[:2]
        view = choose_view(high, wide, self.config.resolution, self.config.flip, generator)
        return Example(cut(pixels, view), entry.caption, self._labels[index], entry.name)

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and label; see `mezzotint.data.ImageData.describe`."""
        return Description(self._entries[index].caption, self._labels[index])


class _Entry(NamedTuple):
    path: Path
    name: str
    caption: str | None
    class_name: str | None


@dataclass(frozen=True, slots=True)
class _Table:
    """What the `datasets` library reads from a folder: a row per image."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    sub_folder_classes: tuple[str, ...] | None


def _find_folder(config: FolderDataConfig) -> Path:
    root = existing_folder(config.path)
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if config.split is not None:
        if config.split not in folders:
            hint = (
                f"; {nearest(config.split, folders)}" if folders else ", which has no sub-folders"
            )
            raise DataError(f"split: no folder {config.split!r} in {root}{hint}")
        return root / config.split
    if folders and folders <= _SPLITS:
        raise DataError(
            f"{root}: holds the splits {', '.join(sorted(folders))}; name one, such as"
            f" split: {'train' if 'train' in folders else min(folders)}"
        )
    return root


def _read_folder(root: Path) -> _Table:
    """Read the list of images; no image is opened, and nothing is left behind."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    except ImportError:
        raise MissingExtraError("datasets", "train", "reading a folder of images") from None
    extensions = set(ImageFolder.EXTENSIONS)
    files = (name for _, _, names in os.walk(root) for name in names)
    if not any(os.path.splitext(name)[1].lower() in extensions for name in files):
        raise DataError(f"{root}: no images in this folder (.jpg, .png, .webp and others are read)")
    try:
        # As a stream it writes no table; only a lock file goes into the cache folder. The builder
        # is called by itself because load_dataset("imagefolder") reports each use over the network.
        with tempfile.TemporaryDirectory() as cache:
            builder: Any = ImageFolder(
                data_files={"train": glob.escape(str(root.absolute())) + "/**"}, cache_dir=cache
            )
            stream: Any = builder.as_streaming_dataset(split="train")
            features: Any = stream.features
            rows = list(stream.cast_column("image", datasets.Image(decode=False)))
    except IndexError:  # what the library makes of a metadata file without rows
        raise DataError(f"{root}: its metadata file names no image") from None
    except (ValueError, TypeError, KeyError, OSError, DatasetsError) as error:
        raise DataError(f"{root}: cannot be read as images: {one_line(error)}") from None
    label = features.get("label")
    classes = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    return _Table(tuple(features), rows, classes)


def _entries(
    table: _Table, root: Path, config: FolderDataConfig
) -> tuple[list[_Entry], list[Fault]]:
    for key, column in (
        ("caption_column", config.caption_column),
        ("class_column", config.class_column),
    ):
        if column is not None and column not in table.columns:
            others = [name for name in table.columns if name != "image"]
            hint = nearest(column, others) if others else "the folder has no metadata.jsonl"
            raise DataError(f"{key}: no column {column!r} in {root}; {hint}")
    class_column = config.class_column or ("label" if table.sub_folder_classes else None)
    entries: list[_Entry] = []
    faults: list[Fault] = []
    for row in table.rows:
        location: str = row["image"]["path"]
        if "://" in location:  # inside an archive
            continue
        path = Path(location)
        name = os.path.relpath(path, root.absolute())
        caption = row[config.caption_column] if config.caption_column else None
        if config.caption_column and not (isinstance(caption, str) and caption.strip()):
            faults.append(Fault(name, f"no text in column {config.caption_column!r}"))
            continue
        value: Any = row[class_column] if class_column else None
        if class_column and value is None:
            faults.append(Fault(name, f"nothing in column {class_column!r}"))
            continue
        if table.sub_folder_classes and class_column == "label":
            value = table.sub_folder_classes[value]
        entries.append(_Entry(path, name, caption, None if value is None else str(value)))
    return sorted(entries, key=lambda entry: entry.name), faults


def _class_names(
    entries: Sequence[_Entry], table: _Table, root: Path, config: FolderDataConfig
) -> tuple[str, ...] | None:
    found = {entry.class_name for entry in entries if entry.class_name is not None}
    if config.classes is not None:
        for name in sorted(found - set(config.classes)):
            raise DataError(f"classes: {root} has a class {name!r} that is not among them")
        return config.classes
    if not found:
        return None
    if (
        config.split is not None
        and table.sub_folder_classes
        and config.class_column in (None, "label")
    ):
        # a class that one split lacks must not renumber the others
        siblings = [p for p in root.parent.iterdir() if p.is_dir() and p.name in _SPLITS]
        found |= {
            p.name
            for folder in siblings
            for p in folder.iterdir()
            if p.is_dir() and not p.name.startswith(".")
        }
    return tuple(sorted(found))
