"""The JSON files of COCO (Lin et al. 2014, arXiv 1405.0312): objects with boxes, and captions.

The files come from anywhere: every value is checked before it is used, and a file name may not
lead out of the folder of images.
"""

import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, cast

from mezzotint.data.base import Fault
from mezzotint.errors import DataError, nearest

__all__ = ["CocoObject", "CocoPicture", "CocoTable", "read_captions", "read_objects"]

_MOST = 1e9  # beyond any size or place in pixels
_NO_ID = 1 << 64  # what `_whole` never gives


class CocoObject(NamedTuple):
    """A box in pixels, and the index of its class."""

    label: int
    left: float
    top: float
    width: float
    height: float
    where: str  # what messages call it


@dataclass(slots=True)
class CocoPicture:
    """What the files say of one image.

    Attributes:
        identity: Its id in the files.
        name: Its path inside the folder of images.
        size: Width and height in which its boxes are measured; None where the file has none.
        objects: In the order of the file.
        captions: In the order of the file.
    """

    identity: int
    name: str
    size: tuple[int, int] | None
    objects: list[CocoObject] = field(default_factory=list[CocoObject])
    captions: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class CocoTable:
    """What a file of objects says.

    Attributes:
        class_names: In the order of its categories.
        pictures: In the order of its images.
        faults: Annotations that are no boxes of known things.
        boxes: How many annotations are.
    """

    class_names: tuple[str, ...]
    pictures: list[CocoPicture]
    faults: list[Fault]
    boxes: int


def read_objects(path: Path, limit_mib: int) -> CocoTable:
    """Read ``images``, ``categories`` and ``annotations``; crowds are left out.

    Args:
        path: The JSON file.
        limit_mib: Larger files are refused.

    Raises:
        DataError: Naming file and key, if it is not such a file.
    """
    data = _read(path, limit_mib)
    names, classes = _classes(path, _items(data, "categories", path))
    pictures = [
        _picture(item, f"{path}: images[{number}]")
        for number, item in enumerate(_items(data, "images", path))
    ]
    known = _distinct([picture.identity for picture in pictures], f"{path}: images")
    faults: list[Fault] = []
    boxes = 0
    for number, item in enumerate(_items(data, "annotations", path)):
        if item.get("iscrowd") in (1, "1"):
            continue
        where = f"annotations[{number}]"
        place = known.get(_identity(item.get("image_id")))
        if place is None:
            found = _quote(item.get("image_id"))
            faults.append(Fault(where, f"image_id: no image has the id {found}"))
            continue
        result = _object(item, classes, where)
        if isinstance(result, str):
            faults.append(Fault(where, f"of {pictures[place].name}: {result}"))
            continue
        pictures[place].objects.append(result)
        boxes += 1
    return CocoTable(names, pictures, faults, boxes)


def read_captions(path: Path, pictures: list[CocoPicture], limit_mib: int) -> None:
    """Give pictures the captions of a second file, which may know other images too.

    Args:
        path: The JSON file.
        pictures: Those of `read_objects`; they gain ``captions``.
        limit_mib: Larger files are refused.

    Raises:
        DataError: Naming file and key, if it is not such a file.
    """
    known = {picture.identity: picture for picture in pictures}
    for number, item in enumerate(_items(_read(path, limit_mib), "annotations", path)):
        where = f"{path}: annotations[{number}]"
        picture = known.get(_whole(item, "image_id", where))
        caption = _text(item, "caption", where)
        if picture is not None:
            picture.captions.append(" ".join(caption.split()))


def _read(path: Path, limit_mib: int) -> dict[str, Any]:
    try:
        if not path.exists():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = [name for name in there if name.endswith(".json")]
            raise DataError(
                f"{path}: no such file{'; ' + nearest(path.name, hint) if hint else ''}"
            )
        size = path.stat().st_size
        if not path.is_file() or size > limit_mib * 2**20:
            raise DataError(
                f"{path}: expected a file of at most {limit_mib} MiB (json_limit_mib), got"
                f" {size / 2**20:,.0f} MiB"
            )
        data = json.loads(path.read_bytes(), object_hook=_without_outlines)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read as JSON: {reason[:200]}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected keys and values, got {type(data).__name__}")
    return cast(dict[str, Any], data)


def _without_outlines(item: dict[str, Any]) -> dict[str, Any]:
    """Forget outlines as soon as they are read: they are most of a file, and nothing needs them."""
    item.pop("segmentation", None)
    return item


def _items(data: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    items = data.get(key)
    if not isinstance(items, list):
        found = "nothing" if key not in data else _quote(items)
        raise DataError(f"{path}: {key}: expected a list, got {found}")
    for number, item in enumerate(cast(list[object], items)):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}: {key}[{number}]: expected keys and values, got {_quote(item)}"
            )
    return cast(list[dict[str, Any]], items)


def _classes(path: Path, items: list[dict[str, Any]]) -> tuple[tuple[str, ...], dict[int, int]]:
    """The classes' names, and from an id to the index of its name."""
    where = [f"{path}: categories[{number}]" for number in range(len(items))]
    names = [_text(item, "name", place) for item, place in zip(items, where, strict=True)]
    numbers = [_whole(item, "id", place) for item, place in zip(items, where, strict=True)]
    indices = _distinct(numbers, f"{path}: categories")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: categories: two have the name {twice!r}")
    return tuple(names), indices


def _picture(item: dict[str, Any], where: str) -> CocoPicture:
    name = _text(item, "file_name", where)
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise DataError(f"{where}.file_name: {_quote(name)} leads out of the folder of images")
    size = None
    if item.get("width") is not None or item.get("height") is not None:
        size = _whole(item, "width", where), _whole(item, "height", where)
        if min(size) < 1:
            raise DataError(f"{where}: expected a width and a height above 0, got {list(size)}")
    return CocoPicture(_whole(item, "id", where), name, size)


def _object(item: dict[str, Any], classes: dict[int, int], where: str) -> CocoObject | str:
    label = classes.get(_identity(item.get("category_id")))
    if label is None:
        return f"category_id: no category has the id {_quote(item.get('category_id'))}"
    edges = item.get("bbox")
    if not isinstance(edges, list) or len(edges) != 4 or not all(map(_is_number, edges)):
        return f"bbox: expected [left, top, width, height], got {_quote(edges)}"
    left, top, width, height = (float(edge) for edge in cast(list[float], edges))
    if width <= 0 or height <= 0:
        return f"bbox: expected a width and a height above 0, got {_quote(edges)}"
    return CocoObject(label, left, top, width, height, where)


def _distinct(numbers: list[int], where: str) -> dict[int, int]:
    """The place of each id; refuses one that stands there twice."""
    places: dict[int, int] = {}
    for place, number in enumerate(numbers):
        if places.setdefault(number, place) != place:
            raise DataError(f"{where}: two have the id {number}")
    return places


def _is_number(value: object) -> bool:
    # NaN and the infinities, which Python's JSON knows, fail the comparison
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def _identity(value: object) -> int:
    """A value if it may be an id, else one that nothing has."""
    return value if isinstance(value, int) and not isinstance(value, bool) else _NO_ID


def _whole(item: dict[str, Any], key: str, where: str) -> int:
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        found = _quote(value) if key in item else "nothing"
        raise DataError(f"{where}.{key}: expected a whole number, got {found}")
    return value


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        found = _quote(value) if key in item else "nothing"
        raise DataError(f"{where}.{key}: expected text, got {found}")
    return value


def _quote(value: object) -> str:
    return reprlib.repr(value)  # bounded, however long or deep the value is
