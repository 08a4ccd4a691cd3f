"""Stored images that have a caption, a class or neither, wherever they are stored."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.buckets import BucketsConfig, bucket_sizes, nearest_bucket
from mezzotint.data.decoding import DecodedImage, decode_image, decode_to_cover
from mezzotint.data.files import ImageFiles, Stored, check_faults, choose_view, cut
from mezzotint.errors import DataError

__all__ = [
    "CaptionedConfig",
    "CaptionedImages",
    "Entry",
    "ViewConfig",
    "decode_view",
    "named_classes",
]


class ViewConfig(Config):
    """How stored images are seen.

    Attributes:
        resolution: Side of the square views, in pixels; with ``buckets``, of the square of the
            same area.
        crop: The central part, or with a generator one anywhere.
        flip: Whether views are mirrored, half of them.
        caption_column: What holds the captions; without it there are none.
        class_column: What holds the classes.
        classes: Fixes their numbering; by default they are sorted by name.
        max_broken: Share of the images that may be skipped.
    """

    resolution: int = Field(default=64, gt=0)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_column: str | None = None
    class_column: str | None = None
    classes: tuple[str, ...] | None = None
    max_broken: float = Field(default=0.01, ge=0, le=1)


class CaptionedConfig(ViewConfig):
    """How stored images are seen that have an index.

    Attributes:
        buckets: Views of several aspect ratios instead of squares; each batch is of one.
        balance: ``class`` draws each class equally often, however many images it has.
        cache_limit_mib: Pixels are kept in memory up to this.
    """

    buckets: BucketsConfig | None = None
    balance: Literal["class"] | None = None
    cache_limit_mib: int = Field(default=2048, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "CaptionedConfig":
        if self.buckets is None:
            return self
        if self.balance is not None:
            raise ValueError("balance: goes with squares alone; leave out buckets or balance")
        if self.resolution % self.buckets.multiple:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of buckets.multiple"
                f" {self.buckets.multiple}"
            )
        return self


def decode_view(
    content: bytes, config: ViewConfig, sizes: Sequence[tuple[int, int]]
) -> DecodedImage:
    """Decode an image file to the pixels of which its views are cut.

    Args:
        content: The bytes of the file.
        config: How it is seen.
        sizes: The buckets, or none for squares.

    Raises:
        ValueError: If its pixels have no known range.
        OSError: If it is damaged, or no image. Decoders may raise others.
    """
    exact = config.crop == "center"
    if not sizes:
        return decode_image(content, config.resolution, exact)
    return decode_to_cover(content, lambda w, h: sizes[nearest_bucket(w, h, sizes)], exact)


class Entry(NamedTuple):
    """An image, and what is known of it.

    Attributes:
        file: Where it is stored.
        captions: None of which it may have, or several that say the same.
        class_name: Its class.
    """

    file: Stored
    captions: tuple[str, ...]
    class_name: str | None


def named_classes(
    entries: Sequence[Entry], classes: tuple[str, ...] | None, where: object
) -> tuple[str, ...] | None:
    """Return the classes in the order of their labels.

    Args:
        entries: The images.
        classes: Those that the user fixed, if any.
        where: What messages call the data.

    Returns:
        None if no image has one and none was fixed.

    Raises:
        DataError: If an image has a class that is not among the fixed ones.
    """
    found = {entry.class_name for entry in entries if entry.class_name is not None}
    if classes is None:
        return tuple(sorted(found)) or None
    for name in sorted(found - set(classes)):
        raise DataError(f"classes: {where} has a class {name!r} that is not among them")
    return classes


class CaptionedImages:
    """Stored images as a data set.

    Every image is decoded once when it is opened, so that broken ones are known before training
    begins; the pixels stay in memory if they fit ``cache_limit_mib``. Images are turned upright as
    their EXIF data say, converted to 8-bit RGB (transparency on white), resized with antialiasing
    until the short side is ``resolution``, and cropped to a square; or, with ``buckets``, brought
    to the nearest of several aspect ratios.

    Args:
        where: What messages call the data.
        entries: The images, in the order of their indices.
        faults: Those that were skipped before.
        class_names: By label; None if there are none.
        config: How they are seen.

    Attributes:
        bucket_sizes: Width and height of each bucket; empty for squares.

    Raises:
        DataError: If more than ``max_broken`` of the images are broken, or none is whole, or
            classes are to be balanced that are not known.
    """

    def __init__(
        self,
        where: object,
        entries: Sequence[Entry],
        faults: Sequence[Fault],
        class_names: tuple[str, ...] | None,
        config: CaptionedConfig,
    ) -> None:
        self.config = config
        self.class_names = class_names
        self.bucket_sizes: tuple[tuple[int, int], ...] = ()
        if config.buckets is not None:
            self.bucket_sizes = bucket_sizes(config.resolution, config.buckets)
        self._files = ImageFiles(
            [entry.file for entry in entries],
            partial(decode_view, config=config, sizes=self.bucket_sizes),
            config.cache_limit_mib,
        )
        self.faults: list[Fault] = [*faults, *self._files.faults]
        self._entries = [entries[k] for k in self._files.whole]
        if not self._entries and not self.faults:
            raise DataError(f"{where}: names no image")
        check_faults(where, self.faults, len(self._entries), config.max_broken)
        if config.balance and class_names is None:
            raise DataError(f"balance: {where} has no classes; name a class_column")
        numbers = {name: number for number, name in enumerate(class_names or ())}
        self._labels = [
            None if e.class_name is None else numbers[e.class_name] for e in self._entries
        ]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def fingerprint(self) -> str:
        """Hash of the files' bytes, captions, labels and the view; not of where they lie."""
        rows = [(e.captions, label) for e, label in zip(self._entries, self._labels, strict=True)]
        content = [self._files.digest, rows, self.class_names, self._view_settings()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one image; see `mezzotint.data.ImageData.load`.

        Without a generator it is the central crop. With one, a random crop, mirroring and caption
        as configured.

        Raises:
            DataError: If the pixels are not in memory and the file has gone since.
        """
        entry = self._entries[index]
        pixels = self._files.pixels(index)
        high, wide = pixels.shape[:2]
        view = choose_view(high, wide, self._size(index), self.config.flip, generator)
        caption = _choose(entry.captions, generator)
        return Example(cut(pixels, view), caption, self._labels[index], entry.file.name)

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and label; see `mezzotint.data.ImageData.describe`.

        The caption is that which `load` would give for a generator in the same state.
        """
        captions = self._entries[index].captions
        if generator is not None and len(captions) > 1:
            torch.rand(3, generator=generator)  # the view's
        return Description(_choose(captions, generator), self._labels[index])

    def captions_of(self, index: int) -> tuple[str, ...]:
        """Return every caption of an image; see `mezzotint.data.base.ListsCaptions`."""
        return self._entries[index].captions

    def bucket(self, index: int) -> int:
        """Return the index in ``bucket_sizes`` of the bucket that an image is seen in."""
        return nearest_bucket(*self._files.sizes[index], self.bucket_sizes)

    def content(self, index: int) -> str:
        """Return a hash of the image's bytes and of how they are seen; see `ContentAddressed`."""
        return self._files.content(index, self._view_settings())

    def _size(self, index: int) -> tuple[int, int]:
        if not self.bucket_sizes:
            return self.config.resolution, self.config.resolution
        width, height = self.bucket_sizes[self.bucket(index)]
        return height, width

    def _view_settings(self) -> dict[str, object]:
        config = self.config
        buckets = None if config.buckets is None else config.buckets.to_dict()
        return {
            "resolution": config.resolution,
            "crop": config.crop,
            "flip": config.flip,
            "buckets": buckets,
        }


def _choose(captions: tuple[str, ...], generator: torch.Generator | None) -> str | None:
    if len(captions) < 2 or generator is None:
        return captions[0] if captions else None
    return captions[int(float(torch.rand((), generator=generator)) * len(captions))]
