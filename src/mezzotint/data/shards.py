"""Tar files of samples in the convention of WebDataset and img2dataset, read as they come.

A sample is a run of neighbouring files whose paths are equal up to the first dot of their names:
``000000012.jpg``, ``000000012.txt`` and ``000000012.json``. (github.com/webdataset/webdataset,
github.com/rom1504/img2dataset.)
"""

import contextlib
import glob
import gzip
import io
import re
import tarfile
import time
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mezzotint.data.decoding import PICTURE_SUFFIXES
from mezzotint.data.files import missing_path, one_line
from mezzotint.errors import DataError, MissingExtraError

__all__ = ["TEXTS", "DamagedShard", "Member", "Sample", "find_shards", "index_shard", "read_shard"]
__all__ += ["shard_name"]

_BLOCK = 512
_MOST_MEMBER = 256 << 20  # bytes; a larger file is passed by, as no image has so many
_MOST_SHARDS = 1_000_000  # that a pattern may name
_TRIES = 3
_TIMEOUT = 60.0  # seconds
TEXTS = frozenset({"txt", "json", "cls"})  # kinds of files that are kept beside a picture
_PICTURES = frozenset(suffix[1:] for suffix in PICTURE_SUFFIXES)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class DamagedShard(Exception):  # noqa: N818, whoever reads the shard decides what becomes of it
    """A shard cannot be read from here on."""


class Member(NamedTuple):
    """A file inside a tar file.

    Attributes:
        name: Its path.
        offset: Where its bytes begin in the tar file.
        size: How many there are.
    """

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """What stands in a shard under one key.

    Attributes:
        name: The shard's name and the key: ``00000.tar/000000012``.
        parts: From extensions, in lower case and without a dot, to the bytes of pictures and texts.
    """

    name: str
    parts: Mapping[str, bytes]

    @property
    def picture(self) -> bytes | None:
        """The first picture."""
        return next((part for kind, part in self.parts.items() if kind in _PICTURES), None)


def find_shards(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Return the shards that patterns name, each once.

    Args:
        urls: Paths or addresses. ``{00000..00012}`` and ``{a,b}`` stand for each of several;
            ``*``, ``?`` and ``[…]`` are for paths, and a folder stands for its tar files.

    Raises:
        DataError: If a path doesn't exist or a pattern names nothing.

    Example:
        >>> find_shards("https://example.org/{08..10}.tar")[1]
        'https://example.org/09.tar'
    """
    found: dict[str, None] = {}
    for pattern in [urls] if isinstance(urls, str) else urls:
        for name in _expanded(pattern):
            found |= dict.fromkeys([name] if "://" in name else _local(name))
    return tuple(found)


def read_shard(place: str, skip: int = 0) -> Iterator[Sample]:
    """Read a shard from its beginning to its end, one sample at a time.

    Args:
        place: Path or address; ``.tar``, or compressed ``.tar.gz`` or ``.tgz``.
        skip: Samples to pass by.

    Raises:
        DamagedShard: Where it cannot be read further.
        DataError: If it isn't there, or an address doesn't answer.
    """
    done = 0
    for attempt in range(_TRIES):
        try:
            with _open(place) as file:
                for sample in _samples(file, shard_name(place), skip + done):
                    done += 1
                    yield sample
            return
        except FileNotFoundError:
            raise DataError(f"{place}: no such file; put the shard back, or leave it out") from None
        except (DamagedShard, OSError, HTTPException, EOFError) as error:
            if "://" in place and attempt + 1 < _TRIES:
                time.sleep(2.0**attempt)
            elif isinstance(error, DamagedShard) or "://" not in place:
                raise DamagedShard(one_line(error)) from None
            else:
                raise DataError(f"{place}: cannot be read: {one_line(error)}") from None


def index_shard(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Say where in a shard on the disk each sample's pictures and texts lie, without reading them.

    Args:
        path: Of an uncompressed tar file.

    Yields:
        The sample's name, and its parts by extension.

    Raises:
        DamagedShard: Where it cannot be read further.
    """
    with path.open("rb") as file:
        for key, parts in _groups(_Tar(file)):
            yield f"{path.name}/{key}", parts


def _expanded(pattern: str) -> Iterator[str]:
    """Every name for which a pattern with braces stands."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(braces[1])
    if numbers is None:
        choices: Iterator[str] = iter(braces[1].split(","))
    else:
        first, last, digits = int(numbers[1]), int(numbers[2]), len(numbers[1])
        if not 0 <= last - first < _MOST_SHARDS:
            raise DataError(f"urls: {pattern}: {braces[0]} is no range of shards")
        choices = (f"{number:0{digits}d}" for number in range(first, last + 1))
    for choice in choices:
        yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _local(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if _is_tar(p.name))
        if not found:
            raise DataError(f"{path}: no tar files in this folder")
        return found
    if path.is_file():
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        near = missing_path(path, files=True)
        raise DataError(f"{path}: no such shard, and no pattern of any{near}")
    return found


def _is_tar(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz"))


def shard_name(place: str) -> str:
    """Return what messages call a shard: the last part of its path or address."""
    return place.partition("?")[0].rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _open(place: str) -> Generator[BinaryIO]:
    if place.startswith(("http://", "https://")):
        request = urllib.request.Request(place, headers={"User-Agent": "mezzotint"})
        file = cast(BinaryIO, urllib.request.urlopen(request, timeout=_TIMEOUT))
    elif "://" in place:
        try:
            import fsspec
        except ImportError:
            raise MissingExtraError("fsspec", "train", f"reading {place}") from None
        opened: Any = fsspec.open(place, "rb")
        file = cast(BinaryIO, opened.open())
    else:
        file = Path(place).open("rb")  # noqa: SIM115, it is closed below
    with file:
        if shard_name(place).endswith("gz"):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def _samples(file: BinaryIO, shard: str, skip: int) -> Iterator[Sample]:
    tar = _Tar(file)
    parts: dict[str, bytes] = {}
    current: str | None = None
    number = -1
    for member in tar:
        key, kind = _split(member.name)
        if key != current:
            if current is not None and number >= skip:
                yield Sample(f"{shard}/{current}", parts)
            current, parts, number = key, {}, number + 1
        if number >= skip and _wanted(member, kind):
            parts[kind] = tar.read(member)
    if current is not None and number >= skip:
        yield Sample(f"{shard}/{current}", parts)


def _groups(tar: "_Tar") -> Iterator[tuple[str, dict[str, Member]]]:
    parts: dict[str, Member] = {}
    current: str | None = None
    for member in tar:
        key, kind = _split(member.name)
        if key != current:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        if _wanted(member, kind):
            parts[kind] = member
    if current is not None:
        yield current, parts


def _split(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _wanted(member: Member, kind: str) -> bool:
    return (kind in _PICTURES or kind in TEXTS) and member.size <= _MOST_MEMBER


class _Tar:
    """The regular files of a tar file that is read forward only.

    `tarfile` takes a damaged header for the end of the file, and so it does an end without the
    block of zeros that every writer puts there, as where a connection drops: what follows would be
    lost without a word. Here either is a DamagedShard.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._end: int | None = None  # where known, what isn't wanted is not read
        if file.seekable() and not isinstance(file, gzip.GzipFile):
            self._end = file.seek(0, io.SEEK_END)
            file.seek(0)

    def __iter__(self) -> Iterator[Member]:
        told: dict[str, str] = {}  # what a header said of the file after it
        while (header := self._header()) is not None:
            begin = self._position
            size = int(told.get("size", header.size)) if header.isreg() else header.size
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                told |= _pax(self._take(size))
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                told["path"] = self._take(size).rstrip(b"\0").decode(errors="replace")
            else:
                # a sparse file is no picture
                if header.isreg() and header.type != tarfile.GNUTYPE_SPARSE:
                    yield Member(told.get("path", header.name), begin, size)
                told = {}
            self._go(begin + -(-size // _BLOCK) * _BLOCK)

    def read(self, member: Member) -> bytes:
        """The bytes of the member at which the iteration stands."""
        self._go(member.offset)
        return self._take(member.size)

    def _header(self) -> tarfile.TarInfo | None:
        block = self._some(_BLOCK)
        if len(block) == _BLOCK and not block.strip(b"\0"):
            return None
        if not block:
            raise DamagedShard(f"ends at byte {self._position:,}, without a tar file's end mark")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            at = self._position - len(block)
            raise DamagedShard(f"damaged at byte {at:,}: {error}") from None

    def _take(self, size: int) -> bytes:
        if size > _MOST_MEMBER:
            raise DamagedShard(f"a header claims {size:,} bytes at {self._position:,}")
        content = self._some(size)
        if len(content) < size:
            raise DamagedShard(f"ends at byte {self._position:,}, within a file")
        return content

    def _some(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
            self._position += len(part)
        return b"".join(parts)

    def _go(self, position: int) -> None:
        if position == self._position:
            return
        if self._end is not None:
            if position > self._end:
                raise DamagedShard(f"ends at byte {self._end:,}, within a file")
            self._position = self._file.seek(position)
            return
        while self._position < position:
            if not self._some(min(1 << 20, position - self._position)):
                raise DamagedShard(f"ends at byte {self._position:,}, within a file")


def _pax(content: bytes) -> dict[str, str]:
    """Path and size of an extended header: lines of length, key and value (POSIX.1-2001)."""
    found: dict[str, str] = {}
    file = io.BytesIO(content)
    while (text := content[file.tell() :].partition(b" ")[0]).isdigit():
        line = file.read(int(text)) if int(text) else b""
        key, equals, value = line.partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if not equals:
            break
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode(errors="replace")
    if not found.get("size", "0").isdigit():
        raise DamagedShard("an extended header gives no size")
    return found
