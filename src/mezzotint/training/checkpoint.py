"""The state of a training run on disk: whole or not at all.

A checkpoint is a folder ``checkpoints/step-N`` of safetensors files and one ``state.json`` with the
plain values and the SHA-256 of each file. It is written under a temporary name, synced to the disk
and renamed, so that a killed process or a full disk leaves the previous one as it was.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mezzotint.errors import CheckpointError, TrainingError

__all__ = [
    "Checkpoint",
    "flatten_optimizer",
    "list_checkpoints",
    "newest_checkpoint",
    "restore_optimizer",
    "save_checkpoint",
]

_NAME = re.compile(r"step-(\d+)")
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read back.

    Attributes:
        step: Optimizer steps done.
        tensors: Tensors by group (``unet``, ``ema``, ``optimizer``, …) and name.
        values: Plain values, as they were saved.
        path: The folder it was read from.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    path: Path


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint atomically and drop all but the newest ``keep``.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        tensors: Tensors by group and name.
        values: Plain values that JSON can hold.
        keep: How many checkpoints stay.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TrainingError: If the disk is full or cannot be written; earlier checkpoints are intact.
    """
    final = folder / f"step-{step}"
    temporary = folder / f".step-{step}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        digests = {}
        for group, named in tensors.items():
            name = f"{group}.safetensors"
            data = safetensors.torch.save({k: t.contiguous() for k, t in named.items()})
            digests[name] = hashlib.sha256(data).hexdigest()
            _write_synced(temporary / name, data)
        state = {"format_version": 1, "step": step, "sha256": digests, "values": dict(values)}
        _write_synced(temporary / _STATE, json.dumps(state, indent=1).encode())
        _sync_folder(temporary)
        if final.exists():
            # rewritten at the end of a run: the old one steps aside, so that one is always there
            aside = folder / f".step-{step}.{os.getpid()}.old.tmp"
            final.rename(aside)
        temporary.rename(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(folder)
        previous = f"the previous checkpoint {kept[-1]} is intact" if kept else "none was saved yet"
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise TrainingError(
            f"{final}: cannot save the checkpoint: {reason}; {previous}. Free space and go on with"
            " --resume"
        ) from error
    saved = list_checkpoints(folder)
    # what stands after this step was damaged, and the run has gone back behind it
    place = saved.index(final) + 1
    for old in (*saved[: max(0, place - keep)], *saved[place:]):
        shutil.rmtree(old, ignore_errors=True)
    remove_unfinished(folder)
    return final


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; unfinished ones are not among them."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its checksums.

    Raises:
        CheckpointError: If a file is missing, truncated or altered.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, digest in state["sha256"].items():
            data = (path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise CheckpointError(
                    f"{path / name}: the checksum does not match; it is damaged or was truncated"
                )
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        if state["format_version"] > 1:
            raise CheckpointError(f"{path}: written by a newer Mezzotint; upgrade Mezzotint")
        return Checkpoint(state["step"], tensors, state["values"], path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing from the checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}") from None


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest whole checkpoint of a run.

    Returns:
        The checkpoint, or None if the run has none yet, and a sentence per damaged one passed by.

    Raises:
        CheckpointError: If the run has checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            "; ".join(damaged)
            + f". No whole checkpoint is left: delete {folder.parent}, or choose another --output"
        )
    return None, damaged


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's per-parameter state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
    }


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `flatten_optimizer` gave; the hyper-parameters stay those of the recipe."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # a fused step pairs the memory of weights and moments: both must lie alike in it
            value = torch.empty_like(parameter).copy_(value)
        entries.setdefault(int(index), {})[key] = value
    state = optimizer.state_dict()
    state["state"] = entries
    optimizer.load_state_dict(state)
