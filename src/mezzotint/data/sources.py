"""What a user names on the command line, as images with what is said of them."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mezzotint.data import AnyDataConfig, ImageData, open_data
from mezzotint.data.base import Fault
from mezzotint.data.captioned import Entry
from mezzotint.data.images import FolderDataConfig, read_folder
from mezzotint.data.shards import DamagedShard, find_shards, read_shard, shard_name
from mezzotint.data.tables import HubDataConfig, ParquetDataConfig, read_table
from mezzotint.data.webdataset import WebDatasetConfig, told_by
from mezzotint.errors import DataError

__all__ = ["Source", "open_source", "source_config"]

_CAPTIONS = ("text", "caption", "captions", "prompt")  # columns that are taken without being named
_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class Source:
    """Images, opened one after the other.

    Attributes:
        entries: Each once; a fault stands where a sample is of no use.
        count: How many, if that is known beforehand.
    """

    entries: Iterable[Entry | Fault]
    count: int | None


def source_config(
    source: str, caption_column: str | None = None, class_column: str | None = None
) -> AnyDataConfig:
    """Say what data a path or name stands for.

    Args:
        source: A folder of images, of tar or of parquet files; a pattern or address of tar files;
            parquet files; or ``hub:owner/name``.
        caption_column: Holds the captions; found out if not given.
        class_column: Holds the classes; found out if not given.

    Raises:
        DataError: If there is nothing like it.
    """
    given: dict[str, Any] = {"class_column": class_column, "max_broken": 1.0}
    if source.startswith("hub:"):
        hub = {"name": source.removeprefix("hub:"), "caption_column": caption_column}
        return HubDataConfig.from_dict(given | hub)
    path = Path(source).expanduser()
    kind = _kind(source, path)
    if kind == "webdataset":
        caption, named = _shard_columns(source)
        given |= {"urls": source, "stream": False, "caption_column": caption_column or caption}
        given["class_column"] = class_column or named
        return WebDatasetConfig.from_dict(given)
    caption = caption_column or next((n for n in _CAPTIONS if n in _columns(kind, path)), None)
    given |= {"path": source, "caption_column": caption}
    if kind == "parquet":
        return ParquetDataConfig.from_dict(given)
    return FolderDataConfig.from_dict(given)


def open_source(config: AnyDataConfig) -> Source:
    """List the images of data, without decoding them.

    Args:
        config: Any; data that are drawn, such as emoji and scenes, are given as PNG files.

    Raises:
        DataError: If they are missing.
    """
    match config:
        case FolderDataConfig():
            entries, faults, _ = read_folder(config)
        case ParquetDataConfig() | HubDataConfig():
            entries, faults, _ = read_table(config)
        case WebDatasetConfig():
            return Source(_of_shards(config), None)
        case _:
            data = open_data(config)
            return Source([*data.faults, *_Drawn.all_of(data)], len(data))
    return Source([*faults, *entries], len(faults) + len(entries))


class _Bytes(NamedTuple):
    name: str
    place: str
    content: bytes

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An image that is made when it is asked for."""

    data: ImageData
    index: int
    name: str

    @property
    def place(self) -> str:
        return self.name

    def read(self) -> bytes:
        file = io.BytesIO()
        pixels = self.data.load(self.index).image
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue()

    @classmethod
    def all_of(cls, data: ImageData) -> list[Entry]:
        entries: list[Entry] = []
        for k in range(len(data)):
            known = data.describe(k)
            captions = () if known.caption is None else (known.caption,)
            class_name = None
            if known.label is not None and data.class_names is not None:
                class_name = data.class_names[known.label]
            entries.append(Entry(cls(data, k, f"{k:06d}"), captions, class_name))
        return entries


def _of_shards(config: WebDatasetConfig) -> Iterator[Entry | Fault]:
    for place in find_shards(config.urls):
        try:
            for sample in read_shard(place):
                told, picture = told_by(sample.parts, config), sample.picture
                if picture is None or told.fault is not None:
                    yield Fault(sample.name, told.fault or "no image")
                    continue
                captions = () if told.caption is None else (told.caption,)
                file = _Bytes(sample.name, place, picture)
                yield Entry(file, captions, told.class_name)
        except DamagedShard as error:
            yield Fault(shard_name(place), f"{error}; what follows is lost")


def _kind(source: str, path: Path) -> str:
    if path.is_dir():
        names = [p.name for p in path.iterdir()]
        if any(name.endswith(_TARS) for name in names):
            return "webdataset"
        tables = {name for name in names if name.endswith(".parquet")} - {"metadata.parquet"}
        return "parquet" if tables else "folder"
    if source.partition("?")[0].endswith(_TARS):
        return "webdataset"
    if source.endswith(".parquet"):
        return "parquet"
    return "folder"  # which isn't there, and that is told


def _told(table: dict[str, Any]) -> str | None:
    return next((name for name in _CAPTIONS if isinstance(table.get(name), str)), None)


def _columns(kind: str, path: Path) -> Sequence[str]:
    """The columns of a table, by its first lines."""
    if kind == "parquet":
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        return _parquet_columns(files[0]) if files and files[0].is_file() else ()
    for file in (path / f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet")):
        if not file.is_file():
            continue
        if file.suffix == ".parquet":
            return _parquet_columns(file)
        with file.open(encoding="utf-8", errors="replace") as lines:
            line = lines.readline()
        try:
            return list(json.loads(line)) if file.suffix == ".jsonl" else next(csv.reader([line]))
        except (ValueError, TypeError, StopIteration):
            return ()  # damage is told where the table is read
    return ()


def _parquet_columns(file: Path) -> Sequence[str]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(file).names
    except (OSError, ValueError):
        return ()


def _shard_columns(source: str) -> tuple[str | None, str | None]:
    """What holds captions and classes, by the first sample that has a picture."""
    for place in find_shards(source):
        try:
            sample = next((s for s in read_shard(place) if s.picture is not None), None)
        except DamagedShard:
            continue
        if sample is None:
            continue
        try:
            table = json.loads(sample.parts.get("json", b"{}"))
        except ValueError:
            table = {}
        caption = "txt" if "txt" in sample.parts else _told(table)
        return caption, "cls" if "cls" in sample.parts else None
    raise DataError(f"{source}: no shard holds a picture")
