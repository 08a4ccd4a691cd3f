"""What fine-tuning is shown: data under captions of its own, beside what the base model drew."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.base import (
    ContentAddressed,
    Description,
    Example,
    Fault,
    ImageData,
    ListsCaptions,
)
from mezzotint.errors import DataError
from mezzotint.training.batches import DataOrder
from mezzotint.training.orders import Order

__all__ = ["CaptionedData", "Pairs", "WithPrior"]


class _Around:
    """Has the classes and the faults of the data inside."""

    data: ImageData
    # only where the data inside have it: then latents are found again whatever is said of pictures
    content: Callable[[int], str]
    captions_of: Callable[[int], Sequence[str]]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The data's own."""
        return self.data.class_names

    @property
    def faults(self) -> list[Fault]:
        """The data's own."""
        return self.data.faults


class CaptionedData(_Around):
    """A data set under other captions.

    Args:
        data: The pictures, and what else is known of them.
        templates: Captions in which ``{caption}`` is the data's own and ``{token}`` the word; one
            is chosen by the generator, and without one the first.
        token: The word.

    Raises:
        DataError: If a caption is wanted of data that have none.
    """

    def __init__(self, data: ImageData, templates: Sequence[str], token: str = "") -> None:
        self.data, self.templates, self.token = data, tuple(templates), token
        if isinstance(data, ContentAddressed):
            self.content = data.content
        asked = [template for template in self.templates if "{caption}" in template]
        if asked and data.describe(0).caption is None:
            raise DataError(
                f"the images have no captions for {asked[0]!r}: give data.caption_column, or"
                " caption_templates without {caption}"
            )
        if isinstance(data, ListsCaptions) or not asked:
            self.captions_of = self._captions_of

    @property
    def fingerprint(self) -> str:
        """Hash of the data and the captions."""
        content = [self.data.fingerprint, self.templates, self.token]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one example; see `mezzotint.data.ImageData.load`."""
        example = self.data.load(index, generator)
        return replace(example, caption=self._caption(example.caption, generator))

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return what is known of an example; see `mezzotint.data.ImageData.describe`."""
        known = self.data.describe(index, generator, with_map=with_map)
        return replace(known, caption=self._caption(known.caption, generator))

    def _caption(self, own: str | None, generator: torch.Generator | None) -> str:
        count = len(self.templates)
        chosen = 0 if generator is None else int(torch.randint(count, (1,), generator=generator))
        return self._filled(self.templates[chosen], own or "")

    def _captions_of(self, index: int) -> list[str]:
        own = self.data.captions_of(index) if isinstance(self.data, ListsCaptions) else ()
        return [self._filled(each, text) for each in self.templates for text in own or ("",)]

    def _filled(self, template: str, own: str) -> str:
        return template.format(caption=own, token=self.token)


class WithPrior(_Around):
    """A data set, and after it the pictures that the base model drew.

    Args:
        data: The pictures to be learned.
        paths: What was drawn.
        caption: What was asked for.
        resolution: Their side in pixels.
    """

    def __init__(
        self, data: ImageData, paths: Sequence[Path], caption: str, resolution: int
    ) -> None:
        self.data, self.paths, self.caption = data, tuple(paths), caption
        self._size = resolution, resolution
        digest = hashlib.sha256(json.dumps([data.fingerprint, caption]).encode())
        contents: list[str] = []
        for path in self.paths:
            pixels = self._pixels(path).numpy().tobytes()
            digest.update(pixels)
            contents.append(hashlib.sha256(f"{self._size} ".encode() + pixels).hexdigest())
        self._fingerprint = digest.hexdigest()
        if isinstance(data, ContentAddressed):
            inner, count = data.content, len(data)
            self.content = lambda k: inner(k) if k < count else contents[k - count]
        if isinstance(data, ListsCaptions):
            said, own = data.captions_of, len(data)
            self.captions_of = lambda k: said(k) if k < own else (caption,)

    @property
    def fingerprint(self) -> str:
        """Hash of the data, of what was drawn, and of what was asked for."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.data) + len(self.paths)

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one example; see `mezzotint.data.ImageData.load`."""
        if index < len(self.data):
            return self.data.load(index, generator)
        path = self.paths[index - len(self.data)]
        return Example(self._pixels(path), self.caption, None, path.name)

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return what is known of an example; see `mezzotint.data.ImageData.describe`."""
        if index < len(self.data):
            return self.data.describe(index, generator, with_map=with_map)
        return Description(self.caption, None)

    def _pixels(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}; remove it to draw it anew") from None
        if picture.size != self._size:
            raise DataError(f"{path}: is {picture.size}, expected {self._size}; remove it")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Pairs:
    """The order in which pictures of the data and of the prior alternate, each in its own.

    Attributes:
        data: Order of the pictures of the data, which are the first.
        count: How many they are.
        prior: Order of those of the prior, which follow them.
        weight: Of the prior's loss beside the data's.
    """

    data: Order
    count: int
    prior: DataOrder
    weight: float

    def index(self, position: int) -> int:
        """Return the picture at a global position."""
        pair, of_prior = divmod(position, 2)
        return self.count + self.prior.index(pair) if of_prior else self.data.index(pair)

    def others(self, position: int) -> range:
        """Return the places of the same kind that follow, until each picture of it has come."""
        pictures = self.prior.count if position % 2 else self.count
        return range(position + 2, position + 2 + 4 * pictures, 2)

    def weights(self, positions: Sequence[int]) -> Tensor:
        """Return what losses are multiplied by, so that their mean is that of both sums."""
        return torch.tensor([2.0 * self.weight if p % 2 else 2.0 for p in positions])
