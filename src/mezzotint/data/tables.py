"""Tables with a row per image: parquet files, and data sets of the Hugging Face hub by name."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from mezzotint.data.base import Fault
from mezzotint.data.captioned import CaptionedConfig, CaptionedImages, Entry, named_classes
from mezzotint.data.files import missing_path, one_line
from mezzotint.errors import DataError, MissingExtraError, nearest

__all__ = ["HubDataConfig", "ParquetDataConfig", "TableData", "read_table"]


class ParquetDataConfig(CaptionedConfig):
    """Which parquet files, and how their images are seen; see `CaptionedConfig` for the rest.

    The library ``datasets`` keeps a copy of the table in its cache folder (``HF_HOME``), which is
    read by memory mapping: a parquet file cannot be read at one row.

    Attributes:
        path: A file, a pattern such as ``data/train-*.parquet``, or a folder of which all parquet
            files are read.
        image_column: Holds the bytes of an image file, or its path from the folder of the row's own
            parquet file.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    image_column: str = "image"


class HubDataConfig(CaptionedConfig):
    """Which data set of the hub, and how its images are seen; see `CaptionedConfig` for the rest.

    It is downloaded once into the cache folder of the library ``datasets`` (``HF_HOME``), and read
    from there without a network.

    Attributes:
        name: Such as ``owner/name``, or a folder that is laid out like one.
        subset: Its configuration, if it has several.
        split: ``train``, or a part as the library writes it: ``train[:10%]``.
        revision: Branch, tag or commit.
        image_column: Holds the images.
    """

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"


class TableData(CaptionedImages):
    """A table with a row per image as a data set; see `CaptionedImages`.

    A caption may be a text or a list of texts, of which a generator chooses one.

    Args:
        config: Which table, and how its images are seen.

    Raises:
        DataError: If the table or a column is missing, or more than ``max_broken`` of the images
            are broken.
        MissingExtraError: If the package ``datasets`` is not installed.
    """

    def __init__(self, config: ParquetDataConfig | HubDataConfig) -> None:
        entries, faults, class_names = read_table(config)
        super().__init__(_where(config), entries, faults, class_names, config)


@dataclass(frozen=True, slots=True)
class _RowImage:
    """The image of a row."""

    rows: Any  # of the library, one column
    column: str
    index: int
    where: str
    root: Path | None

    @property
    def name(self) -> str:
        return f"row {self.index}"

    @property
    def place(self) -> str:
        return f"{self.where}: {self.name}"

    def read(self) -> bytes:
        found = self.rows[self.index][self.column] or {}
        content, path = found.get("bytes"), found.get("path")
        if content is not None:
            return content
        if path is None:
            raise ValueError("no image")
        if self.root is None:
            return Path(path).read_bytes()
        inside = (self.root / path).resolve()
        if not inside.is_relative_to(self.root.resolve()):
            raise ValueError(f"its path {path!r} leads out of the folder")
        return inside.read_bytes()


def read_table(
    config: ParquetDataConfig | HubDataConfig,
) -> tuple[list[Entry], list[Fault], tuple[str, ...] | None]:
    """List the images of a table; none is decoded.

    Returns:
        The images by row, what was skipped, and the classes.

    Raises:
        DataError: If the table or a column is missing.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "reading a table of images") from None
    where = _where(config)
    roots: list[Path] | None = None
    if isinstance(config, ParquetDataConfig):
        files = _parquet_files(config.path)
        names: list[Any] = [str(file) for file in files]
        table = _read(where, lambda: datasets.Dataset.from_parquet(names))
        folders: list[Path] = _read(where, lambda: _folders(files))
        assert len(folders) == len(table), "the library reads all rows of all files, in order"
        roots = folders
    else:
        table = _read(
            where,
            lambda: datasets.load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision
            ),
        )
    _check_columns(config, table.column_names, where)
    rows = _read(
        where,
        lambda: table.select_columns([config.image_column]).cast_column(
            config.image_column, datasets.Image(decode=False)
        ),
    )
    kind = table.features.get(config.class_column) if config.class_column else None
    numbered = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    captions = list(table[config.caption_column]) if config.caption_column else None
    classes = list(table[config.class_column]) if config.class_column else None
    entries: list[Entry] = []
    faults: list[Fault] = []
    for k in range(len(table)):
        root = None if roots is None else roots[k]
        image = _RowImage(rows, config.image_column, k, where, root)
        texts = _texts(captions[k]) if captions is not None else ()
        value = None if classes is None else classes[k]
        if captions is not None and not texts:
            faults.append(Fault(image.name, f"no text in column {config.caption_column!r}"))
        # a number below 0 is how the library says that a class is not known
        elif classes is not None and (value is None or (numbered and value < 0)):
            faults.append(Fault(image.name, f"nothing in column {config.class_column!r}"))
        else:
            named = numbered[value] if numbered and value is not None else value
            entries.append(Entry(image, texts, None if value is None else str(named)))
    found = named_classes(entries, config.classes, where)
    return entries, faults, numbered if found and not config.classes and numbered else found


def _where(config: ParquetDataConfig | HubDataConfig) -> str:
    if isinstance(config, ParquetDataConfig):
        return config.path
    subset = f", {config.subset}" if config.subset else ""
    return f"{config.name}{subset}, {config.split}"


def _parquet_files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.rglob("*.parquet"))
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
    if files:
        return files
    if place.is_dir():
        raise DataError(f"{place}: no parquet files in this folder")
    raise DataError(f"{place}: no such file, folder or pattern{missing_path(place, files=True)}")


def _folders(files: Sequence[Path]) -> list[Path]:
    """The folder of each row's parquet file."""
    from pyarrow import parquet

    rows = [(file.parent, parquet.read_metadata(file).num_rows) for file in files]
    return [folder for folder, count in rows for _ in range(count)]


def _read(where: str, read: Callable[[], object]) -> Any:
    """Call the library, whose errors are of any kind."""
    try:
        return read()
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{where}: cannot be read as a table of images: {one_line(cause)}"
        ) from error


def _check_columns(
    config: ParquetDataConfig | HubDataConfig, columns: list[str], where: str
) -> None:
    for key in ("image_column", "caption_column", "class_column"):
        column = getattr(config, key)
        if column is not None and column not in columns:
            raise DataError(f"{key}: no column {column!r} in {where}; {nearest(column, columns)}")


def _texts(value: object) -> tuple[str, ...]:
    given = cast(list[object], value) if isinstance(value, list) else [value]
    return tuple(text for text in given if isinstance(text, str) and text.strip())
