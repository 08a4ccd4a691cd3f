"""Writing images as shards of the img2dataset convention, whole or not at all."""

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from mezzotint.data.base import Fault
from mezzotint.data.captioned import Entry
from mezzotint.data.decoding import PICTURE_SUFFIXES
from mezzotint.data.files import one_line
from mezzotint.errors import DataError

__all__ = ["OpenedImage", "Packed", "open_images", "pack"]

T = TypeVar("T")

_KINDS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
_AT_ONCE = 64  # images that are in memory at a time
_MOST_PER_SHARD = 10_000  # for the four digits of a key; img2dataset's own default


class OpenedImage(NamedTuple):
    """An image that was decoded to see whether it is whole.

    Attributes:
        entry: The image.
        content: The bytes of the file.
        kind: Such as ``jpg``.
        width: As stored, in pixels.
        height: As stored, in pixels.
    """

    entry: Entry
    content: bytes
    kind: str
    width: int
    height: int


class Packed(NamedTuple):
    """What was written.

    Attributes:
        images: How many.
        shards: In how many tar files.
        faults: What was left out.
    """

    images: int
    shards: int
    faults: list[Fault]


def open_images(entries: Iterable[Entry | Fault]) -> Iterator[OpenedImage | Fault]:
    """Decode images in threads, in their order, a few at a time.

    Args:
        entries: Faults come back as they are.
    """
    source = iter(entries)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # of untidy metadata in pictures that can be read
        while part := list(itertools.islice(source, _AT_ONCE)):
            yield from pool.map(_open, part)


def pack(
    entries: Iterable[Entry | Fault],
    folder: Path,
    shard_size: int = 1000,
    on_image: Callable[[int], None] | None = None,
) -> Packed:
    """Write images as ``00000.tar`` and so on, with ``00000_stats.json`` beside each.

    A sample is the image file as it was (as PNG, if it is of a kind that shards seldom hold), its
    caption as ``.txt``, its class as ``.cls``, and a ``.json`` with size and SHA-256, as
    img2dataset writes it. Images that cannot be decoded are left out. The folder appears when all
    is written, so there is never a part of it.

    Args:
        entries: The images; of several captions the first is kept.
        folder: Where to write; must not exist, or be empty.
        shard_size: Images in a tar file, up to 10,000.
        on_image: Called with the number of images done.

    Raises:
        DataError: If the folder holds something, or there is no whole image.
        OSError: If it cannot be written.
    """
    if not 1 <= shard_size <= _MOST_PER_SHARD:
        raise DataError(f"shard_size {shard_size}: expected 1 to {_MOST_PER_SHARD:,} images")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is there already; choose another place, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    faults: list[Fault] = []
    try:
        opened = _counted(open_images(entries), on_image)
        images = shards = 0
        told = 0  # faults that the statistics of a shard count
        while (image := _next_whole(opened, faults)) is not None:
            tar = temporary / f"{shards:05d}.tar"
            begun, count = time.time(), _write_shard(tar, shards, image, opened, shard_size, faults)
            _write_stats(tar.with_name(f"{shards:05d}_stats.json"), begun, count, faults[told:])
            images, shards, told = images + count, shards + 1, len(faults)
        if not images:
            named = f"; {faults[0].name}: {faults[0].reason}" if faults else ""
            raise DataError(f"{folder}: there is no whole image to write{named}")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Packed(images, shards, faults)


def _open(entry: Entry | Fault) -> OpenedImage | Fault:
    if isinstance(entry, Fault):
        return entry
    try:
        content = entry.file.read()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            kind = _KINDS.get(picture.format or "", (picture.format or "").lower())
            if f".{kind}" not in PICTURE_SUFFIXES:  # whoever reads shards would pass it by
                file = io.BytesIO()
                picture.save(file, "PNG")
                kind, content = "png", file.getvalue()
            return OpenedImage(entry, content, kind, picture.width, picture.height)
    except FileNotFoundError:
        return Fault(entry.file.name, "no such file")
    except Exception as error:  # a damaged file makes decoders raise anything
        return Fault(entry.file.name, one_line(error))


def _counted(items: Iterable[T], on_item: Callable[[int], None] | None) -> Iterator[T]:
    for number, item in enumerate(items, start=1):
        yield item
        if on_item is not None:
            on_item(number)


def _next_whole(opened: Iterator[OpenedImage | Fault], faults: list[Fault]) -> OpenedImage | None:
    for image in opened:
        if isinstance(image, OpenedImage):
            return image
        faults.append(image)
    return None


def _write_shard(
    path: Path,
    number: int,
    first: OpenedImage,
    rest: Iterator[OpenedImage | Fault],
    size: int,
    faults: list[Fault],
) -> int:
    image: OpenedImage | None = first
    count = 0
    with tarfile.open(path, "w") as tar:
        while image is not None:
            key = f"{number:05d}{count:04d}"
            for kind, content in _parts(key, image).items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            count += 1
            image = _next_whole(rest, faults) if count < size else None
    return count


def _write_stats(path: Path, begun: float, count: int, faults: Sequence[Fault]) -> None:
    left_out = Counter(fault.reason for fault in faults)
    stats = {
        "count": count + left_out.total(),
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": left_out.total(),
        "duration": time.time() - begun,
        "start_time": begun,
        "end_time": time.time(),
        "status_dict": {"success": count, **left_out},
    }
    path.write_text(json.dumps(stats, indent=4) + "\n")


def _parts(key: str, image: OpenedImage) -> dict[str, bytes]:
    entry = image.entry
    caption = entry.captions[0] if entry.captions else None
    table = {
        "key": key,
        "name": entry.file.name,
        "caption": caption,
        "class": entry.class_name,
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        "sha256": hashlib.sha256(image.content).hexdigest(),
        "status": "success",
        "error_message": None,
    }
    parts = {image.kind: image.content}
    if caption is not None:
        parts["txt"] = caption.encode()
    if entry.class_name is not None:
        parts["cls"] = entry.class_name.encode()
    parts["json"] = json.dumps(table, ensure_ascii=False).encode()
    return parts
