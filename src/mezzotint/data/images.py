"""A user's own folder of images, with captions in a metadata file or classes as sub-folders."""

import glob
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mezzotint.data.base import Fault
from mezzotint.data.captioned import CaptionedConfig, CaptionedImages, Entry, named_classes
from mezzotint.data.files import ImageFile, existing_folder, one_line
from mezzotint.errors import DataError, MissingExtraError, nearest

__all__ = ["FolderData", "FolderDataConfig", "read_folder"]

_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing"}


class FolderDataConfig(CaptionedConfig):
    """Which folder, and how its images are seen; see `CaptionedConfig` for the rest.

    Columns are those of ``metadata.jsonl``, ``.csv`` or ``.parquet``; without ``class_column``
    sub-folders are the classes.

    Attributes:
        path: The folder.
        split: A sub-folder of it: ``train``, ``validation``, ``test``.
    """

    kind: Literal["folder"] = "folder"
    path: str
    split: str | None = None


class FolderData(CaptionedImages):
    """A folder of images as a data set; see `CaptionedImages`.

    Archives inside the folder are not read.

    Args:
        config: Which folder, and how its images are seen.

    Raises:
        DataError: If the folder, its images or a column is missing, or more than ``max_broken``
            of the files are broken.
        MissingExtraError: If the package ``datasets`` is not installed.
    """

    def __init__(self, config: FolderDataConfig) -> None:
        root = _find_folder(config)
        entries, faults, class_names = read_folder(config)
        if not entries and not faults:
            raise DataError(f"{root}: its metadata file names no image")
        super().__init__(root, entries, faults, class_names, config)


def read_folder(
    config: FolderDataConfig,
) -> tuple[list[Entry], list[Fault], tuple[str, ...] | None]:
    """List the images of a folder; none is opened.

    Returns:
        The images by name, what was skipped, and the classes.

    Raises:
        DataError: If the folder, its images or a column is missing.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    root = _find_folder(config)
    table = _read_table(root)
    entries, faults = _entries(table, root, config)
    return entries, faults, _class_names(entries, table, root, config)


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


def _read_table(root: Path) -> _Table:
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
) -> tuple[list[Entry], list[Fault]]:
    for key, column in (
        ("caption_column", config.caption_column),
        ("class_column", config.class_column),
    ):
        if column is not None and column not in table.columns:
            others = [name for name in table.columns if name != "image"]
            hint = nearest(column, others) if others else "the folder has no metadata.jsonl"
            raise DataError(f"{key}: no column {column!r} in {root}; {hint}")
    class_column = config.class_column or ("label" if table.sub_folder_classes else None)
    entries: list[Entry] = []
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
        captions = () if caption is None else (caption,)
        class_name = None if value is None else str(value)
        entries.append(Entry(ImageFile(path, name), captions, class_name))
    return sorted(entries, key=lambda entry: entry.file.name), faults


def _class_names(
    entries: Sequence[Entry], table: _Table, root: Path, config: FolderDataConfig
) -> tuple[str, ...] | None:
    names = named_classes(entries, config.classes, root)
    if (
        names is not None
        and config.classes is None
        and config.split is not None
        and table.sub_folder_classes
        and config.class_column in (None, "label")
    ):
        # a class that one split lacks must not renumber the others
        siblings = [p for p in root.parent.iterdir() if p.is_dir() and p.name in _SPLITS]
        others = {
            p.name
            for folder in siblings
            for p in folder.iterdir()
            if p.is_dir() and not p.name.startswith(".")
        }
        return tuple(sorted(others | set(names)))
    return names
