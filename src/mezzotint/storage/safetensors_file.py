"""The safetensors format: a JSON header that says where each tensor lies, and then the tensors.

The package of that name maps files into memory, where pages that were read once count until the
file is closed, and writes from a copy of all tensors. Here one tensor at a time is read or written.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.storage.stored import Storage, StoredTensor

__all__ = ["Entry", "narrowed", "read_header", "write_safetensors"]

Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]
"""What is to be written: name, type, shape, and what gives the tensor when its turn comes."""

_MOST_HEADER = 16 << 20  # bytes; that of a model with 10,000 tensors has 1 MB
_MOST_DIMENSIONS = 8
_ALIGNMENT = 8  # of the first tensor in the file
_METADATA = "__metadata__"
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Damage(Exception):  # noqa: N818, it is turned into a CheckpointError that names the file
    """The header is not one, or does not fit the file."""


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read what a file says of its tensors, and hold it against the file.

    Args:
        path: Of a safetensors file.

    Returns:
        The tensors by name, in the order in which they lie there, and the metadata beside them.

    Raises:
        CheckpointError: If the header is damaged, larger than that of any checkpoint, or does not
            describe every byte of the file exactly once.
    """
    try:
        with path.open("rb") as file:
            header, start, size = _header(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _Damage as error:
        raise CheckpointError(f"{path}: damaged, or not a file of weights: {error}") from None
    try:
        metadata = _texts(header.pop(_METADATA, {}))
        tensors = [_tensor(path, name, told, start) for name, told in header.items()]
        tensors.sort(key=lambda item: item[1].storage.start)
        position = start
        for name, tensor in tensors:
            if tensor.storage.start != position:
                raise _Damage(f"{name[:80]!r} does not begin where the one before it ends")
            position += tensor.storage.size
        if position != size:
            raise _Damage(f"its tensors end at byte {position:,}, the file at {size:,}")
    except _Damage as error:
        raise CheckpointError(f"{path}: damaged, or not a file of weights: {error}") from None
    return dict(tensors), metadata


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
    """Write a file, holding one tensor at a time.

    Args:
        path: Overwritten.
        entries: The tensors; each is given when it is written.
        metadata: Texts to stand beside them.

    Raises:
        CheckpointError: If a value is beyond what its type on the disk can hold.
        OSError: If it cannot be written.
    """
    # larger numbers first, so that all are aligned
    ordered = sorted(entries, key=lambda entry: (-entry[1].itemsize, entry[0]))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    position = 0
    for name, dtype, shape, _ in ordered:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, dtype, shape, give in ordered:
            tensor = narrowed(name, give().detach().cpu(), dtype).contiguous()
            assert tuple(tensor.shape) == shape, name
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another type, unless that would make infinities of numbers.

    Args:
        name: What messages call it.
        tensor: On the CPU. What is infinite or no number in it may be so.
        dtype: The type; the tensor itself comes back where it is its own.

    Raises:
        CheckpointError: If a finite value is beyond it; bfloat16 reaches as far as float32.
    """
    turned = tensor.to(dtype)
    if turned is tensor or not dtype.is_floating_point or not tensor.is_floating_point():
        return turned
    if bool(turned.isfinite().all()):
        return turned
    beyond = tensor[tensor.isfinite() & ~turned.isfinite()]
    if beyond.numel() == 0:
        return turned
    value = float(beyond[beyond.abs().argmax()])
    kind, wide = str(dtype).removeprefix("torch."), torch.finfo(torch.bfloat16).max
    instead = "bfloat16 holds it" if abs(value) <= wide else "keep it as it is"
    raise CheckpointError(
        f"{name} holds {value:,.6g}, and {kind} ends at {torch.finfo(dtype).max:,.6g}; {instead}"
    )


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors begin, and where the file ends."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _Damage(f"a header of {length:,} bytes does not fit into {size:,}")
    if length > _MOST_HEADER:
        raise CheckpointError(
            f"{path}: refused: its header has {length:,} bytes, more than the {_MOST_HEADER:,}"
            " that any checkpoint needs"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"its header is no JSON: {str(error)[:80]}") from None
    if not isinstance(header, dict):
        raise _Damage("its header holds no names")
    return cast(dict[str, Any], header), 8 + length, size


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _texts(told: Any) -> dict[str, str]:
    if not isinstance(told, dict):
        raise _Damage("its metadata are no texts")
    texts = cast(dict[str, Any], told)
    if not all(isinstance(value, str) for value in texts.values()):
        raise _Damage("its metadata are no texts")
    return texts


def _tensor(path: Path, name: str, told: Any, start: int) -> tuple[str, StoredTensor]:
    match told:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _Damage(f"what it says of {name[:80]!r} is no tensor")
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise _Damage(f"{name[:80]!r} is of the type {kind[:20]!r}, which is not known")
    if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise _Damage(f"{name[:80]!r} has no shape that a tensor may have")
    sides = cast(list[int], shape)
    elements = math.prod(sides)
    if end - begin != elements * dtype.itemsize or begin < 0:
        raise _Damage(
            f"{name[:80]!r} of {elements:,} numbers cannot lie in bytes {begin:,} to {end:,}"
        )
    stride = [math.prod(sides[place + 1 :]) for place in range(len(sides))]
    storage = Storage(name, dtype, elements, start + begin)
    return name, StoredTensor(path, dtype, tuple(sides), tuple(stride), 0, storage)
