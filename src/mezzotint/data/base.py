"""What a data set gives: one example by its index, and nothing that depends on an order."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Example", "Fault", "ImageData"]


@dataclass(frozen=True, slots=True)
class Example:
    """One picture and what is known of it.

    Attributes:
        image: ``(3, H, W)`` uint8, sRGB, 0 to 255.
        caption: What the picture shows, in words.
        label: Index into the data set's ``class_names``.
        name: What messages call it: a concept's name, or a path inside the user's folder.
    """

    image: Tensor
    caption: str | None
    label: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that was skipped, and why."""

    name: str
    reason: str


class ImageData(Protocol):
    """A data set whose examples are a pure function of (index, generator)."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, or None if the examples carry no label."""
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
        self, index: int, generator: torch.Generator | None = None
    ) -> tuple[str | None, int | None]:
        """Return caption and label of an example without its picture.

        Args:
            index: From 0 to ``len - 1``.
            generator: Decides the caption, alone; None gives the plain one.
        """
        ...
