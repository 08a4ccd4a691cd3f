"""Models that are kept as what they change of another: low-rank factors, and what is new.

Several tasks of one family so take little more space than one. In the ``model_index.json`` of such
a folder ``base`` names the other model, by a path from there, or else one of the package by the
last part of that path; its sum; that of the changes; and whose conditioner is shared. There are

- ``pytorch_lora_weights.safetensors``: B and A of each layer of the UNet that changes, in the form
  of diffusers' LoRA files (Hu et al. 2021, arXiv 2106.09685);
- ``unet/new_layers.safetensors``: layers that are not the base's, or changed by more, whole;
- ``conditioner/``: without what is shared;
- no ``vae/``: it is the base's.

What is read is an ordinary model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mezzotint.checkpoints.folder import (
    CONFIG,
    STEM,
    build_component,
    fill_unsaved_buffers,
    load_state_strictly,
    modern_name,
    read_json,
    save_weights,
)
from mezzotint.checkpoints.loaded import content_hash
from mezzotint.checkpoints.lora import LoraLayer, read_lora
from mezzotint.checkpoints.shipped import find_shipped
from mezzotint.errors import CheckpointError, ConfigError, short
from mezzotint.models.unet import UNet
from mezzotint.storage.safetensors_file import narrowed
from mezzotint.storage.tensors import PICKLES, TensorInfo, find_weights, open_tensors

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

Shared = Literal["conditioner", "conditioner/main"]

BASE = "base"  # the key of the index
LORA = "pytorch_lora_weights.safetensors"
NEW = "new_layers.safetensors"
INDEX = "model_index.json"
_PART = "unet"
_FILES = (f"{_PART}/{NEW}", LORA)  # of the changes
_LONGEST = 255  # letters of a path
_TOLERANCE = 1e-3  # of a difference's norm: what may lie outside its rank


@dataclass(frozen=True)
class Base:
    """The model that another is a change of.

    Attributes:
        folder: Where it lies.
        shares: Which part of the other's conditioner is its main one, if any is.
    """

    folder: Path
    shares: Shared | None = None

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
        return whole / "main" if (whole / "main" / CONFIG).is_file() else whole

    def sha256(self) -> str:
        """Identify it, by all files of its parts that could be read; without any, by nothing.

        Raises:
            CheckpointError: If one cannot be read, or it is a change of a model itself.
        """
        if BASE in read_json(self.folder / INDEX):
            raise CheckpointError(
                f"{self.folder}: is kept as changes of another model itself; begin from that one"
            )
        suffixes = (".safetensors", ".json", *PICKLES)
        try:
            files = [
                path
                for part in (self.vae, self.unet, self.conditioner)
                for path in sorted(part.rglob("*"))
                if path.suffix in suffixes and path.is_file()
            ]
            return content_hash(files) if files else ""
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error}") from None


def base_entry(base: Base, folder: Path) -> dict[str, Any]:
    """Return what the index of a model says of its base.

    Args:
        base: The base.
        folder: Of the model; its changes are written.
    """
    path = Path(os.path.relpath(base.folder.resolve(), folder.resolve()))
    return {
        "model": path.as_posix(),
        "sha256": base.sha256(),
        "changes": content_hash(change_files(folder)),
        "shares": base.shares,
    }


def find_base(index: Mapping[str, Any], folder: Path) -> Base | None:
    """Return the base of a model, if it is a change of another.

    Args:
        index: Content of its ``model_index.json``.
        folder: Where that lies.

    Raises:
        CheckpointError: If the base is not there, or is another than the changes are of, or these
            are others than were written.
    """
    if BASE not in index:
        return None
    match index[BASE]:
        case {
            "model": str(name),
            "sha256": str(digest),
            "changes": str(written),
            "shares": "conditioner" | "conditioner/main" | None as shares,
        } if name and digest and not Path(name).is_absolute() and len(name) <= _LONGEST:
            pass
        case other:
            raise CheckpointError(
                f"{folder}: {BASE} is {short(other)}; expected the path of a model from here, its"
                " sha256, that of the changes, and what is shared"
            )
    changes = change_files(folder)
    # without one of the files it is said which when they are read
    if len(changes) == len(_FILES) and content_hash(changes) != written:
        raise CheckpointError(
            f"{folder}: {' or '.join(_FILES)} is not what was written with this {INDEX}: it is"
            " damaged, or of another model"
        )
    near, other = Path(os.path.normpath(folder.resolve() / name)), None
    if (near / INDEX).is_file():
        if Base(near).sha256() == digest:
            return Base(near, shares)
        other = near
    if (shipped := find_shipped(Path(name).name)) is not None:
        if Base(shipped).sha256() == digest:
            return Base(shipped, shares)
        other = other or shipped
    if other is not None:
        raise CheckpointError(f"{folder}: holds changes of another model than {other} is now")
    raise CheckpointError(
        f"{folder}: holds changes of the model {near}, which is not there, and the package has none"
        " of that name"
    )


def change_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model's changes that are there."""
    return tuple(path for name in _FILES if (path := folder / name).is_file())


def load_changes(
    folder: Path, base: Base, dtype: torch.dtype | None = torch.float32
) -> torch.nn.Module:
    """Read the network that changes make of a base's UNet.

    Args:
        folder: Of the model that is a change.
        base: Its base.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk, and
            what is a sum of two in the precision that it is computed in.

    Returns:
        It in evaluation mode on the CPU.

    Raises:
        CheckpointError: If a file is missing or damaged, or does not fit the base.
    """
    module = build_component(folder / _PART)
    wanted = module.state_dict()
    stored = open_tensors(find_weights(base.unet, STEM)).read(dtype)
    named = {modern_name(name): tensor for name, tensor in stored.items()}
    tensors = {name: tensor for name, tensor in named.items() if name in wanted}
    tensors |= open_tensors(folder / _PART / NEW).read(dtype)
    for name, layer in _layers(folder, tensors).items():
        weight = tensors[name]
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide) + _product(layer, wide).view_as(weight)
        tensors[name] = total if dtype is None else total.to(weight.dtype)
    load_state_strictly(module, tensors, folder / _PART)
    fill_unsaved_buffers(module)
    return module.eval()


def changed_infos(folder: Path, base: Base) -> dict[str, TensorInfo]:
    """Return what the tensors of a changed UNet can be, of which only the changes are read.

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
        CheckpointError: If it cannot be written, or a type cannot hold a weight; then nothing is.
        ConfigError: If the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank: expected at least 1, got {rank}")
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
    for name, tensor in {**new, **factors}.items():
        if dtype is not None and tensor.is_floating_point():
            narrowed(name, tensor, dtype)
    save_weights(new, folder / _PART / NEW, dtype)
    save_weights(factors, folder / LORA, dtype)


def _same(tensor: Tensor, before: Tensor | None) -> bool:
    return before is not None and before.shape == tensor.shape and torch.equal(before, tensor)


def _factors(after: Tensor, before: Tensor | None, rank: int) -> tuple[Tensor, Tensor] | None:
    """A and B of a difference, both of about the same size; None if the whole is better kept."""
    if before is None or before.shape != after.shape or after.ndim < 2:
        return None
    if rank * (len(after) + after[0].numel()) >= after.numel() or not after.isfinite().all():
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
