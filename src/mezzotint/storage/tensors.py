"""Named tensors on the disk, whatever the file's format: what they are at once, their values later.

Safetensors and every form of ``torch.save`` are read alike. Nothing in a file is run, and nothing
is read but the headers until a tensor is asked for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.storage.unpickle import StoredTensor, read_pickle

__all__ = ["TensorInfo", "Tensors", "find_weights", "open_tensors"]

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_MOST_HEADER = 16 << 20  # bytes; that of a model with 10,000 tensors has 1 MB
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

    Attributes:
        paths: The files.
        metadata: What safetensors keeps beside its tensors.
        beside: What a pickle holds beside its tensors, such as ``global_step``.
        stored: The tensors of pickles, where they lie.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        *,
        stored: Mapping[str, StoredTensor] | None = None,
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        self._infos = dict(infos)
        self.stored = dict(stored or {})
        self.paths = tuple(dict.fromkeys(info.path for info in self._infos.values()))
        self.metadata = dict(metadata or {})
        self.beside = dict(beside or {})

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read all tensors.

        Args:
            dtype: That floating-point ones are turned into, one after the other, so that no more
                than one stands in memory twice; None keeps each.

        Raises:
            CheckpointError: If a file is no longer what it was.
        """
        found = {name: _cast(tensor.read(), dtype) for name, tensor in self.stored.items()}
        for path in self.paths:
            names = [n for n, info in self._infos.items() if info.path == path and n not in found]
            if not names:
                continue
            with _opened(path) as file:
                for name in names:
                    try:
                        found[name] = _cast(file.get_tensor(name), dtype)
                    except SafetensorError as error:
                        raise CheckpointError(f"{path}: was changed: {error}") from None
        return {name: found[name] for name in self._infos}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def open_tensors(path: Path) -> Tensors:
    """Read the headers of a file of tensors.

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
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    known = ", ".join((".safetensors", *PICKLES))
    raise CheckpointError(f"{path}: {path.suffix or 'no suffix'} is no format of weights: {known}")


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


def _opened(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if _MOST_HEADER < length <= path.stat().st_size:
            raise CheckpointError(
                f"{path}: refused: its header has {length:,} bytes, more than the {_MOST_HEADER:,}"
                " that any checkpoint needs"
            )
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged, or not a file of weights: {error}") from None


def _open_safetensors(path: Path) -> Tensors:
    infos: dict[str, TensorInfo] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            header = file.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name[:80]!r} is of type {header.get_dtype()}, unknown"
                )
            infos[name] = TensorInfo(dtype, tuple(header.get_shape()), path)
        return Tensors(infos, metadata=file.metadata())


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
    infos = {name: TensorInfo(t.dtype, t.shape, path) for name, t in stored.items()}
    return Tensors(infos, stored=stored, beside=beside)


def _open_parts(path: Path) -> Tensors:
    try:
        if path.stat().st_size > _MOST_HEADER:
            raise ValueError(f"more than {_MOST_HEADER:,} bytes")
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
    infos: dict[str, TensorInfo] = {}
    stored: dict[str, StoredTensor] = {}
    for name, file in places.items():
        part = parts[str(file)]
        if name not in part:
            raise CheckpointError(
                f"{path.parent / str(file)}: has no {name!r}, as {path.name} says"
            )
        infos[name] = part[name]
    for part in parts.values():
        stored |= {n: t for n, t in part.stored.items() if n in infos}
    return Tensors(infos, stored=stored)
