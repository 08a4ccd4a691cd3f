"""Named tensors on the disk, whatever the file's format: what they are at once, their values later.

Safetensors and every form of ``torch.save`` are read alike. Nothing in a file is run, and nothing
is read but the headers until a tensor is asked for.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.storage.safetensors_file import read_header
from mezzotint.storage.stored import StoredTensor
from mezzotint.storage.unpickle import read_pickle

__all__ = [
    "PICKLES",
    "Form",
    "TensorInfo",
    "Tensors",
    "find_weights",
    "form_of",
    "open_tensors",
    "refuse_pointer",
]

Form = Literal["safetensors", "pickle"]
"""How a file of tensors is written, whatever it is called."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_POINTER = b"version https://git-lfs"
_ARCHIVE = b"PK\x03\x04"
_MOST_INDEX = 16 << 20  # bytes; that of a model with 10,000 tensors has 1 MB


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        dtype: Of its numbers.
        shape: Its shape.
        path: The file that it lies in.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of one file or of several, by name.

    Args:
        stored: The tensors where they lie.
        metadata: What safetensors keeps beside its tensors.
        beside: What a pickle holds beside its tensors, such as ``global_step``.

    Attributes:
        paths: The files.
        stored: As given.
        metadata: As given.
        beside: As given.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        *,
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        self.stored = dict(stored)
        self.paths = tuple(dict.fromkeys(tensor.path for tensor in self.stored.values()))
        self.metadata = dict(metadata or {})
        self.beside = dict(beside or {})

    def __getitem__(self, name: str) -> TensorInfo:
        tensor = self.stored[name]
        return TensorInfo(tensor.dtype, tensor.shape, tensor.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def select(self, names: Iterable[str]) -> "Tensors":
        """Return some of them alone, in the order that is given."""
        return Tensors(
            {name: self.stored[name] for name in names},
            metadata=self.metadata,
            beside=self.beside,
        )

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Return the same tensors, some by other names.

        Args:
            names: From a name to the one that it gets.
        """
        return Tensors(
            {names.get(name, name): tensor for name, tensor in self.stored.items()},
            metadata=self.metadata,
            beside=self.beside,
        )

    def read(
        self, dtype: torch.dtype | None = None, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Read tensors, each into memory of its own.

        Args:
            dtype: That floating-point ones are turned into, one after the other, so that no more
                than one stands in memory twice; None keeps each.
            names: Which; all if not given.

        Raises:
            CheckpointError: If a file is no longer what it was.
        """
        wanted = {n: self.stored[n] for n in (self.stored if names is None else names)}
        turned = {
            name: tensor
            for name, tensor in wanted.items()
            if dtype not in (None, tensor.dtype) and tensor.dtype.is_floating_point
        }
        # all that are turned pass through the same memory, so that none leaves a hole in it
        most = max((tensor.size for tensor in turned.values()), default=0)
        scratch = torch.empty(most, dtype=torch.uint8)
        return {
            name: tensor.read(scratch).to(dtype) if name in turned else tensor.read()
            for name, tensor in wanted.items()
        }


def open_tensors(path: Path) -> Tensors:
    """Read the headers of a file of tensors.

    A safetensors file that is named as a pickle is read for what it is, and the other way round.

    Args:
        path: Safetensors; or ``.ckpt``, ``.pt``, ``.pth``, ``.bin``, whose tensors may lie under
            ``state_dict``; or the index of a file in several parts, ``….index.json``.

    Raises:
        CheckpointError: If it is missing, damaged or hostile, holds no named tensors, or is of a
            format that is not known.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.name.endswith(".json"):
        return _open_parts(path)
    if path.suffix not in (".safetensors", *PICKLES):
        known = ", ".join((".safetensors", *PICKLES))
        suffix = path.suffix or "no suffix"
        raise CheckpointError(f"{path}: {suffix} is no format of weights: {known}")
    if form_of(path) == "pickle":
        return _open_pickle(path)
    stored, metadata = read_header(path)
    return Tensors(stored, metadata=metadata)


def form_of(path: Path) -> Form:
    """Tell how a file of weights is written: by how it begins, or if that is neither, by its name.

    Raises:
        CheckpointError: If it cannot be read, or is a pointer of git-lfs.
    """
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    # the length of a header that is JSON, and its first character
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start.startswith(_ARCHIVE) or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        return "pickle"
    return "safetensors" if path.suffix == ".safetensors" else "pickle"


def refuse_pointer(path: Path) -> None:
    """Raise a CheckpointError if a file is what git-lfs leaves in place of a large one."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # whoever reads it will say so
    if start == _POINTER:
        raise CheckpointError(
            f"{path}: is a pointer of git-lfs and not the file itself; run git lfs pull in its"
            " repository to fetch that"
        )


def find_weights(folder: Path, stem: str) -> Path:
    """Find a component's weights in its folder.

    Safetensors come before pickles, whole files before parts, and full precision before the
    variant ``fp16``.

    Args:
        folder: Of the component.
        stem: ``diffusion_pytorch_model``, ``model`` or ``pytorch_model``.

    Returns:
        A file, or the index of one in parts.

    Raises:
        CheckpointError: If there is none; it says what is there.
    """
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            # the variant stands at one place for whole files, and was at two for indices
            names = (
                f"{stem}{variant}.{suffix}",
                f"{stem}.{suffix}.index{variant}.json",
                f"{stem}{variant}.{suffix}.index.json",
            )
            for name in names:
                if (folder / name).is_file():
                    return folder / name
    weights = (p.name for p in folder.glob("*") if p.suffix in (".safetensors", *PICKLES))
    there = ", ".join(sorted(weights)) or "no file of weights"
    raise CheckpointError(f"{folder / stem}.safetensors: no such file; there is {there}")


def _open_pickle(path: Path) -> Tensors:
    root = read_pickle(path)
    beside: dict[str, Any] = {}
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        whole = cast(dict[str, Any], root)
        beside = {str(key): value for key, value in whole.items() if key != "state_dict"}
        root = whole["state_dict"]
    if not isinstance(root, dict):
        raise CheckpointError(f"{path}: holds no named tensors")
    stored = {
        name: value
        for name, value in cast(dict[Any, Any], root).items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if not stored:
        raise CheckpointError(f"{path}: holds no named tensors")
    return Tensors(stored, beside=beside)


def _open_parts(path: Path) -> Tensors:
    refuse_pointer(path)
    try:
        if path.stat().st_size > _MOST_INDEX:
            raise ValueError(f"more than {_MOST_INDEX:,} bytes")
        index = json.loads(path.read_text(encoding="utf-8"))
        places = cast(dict[Any, Any], index["weight_map"])
        names = dict.fromkeys(str(file) for file in places.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no index of weights: {error}") from None
    parts: dict[str, Tensors] = {}
    for file in names:
        if Path(file).name != file or file.endswith(".json"):
            raise CheckpointError(f"{path}: refused: {file!r} is no file beside it")
        parts[file] = open_tensors(path.parent / file)
    stored: dict[str, StoredTensor] = {}
    for name, file in places.items():
        part = parts[str(file)]
        if name not in part:
            raise CheckpointError(
                f"{path.parent / str(file)}: has no {name!r}, as {path.name} says"
            )
        stored[name] = part.stored[name]
    return Tensors(stored)
