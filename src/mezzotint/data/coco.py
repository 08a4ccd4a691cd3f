"""A user's own images with boxes, in the format of COCO: what layout-to-image learns from."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from mezzotint.conditioning.base import Box
from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.coco_json import CocoPicture, read_captions, read_objects
from mezzotint.data.decoding import decode_image, frame_size
from mezzotint.data.files import (
    ImageFile,
    ImageFiles,
    View,
    check_faults,
    choose_view,
    cut,
    existing_folder,
    seen_share,
)
from mezzotint.errors import DataError

__all__ = ["CocoData", "CocoDataConfig"]


class CocoDataConfig(Config):
    """Which images and boxes, and how they are seen.

    Attributes:
        annotations: The JSON file of objects, such as ``instances_train2017.json``.
        images: The folder in which its ``file_name`` are.
        captions: A JSON file of captions of the same images, such as
            ``captions_train2017.json``; images that it has none for are faults.
        resolution: Side of the square views, in pixels.
        crop: The central square, or with a generator one anywhere.
        flip: Whether views are mirrored, half of them.
        min_box: Boxes that cover less of the view are left out.
        min_visible: So are those of which the view shows less.
        max_objects: The largest are kept, up to this; the layout encoder's default has room for 30.
        max_broken: Share of the images, and of the boxes, that may be skipped.
        cache_limit_mib: Pixels are kept in memory up to this.
        json_limit_mib: Larger JSON files are refused: they take several times their size in memory.
    """

    kind: Literal["coco"] = "coco"
    annotations: str
    images: str
    captions: str | None = None
    resolution: int = Field(default=64, gt=0)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    min_box: float = Field(default=0.0005, ge=0, lt=1)
    min_visible: float = Field(default=0.25, ge=0, le=1)
    max_objects: int = Field(default=30, ge=1)
    max_broken: float = Field(default=0.01, ge=0, le=1)
    cache_limit_mib: int = Field(default=2048, ge=0)
    json_limit_mib: int = Field(default=1024, ge=1)


class CocoData:
    """Images with boxes and perhaps captions as a data set; no example has a label.

    Images are decoded as `mezzotint.data.FolderData` does, and sorted by name. Boxes follow the
    crop and the mirroring, are clipped to the view, and stand in the order of the file. Crowds
    (``iscrowd``) are left out.

    Args:
        config: Which images and boxes, and how they are seen.

    Raises:
        DataError: If a file or the folder is missing or is not what it should be, or more than
            ``max_broken`` of the images or of the boxes are broken.
    """

    def __init__(self, config: CocoDataConfig) -> None:
        self.config = config
        root = existing_folder(config.images)
        path = Path(config.annotations).expanduser()
        table = read_objects(path, config.json_limit_mib)
        self.class_names: tuple[str, ...] = table.class_names
        pictures = sorted(table.pictures, key=lambda picture: picture.name)
        if not pictures:
            raise DataError(f"{path}: images: the list is empty")
        missing = _read_captions(config, pictures)
        pictures = [p for p in pictures if p.captions] if config.captions else pictures
        self._files = ImageFiles(
            [ImageFile(root / p.name, p.name) for p in pictures],
            partial(decode_image, resolution=config.resolution, square=config.crop == "center"),
            config.cache_limit_mib,
        )
        unlike = self._drop_unlike(pictures)
        broken = [*missing, *self._files.faults, *unlike]
        check_faults(root, broken, len(self._files), config.max_broken)
        self._pictures = [pictures[k] for k in self._files.whole]
        outside = self._measure()
        wrong = [*table.faults, *outside]
        if wrong:
            check_faults(path, wrong, table.boxes - len(outside), config.max_broken, "boxes")
        self.faults: list[Fault] = [*broken, *wrong]

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def fingerprint(self) -> str:
        """Hash of the files' bytes, boxes, captions and the view; not of where they lie."""
        places = {"annotations", "images", "captions"}
        limits = {"cache_limit_mib", "json_limit_mib", "max_broken"}
        view = self.config.model_dump(exclude=places | limits)
        rows = [
            ([(b.label, b.left, b.top, b.right, b.bottom) for b in boxes], picture.captions)
            for boxes, picture in zip(self._boxes, self._pictures, strict=True)
        ]
        content = [self._files.digest, rows, self.class_names, view]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one image; see `mezzotint.data.ImageData.load`.

        Without a generator it is the central crop under its first caption. With one, a random
        crop, mirroring and caption as configured.

        Raises:
            DataError: If the pixels are not in memory and the file has gone since.
        """
        view, caption = self._choose(index, generator)
        return Example(
            cut(self._files.pixels(index), view),
            caption,
            None,
            self._pictures[index].name,
            boxes=self._seen(index, view),
        )

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and boxes; see `mezzotint.data.ImageData.describe`.

        They are those of the view that `load` would give for a generator in the same state.
        """
        view, caption = self._choose(index, generator)
        return Description(caption, None, boxes=self._seen(index, view))

    def captions_of(self, index: int) -> tuple[str, ...]:
        """Return every caption of an image; see `mezzotint.data.base.ListsCaptions`."""
        return tuple(self._pictures[index].captions)

    def content(self, index: int) -> str:
        """Return a hash of the image's bytes and of its view; see `ContentAddressed`."""
        return self._files.content(
            index, self.config.model_dump(include={"resolution", "crop", "flip"})
        )

    def _choose(self, index: int, generator: torch.Generator | None) -> tuple[View, str | None]:
        side = self.config.resolution
        square = self.config.crop == "center"
        wide, high = (side, side) if square else frame_size(*self._files.sizes[index], side)
        view = choose_view(high, wide, side, self.config.flip, generator)
        captions = self._pictures[index].captions
        if not captions:
            return view, None
        draw = 0.0 if generator is None else float(torch.rand((), generator=generator))
        return view, captions[int(draw * len(captions))]

    def _seen(self, index: int, view: View) -> tuple[Box, ...]:
        """The boxes of a view, in shares of it."""
        config = self.config
        part = seen_share(*self._files.sizes[index], view, square=config.crop == "center")
        found: list[Box] = []
        for box in self._boxes[index]:
            seen = _clip(_to_view(box, part, view.mirrored))
            whole = _area(box) / (part[2] * part[3])
            if seen and _area(seen) >= max(config.min_box, config.min_visible * whole):
                found.append(seen)
        kept = sorted(range(len(found)), key=lambda k: -_area(found[k]))[: config.max_objects]
        return tuple(found[k] for k in sorted(kept))

    def _drop_unlike(self, pictures: list[CocoPicture]) -> list[Fault]:
        """Leave out images whose shape is not the one in which their boxes are measured."""
        faults: list[Fault] = []
        alike: list[int] = []
        for index, (position, size) in enumerate(
            zip(self._files.whole, self._files.sizes, strict=True)
        ):
            picture = pictures[position]
            wide, high = picture.size or size
            # smaller copies of the images will do: one pixel may be lost to rounding
            if abs(size[0] * high - size[1] * wide) <= max(wide, high):
                alike.append(index)
                continue
            reason = f"is {size[0]}x{size[1]}, but its boxes are measured in {wide}x{high}"
            faults.append(Fault(picture.name, reason))
        self._files.select(alike)
        return faults

    def _measure(self) -> list[Fault]:
        """Bring boxes from pixels to shares of the image; returns those that lie outside."""
        faults: list[Fault] = []
        self._boxes: list[list[Box]] = []
        for picture, size in zip(self._pictures, self._files.sizes, strict=True):
            wide, high = picture.size or size
            self._boxes.append([])
            for label, left, top, width, height, where in picture.objects:
                box = _clip(
                    Box(
                        label, left / wide, top / high, (left + width) / wide, (top + height) / high
                    )
                )
                if box is not None:
                    self._boxes[-1].append(box)
                    continue
                reason = f"of {picture.name}: bbox: lies outside the image of {wide}x{high}"
                faults.append(Fault(where, reason))
        return faults


def _read_captions(config: CocoDataConfig, pictures: list[CocoPicture]) -> list[Fault]:
    if config.captions is None:
        return []
    path = Path(config.captions).expanduser()
    read_captions(path, pictures, config.json_limit_mib)
    return [Fault(p.name, f"no caption in {path.name}") for p in pictures if not p.captions]


def _to_view(box: Box, part: tuple[float, float, float, float], mirrored: bool) -> Box:
    left, top, wide, high = part
    start, end = (box.left - left) / wide, (box.right - left) / wide
    if mirrored:
        start, end = 1.0 - end, 1.0 - start
    return Box(box.label, start, (box.top - top) / high, end, (box.bottom - top) / high)


def _clip(box: Box) -> Box | None:
    left, top, right, bottom = (
        min(max(edge, 0.0), 1.0) for edge in (box.left, box.top, box.right, box.bottom)
    )
    return Box(box.label, left, top, right, bottom) if left < right and top < bottom else None


def _area(box: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top)
