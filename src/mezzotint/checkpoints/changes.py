"""Models that are kept as what they change of another: low-rank factors, and what is new.

Several tasks of one family so take little more space than one. A folder of changes has a
``model_index.json`` that names its base, by a path from there, or else one of the package by the
last part of that path:

- ``pytorch_lora_weights.safetensors``: B and A of each layer of the UNet that changes, in the form
  of diffusers' LoRA files (Hu et al. 2021, arXiv 2106.09685);
- ``unet/new_layers.safetensors``: layers that are not the base's, whole;
- ``conditioner/``: without ``main/`` where that is the base's conditioner;
- no ``vae/``: it is the base's.

What is read is an ordinary model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.checkpoints.folder import (
    STEM,
    build_component,
    fill_unsaved_buffers,
    load_state_strictly,
    modern_name,
    save_weights,
)
from mezzotint.checkpoints.loaded import content_hash
from mezzotint.checkpoints.lora import LoraLayer, read_lora
from mezzotint.checkpoints.shipped import find_shipped
from mezzotint.errors import CheckpointError, short
from mezzotint.models.unet import UNet
from mezzotint.storage.tensors import TensorInfo, find_weights, open_tensors

__all__ = [
    "BASE",
    "Base",
    "base_entry",
    "change_files",
    "changed_infos",
    "find_base",
    "load_changes",
    "save_changes",
]

BASE = "base"  # the key of the index
LORA = "pytorch_lora_weights.safetensors"
NEW = "new_layers.safetensors"
_PART = "unet"
_TOLERANCE = 1e-3  # of a difference's norm: what may lie outside its rank


@dataclass(frozen=True)
class Base:
    """The model that another is a change of.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    @property
    def vae(self) -> Path:
        """Its first stage."""
        return self.folder / "vae"

    @property
    def unet(self) -> Path:
        """Its UNet."""
        return self.folder / _PART

    @property
    def conditioner(self) -> Path:
        """Its conditioner, the main one where it has two."""
        whole = self.folder / "conditioner"
        return whole / "main" if (whole / "main").is_dir() else whole

    def sha256(self) -> str:
        """What identifies it: over all files of weights and configurations."""
        files = [
            path
            for part in (self.vae, self.unet, self.conditioner)
            for path in sorted(part.rglob("*"))
            if path.suffix in (".safetensors", ".json")
        ]
        return content_hash(files)


def base_entry(base: Base, folder: Path) -> dict[str, str]:
    """Return what the index of a model says of its base.

    Args:
        base: The base.
        folder: Of the model.
    """
    path = Path(os.path.relpath(base.folder.resolve(), folder.resolve()))
    return {"model": path.as_posix(), "sha256": base.sha256()}


def find_base(index: Mapping[str, Any], folder: Path) -> Base | None:
    """Return the base of a model, if it is a change of another.

    Args:
        index: Content of its ``model_index.json``.
        folder: Where that lies.

    Raises:
        CheckpointError: If the base is not there, or is another than the changes are of.
    """
    if BASE not in index:
        return None
    match index[BASE]:
        case {"model": str(name), "sha256": str(digest)} if name and not Path(name).is_absolute():
            pass
        case other:
            raise CheckpointError(
                f"{folder}: {BASE} is {short(other)}; expected the path of a model from here, and"
                " its sha256"
            )
    near = Path(os.path.normpath(folder / name))
    place = near if near.is_dir() else find_shipped(Path(name).name)
    if place is None:
        raise CheckpointError(
            f"{folder}: holds changes of the model {near}, which is not there, and the package has"
            " none of that name"
        )
    base = Base(place)
    if base.sha256() != digest:
        raise CheckpointError(f"{folder}: holds changes of another model than {place} is now")
    return base


def change_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model's changes that are there."""
    return tuple(p for p in (folder / _PART / NEW, folder / LORA) if p.is_file())


def load_changes(
    folder: Path, base: Base, dtype: torch.dtype | None = torch.float32
) -> torch.nn.Module:
    """Read the network that changes make of a base's UNet.

    Args:
        folder: Of the model that is a change.
        base: Its base.
        dtype: Of the floating-point weights in memory; None keeps each as the base's is.

    Returns:
        It in evaluation mode on the CPU.

    Raises:
        CheckpointError: If a file is missing or damaged, or does not fit the base.
    """
    stored = open_tensors(find_weights(base.unet, STEM))
    tensors = {modern_name(name): tensor for name, tensor in stored.read(dtype).items()}
    tensors |= open_tensors(folder / _PART / NEW).read(dtype)
    for name, layer in _layers(folder, tensors).items():
        weight = tensors[name]
        wide = torch.promote_types(weight.dtype, torch.float32)
        tensors[name] = (weight.to(wide) + _product(layer, wide).view_as(weight)).to(weight.dtype)
    module = build_component(folder / _PART)
    load_state_strictly(module, tensors, folder / _PART)
    fill_unsaved_buffers(module)
    return module.eval()


def changed_infos(folder: Path, base: Base) -> dict[str, TensorInfo]:
    """Return what the tensors of a changed UNet are, of which only the changes are read.

    Raises:
        CheckpointError: If a file is missing or damaged, or does not fit the base.
    """
    stored = open_tensors(find_weights(base.unet, STEM))
    infos = {modern_name(name): info for name, info in stored.items()}
    infos |= dict(open_tensors(folder / _PART / NEW).items())
    _layers(folder, infos)
    return infos


def _layers(folder: Path, tensors: Mapping[str, Tensor | TensorInfo]) -> dict[str, LoraLayer]:
    """The changes by the names of the weights, held against them."""
    adapter = read_lora(folder / LORA)
    found: dict[str, LoraLayer] = {}
    for layer in adapter.layers:
        name = f"{layer.path}.weight"
        if layer.part != _PART or name not in tensors:
            raise CheckpointError(f"{adapter.path}: {layer.key}: the base has no such layer")
        shape, changed = tuple(tensors[name].shape), (len(layer.up), *layer.down.shape[1:])
        if shape != changed:
            raise CheckpointError(f"{adapter.path}: {layer.key}: changes {changed}, not {shape}")
        found[name] = layer
    return found


def _product(layer: LoraLayer, dtype: torch.dtype) -> Tensor:
    down, up = (factor.to(dtype).flatten(1) for factor in (layer.down, layer.up))
    return layer.scale * (up @ down)


@torch.no_grad()
def save_changes(
    unet: UNet, old: UNet, folder: Path, rank: int, dtype: torch.dtype | None = None
) -> None:
    """Write a UNet's weights as what they change of another's.

    A layer of which more changed than a rank can hold is kept whole.

    Args:
        unet: What is kept.
        old: The base's, with the very numbers that are read from it.
        folder: Of the model; made if need be.
        rank: Of the changes, at most.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.

    Raises:
        CheckpointError: If it cannot be written.
    """
    before, layers = old.state_dict(), dict[str, dict[str, Tensor]]()
    for name, tensor in unet.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = tensor
    factors, new = dict[str, Tensor](), dict[str, Tensor]()
    for layer, leaves in layers.items():
        moved = {
            leaf: tensor
            for leaf, tensor in leaves.items()
            if not _same(tensor, before.get(f"{layer}.{leaf}"))
        }
        found = None
        if moved.keys() == {"weight"}:
            found = _factors(moved["weight"], before.get(f"{layer}.weight"), rank)
        if found is not None:
            factors[f"{_PART}.{layer}.lora_A.weight"] = found[0]
            factors[f"{_PART}.{layer}.lora_B.weight"] = found[1]
        elif moved:
            new |= {f"{layer}.{leaf}": tensor for leaf, tensor in leaves.items()}
    save_weights(new, folder / _PART / NEW, dtype)
    save_weights(factors, folder / LORA, dtype)


def _same(tensor: Tensor, before: Tensor | None) -> bool:
    return before is not None and before.shape == tensor.shape and torch.equal(before, tensor)


def _factors(after: Tensor, before: Tensor | None, rank: int) -> tuple[Tensor, Tensor] | None:
    """A and B of a difference, both of about the same size; None if its rank is higher."""
    if before is None or before.shape != after.shape or after.ndim < 2:
        return None
    difference = after.double() - before.double()
    left, values, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    if values[rank:].norm() > _TOLERANCE * values.norm():
        return None
    count = min(rank, len(values))
    root = values[:count].sqrt()
    down = (root[:, None] * right[:count]).reshape(count, *difference.shape[1:])
    up = (left[:, :count] * root).reshape(-1, count, *(1 for _ in difference.shape[2:]))
    return down.to(after.dtype).contiguous(), up.to(after.dtype).contiguous()
