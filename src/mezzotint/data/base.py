"""What a data set gives: one example by its index, or by its position in a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mezzotint.conditioning.base import Box

__all__ = ["ContentAddressed", "Description", "Example", "Fault", "ImageData", "ListsCaptions"]
__all__ += ["StreamData"]


@dataclass(frozen=True, slots=True)
class Example:
    """One picture and what is known of it.

    Attributes:
        image: ``(3, H, W)`` uint8, sRGB, 0 to 255.
        caption: What the picture shows, in words.
        label: Index into the data set's ``class_names``.
        name: What messages call it: a concept's name, or a path inside the user's folder.
        boxes: Where its objects are; their labels index ``class_names``.
        map: ``(H, W)`` uint8, 0 where the background shows, elsewhere 1 + the object's class.
    """

    image: Tensor
    caption: str | None
    label: int | None
    name: str
    boxes: tuple[Box, ...] | None = None
    map: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of one picture, without the picture; see `Example` for the attributes."""

    caption: str | None
    label: int | None
    boxes: tuple[Box, ...] | None = None
    map: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that was skipped, and why."""

    name: str
    reason: str


class ImageData(Protocol):
    """A data set whose examples are a pure function of (index, generator)."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of labels, boxes and maps; None if there are none."""
        ...

    @property
    def faults(self) -> list[Fault]:
        """The files that were skipped."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures, their captions and labels, and how they are viewed."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one example.

        Args:
            index: From 0 to ``len - 1``.
            generator: Decides augmentation and caption, alone; None gives the plain view.
        """
        ...

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return what is known of an example without its picture.

        Args:
            index: From 0 to ``len - 1``.
            generator: Decides the caption, alone, and the view where boxes and maps move with it;
                None gives the plain ones.
            with_map: Whether to draw the map, if the data have maps; it costs about what the
                picture would.
        """
        ...


@runtime_checkable
class ContentAddressed(Protocol):
    """A data set that knows what each picture is made from, whatever stands beside it."""

    def content(self, index: int) -> str:
        """Return a hash of all that the pixels of an image's views depend on, but for a generator.

        Args:
            index: From 0 to ``len - 1``.
        """
        ...


@runtime_checkable
class ListsCaptions(Protocol):
    """A data set that knows all that it may say of each picture."""

    def captions_of(self, index: int) -> Sequence[str]:
        """Return every caption that `ImageData.describe` may give, whatever the generator.

        Args:
            index: From 0 to ``len - 1``.
        """
        ...


class StreamData(Protocol):
    """A data set without length or index; a sample is a function of (position, generator)."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if there are none."""
        ...

    @property
    def faults(self) -> list[Fault]:
        """What was skipped so far; the first thousand of it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of what the stream is made of and of its order."""
        ...

    def load(self, position: int, generator: torch.Generator | None = None) -> Example:
        """Return the sample at a position of the order, from 0 on and without an end.

        It is cheap if positions rise, in steps of any size. Several threads may call it.

        Args:
            position: In the order of all ranks.
            generator: Decides augmentation, alone; None gives the plain view.
        """
        ...

    def describe(
        self, position: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return what is known of a sample without decoding its picture."""
        ...

    def captions(self, limit: int) -> list[str]:
        """Return the captions of the first samples, in the order in which they are stored."""
        ...

    def state(self, position: int) -> dict[str, Any]:
        """Return plain values with which a resumed stream finds the position quickly.

        Args:
            position: That which will be asked for next.
        """
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave; see `merge_states` for that of several ranks.

        Raises:
            DataError: If it is of another stream.
        """
        ...
