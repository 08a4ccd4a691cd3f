"""Tensors that lie in a file, whatever its format: described at once, read when asked for."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError

__all__ = ["MOST_EXPANDED", "Storage", "StoredTensor", "check_readings", "extent"]

MOST_EXPANDED = 1 << 22  # elements of a file's tensors that are said to be more than lie there
# times that tensors may read one storage: as a whole, in parts, and again where weights are tied
_MOST_READINGS = 4
_FEW = 1 << 16  # elements that may be read as often as it pleases


@dataclass
class Storage:
    """A run of numbers in a file; where it begins may be known only after its tensors.

    Attributes:
        key: Its name in the file.
        dtype: Of its numbers.
        elements: How many there are.
        start: Where it begins in the file, in bytes.
    """

    key: str
    dtype: torch.dtype
    elements: int
    start: int = 0

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that lies in a file, as the file describes it.

    Attributes:
        path: The file.
        dtype: Of its numbers.
        shape: Its shape.
        stride: Steps in its storage, in elements; 0 where one number stands for many.
        offset: Where it begins in its storage, in bytes.
        storage: Where that begins in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def size(self) -> int:
        """How many bytes are read for it."""
        return extent(self.shape, self.stride) * self.dtype.itemsize

    def read(self, into: Tensor | None = None) -> Tensor:
        """Read the tensor; the file is not mapped.

        Args:
            into: Memory to read it into, of type uint8 and at least as long; its own if not given.

        Raises:
            CheckpointError: If the file is no longer what it was.
        """
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = torch.empty(self.size, dtype=torch.uint8) if into is None else into[: self.size]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.storage.start + self.offset)
                # one call of the system reads 2 GB at most
                target, read = data.numpy().data, 0
                while more := file.readinto(target[read:]):
                    read += more
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        if read != len(data):
            raise CheckpointError(f"{self.path}: is shorter than it was; was it changed?")
        tensor = data.view(self.dtype).as_strided(self.shape, self.stride)
        # a number that stands for many could not be changed by itself
        return tensor.contiguous() if tensor.nbytes > self.size else tensor


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements of a storage lie between the first of a tensor and its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def check_readings(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """Refuse tensors that share a storage so often that they take far more memory than the file.

    Args:
        path: The file.
        tensors: All of its tensors, each as often as it has a name.

    Raises:
        CheckpointError: If they read a storage more than four times over.
    """
    read: dict[str, int] = {}
    expanded = 0
    for tensor in tensors:
        storage, count = tensor.storage, math.prod(tensor.shape)
        elements = storage.size // tensor.dtype.itemsize
        if count > elements:
            expanded += count
        total = read[storage.key] = read.get(storage.key, 0) + tensor.size
        often = total > max(_MOST_READINGS * storage.size, _FEW * tensor.dtype.itemsize)
        if often or expanded > MOST_EXPANDED:
            raise CheckpointError(
                f"{path}: refused: its tensors read storage {storage.key[:80]!r} of {elements:,}"
                f" elements more than {_MOST_READINGS} times over"
            )
