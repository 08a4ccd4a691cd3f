"""Shards of the img2dataset convention: what their samples say, and all of them by an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import Field, model_validator

from mezzotint.data.base import Fault
from mezzotint.data.captioned import CaptionedConfig, CaptionedImages, Entry, named_classes
from mezzotint.data.shards import TEXTS, DamagedShard, Member, find_shards, index_shard
from mezzotint.errors import DataError

__all__ = ["ShardData", "Told", "WebDatasetConfig", "index_shards", "told_by"]


class WebDatasetConfig(CaptionedConfig):
    """Which shards, and how their images are seen; see `CaptionedConfig` for the rest.

    Attributes:
        urls: Paths, patterns or addresses of tar files, one or several; see
            `mezzotint.data.shards.find_shards`.
        caption_column: ``txt``, the text file beside the image, or a key of the JSON beside it.
        class_column: ``cls``, the text file, or a key of the JSON.
        stream: Whether training reads the shards from beginning to end, in constant memory; if
            not, they are on the disk and uncompressed, and every image is opened at the start.
        shuffle_buffer: Encoded images out of which a stream shuffles; it holds at most twice as
            many.
        lanes: Shards that a stream reads side by side, at most; never more than there are. A
            multiple of the number of ranks is best; the order of the samples depends on it, but
            not on the ranks.
    """

    kind: Literal["webdataset"] = "webdataset"
    urls: str | tuple[str, ...]
    caption_column: str | None = "txt"
    stream: bool = True
    shuffle_buffer: int = Field(default=2048, ge=1)
    lanes: int = Field(default=16, ge=1, le=4096)

    @model_validator(mode="after")
    def _streams(self) -> "WebDatasetConfig":
        if not self.stream:
            return self
        for key in ("buckets", "balance"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: a stream has no index to choose by; set stream: false")
        if self.class_column is not None and self.classes is None:
            raise ValueError(
                "classes: a stream does not know its classes beforehand; list them, or set stream:"
                " false"
            )
        if self.shuffle_buffer < self.lanes:
            raise ValueError(
                f"shuffle_buffer {self.shuffle_buffer} is less than one image for each of the"
                f" {self.lanes} lanes"
            )
        return self


class ShardData(CaptionedImages):
    """All samples of shards on the disk as a data set with an index; see `CaptionedImages`.

    Args:
        config: Which shards, and how their images are seen.

    Raises:
        DataError: If a shard is missing, compressed or not on the disk, or more than ``max_broken``
            of the images are broken.
    """

    def __init__(self, config: WebDatasetConfig) -> None:
        entries, faults, class_names = index_shards(config)
        super().__init__(_where(config), entries, faults, class_names, config)


class Told(NamedTuple):
    """What a sample says of its image.

    Attributes:
        caption: None if none is asked for.
        class_name: None if none is asked for.
        fault: Why the sample is of no use, if it isn't.
    """

    caption: str | None = None
    class_name: str | None = None
    fault: str | None = None


def told_by(parts: Mapping[str, bytes], config: WebDatasetConfig) -> Told:
    """Return what the texts beside an image say.

    Args:
        parts: By extension.
        config: Which of them count.
    """
    table: dict[str, Any] = {}
    if {config.caption_column, config.class_column} - {None, "txt", "cls"}:
        try:
            table = cast(dict[str, Any], json.loads(parts.get("json", b"")))
        except ValueError:
            return Told(fault="no JSON beside it" if "json" not in parts else "damaged JSON")
        if not isinstance(table, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            return Told(fault="damaged JSON")
    values: list[str | None] = []
    for column in (config.caption_column, config.class_column):
        if column is None:
            values.append(None)
            continue
        found = table.get(column)
        if column in ("txt", "cls"):
            found = parts.get(column, b"").decode(errors="replace")
        text = "" if found is None or isinstance(found, list | dict) else str(found).strip()
        if not text:
            what = "text" if column == config.caption_column else "class"
            return Told(fault=f"no {what} in {column!r}")
        values.append(text)
    return Told(*values)


def index_shards(
    config: WebDatasetConfig,
) -> tuple[list[Entry], list[Fault], tuple[str, ...] | None]:
    """List the samples of shards on the disk; no image is opened.

    Returns:
        The samples in the order of the shards, what was skipped, and the classes.

    Raises:
        DataError: If a shard is missing, compressed or not on the disk.
    """
    entries: list[Entry] = []
    faults: list[Fault] = []
    for place in find_shards(config.urls):
        if "://" in place or place.endswith("gz"):
            raise DataError(
                f"{place}: only uncompressed shards on the disk have an index; train with"
                " data.stream: true, or unpack it first"
            )
        path = Path(place)
        try:
            for name, parts in index_shard(path):
                image = next((m for kind, m in parts.items() if kind not in TEXTS), None)
                if image is None:
                    faults.append(Fault(name, "no image"))
                    continue
                texts = {kind: _read(path, m) for kind, m in parts.items() if kind in TEXTS}
                caption, class_name, fault = told_by(texts, config)
                if fault is not None:
                    faults.append(Fault(name, fault))
                    continue
                captions = () if caption is None else (caption,)
                entries.append(Entry(_ShardImage(path, name, image), captions, class_name))
        except DamagedShard as error:
            faults.append(Fault(path.name, f"{error}; what follows is lost"))
    return entries, faults, named_classes(entries, config.classes, _where(config))


class _ShardImage(NamedTuple):
    """An image inside a shard on the disk."""

    path: Path
    name: str
    member: Member

    @property
    def place(self) -> str:
        return f"{self.path}: {self.member.name}"

    def read(self) -> bytes:
        return _read(self.path, self.member)


def _read(path: Path, member: Member) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset)
        content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("the shard ends within it")
    return content


def _where(config: WebDatasetConfig) -> str:
    return config.urls if isinstance(config.urls, str) else ", ".join(config.urls[:3])
