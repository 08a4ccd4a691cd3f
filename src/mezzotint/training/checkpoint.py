"""The state of a training run on disk: whole or not at all.

A checkpoint is a folder ``checkpoints/step-N`` of safetensors files and one ``state.json`` with the
plain values and the SHA-256 of each file. It is written under a temporary name, synced to the disk
and renamed, so that a killed process or a full disk leaves the previous one as it was.

What `mezzotint.training.parallel.shard` split is written by all ranks at once, each its share,
through torch's distributed checkpointing, as safetensors too; it is read by any number of ranks.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mezzotint.errors import CheckpointError, TrainingError
from mezzotint.training.parallel import laid_out
from mezzotint.training.ranks import ALONE, Ranks

__all__ = [
    "Checkpoint",
    "flatten_optimizer",
    "list_checkpoints",
    "newest_checkpoint",
    "refuse_changed",
    "restore_optimizer",
    "restore_or_begin",
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
    ranks: Ranks = ALONE,
    well_until: int | None = None,
) -> Path:
    """Write a checkpoint atomically and drop all but the newest ``keep``, and one that is good.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        tensors: Tensors by group and name.
        values: Plain values that JSON can hold.
        keep: How many checkpoints stay.
        ranks: All of them call this; the first writes what all have.
        well_until: The newest checkpoint up to this step stays too, for what comes after it may
            yet prove to have been bad; and the oldest after it, which will be the next to stay.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TrainingError: If the disk is full or cannot be written; earlier checkpoints are intact.
    """
    final = folder / f"step-{step}"
    temporary = folder / f".step-{step}.{ranks.of_first(os.getpid())}.tmp"
    try:
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ranks.wait()
        split = any(isinstance(t, DTensor) for named in tensors.values() for t in named.values())
        if split:
            digests = _write_shares(temporary, tensors, ranks)
        else:
            digests = _write_whole(temporary, tensors) if ranks.is_first else {}
        if ranks.is_first:
            state = {"format_version": 1, "step": step, "sharded": split, "sha256": digests}
            state["values"] = dict(values)
            _write_synced(temporary / _STATE, json.dumps(state, indent=1).encode())
            _put_in_place(temporary, final)
            _drop_old(folder, final, keep, well_until)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(folder)
        previous = f"the previous checkpoint {kept[-1]} is intact" if kept else "none was saved yet"
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise TrainingError(
            f"{final}: cannot save the checkpoint: {reason}; {previous}. Free space and go on with"
            " --resume"
        ) from error
    ranks.wait()
    return final


def _write_whole(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write a file for each group; returns the hash of each."""
    digests: dict[str, str] = {}
    for group, named in tensors.items():
        name = f"{group}.safetensors"
        data = safetensors.torch.save({k: t.contiguous() for k, t in named.items()})
        digests[name] = hashlib.sha256(data).hexdigest()
        _write_synced(folder / name, data)
    return digests


def _write_shares(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> dict[str, str]:
    """Write this rank's share of all groups; returns the hash of every rank's files."""
    flat = {f"{group}/{name}": t for group, named in tensors.items() for name, t in named.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with ranks.told():
            dcp.save(flat, storage_writer=writer)
    except CheckpointException as error:  # which is no Exception; it tells what each rank met
        cause, _ = next(iter(error.failures.values()))
        raise OSError(getattr(cause, "errno", None), str(cause)) from error
    ranks.wait()
    mine: dict[str, str] = {}
    names = ranks.of_first(sorted(path.name for path in folder.iterdir()))
    for name in names[ranks.rank :: ranks.world]:
        path = folder / name
        mine[name] = _hash_of(path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return {name: digest for part in ranks.gather_values(mine) for name, digest in part.items()}


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(temporary: Path, final: Path) -> None:
    _sync_folder(temporary)
    if final.exists():
        # rewritten at the end of a run: the old one steps aside, so that one is always there
        aside = final.with_name(temporary.name.replace(".tmp", ".old.tmp"))
        final.rename(aside)
    temporary.rename(final)
    _sync_folder(final.parent)


def _drop_old(folder: Path, final: Path, keep: int, well_until: int | None) -> None:
    saved = list_checkpoints(folder)
    # what stands after this step was damaged, and the run has gone back behind it
    place = saved.index(final) + 1
    kept = saved[max(0, place - keep) : place]
    if well_until is not None:
        early = [path for path in saved[:place] if _step_of(path) <= well_until]
        # and one that will be early some day: or, saved often, all would be gone before they are
        kept += early[-1:] + saved[len(early) : place][:1]
    for old in saved:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    remove_unfinished(folder)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read one checkpoint, with every tensor whole, and verify its checksums.

    Args:
        path: The folder.
        verify: Whether the checksums are verified.

    Raises:
        CheckpointError: If a file is missing, truncated or altered.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        if state["format_version"] > 1:
            raise CheckpointError(f"{path}: written by a newer Mezzotint; upgrade Mezzotint")
        for name, digest in state["sha256"].items() if verify else ():
            if _hash_of(path / name) != digest:
                raise CheckpointError(
                    f"{path / name}: the checksum does not match; it is damaged or was truncated"
                )
        if state.get("sharded", False):
            tensors = _read_shares(path)
        else:
            tensors = {
                name.removesuffix(".safetensors"): safetensors.torch.load_file(path / name)
                for name in state["sha256"]
            }
        return Checkpoint(state["step"], tensors, state["values"], path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing from the checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}") from None


def _read_shares(path: Path) -> dict[str, dict[str, Tensor]]:
    """Put together what the ranks wrote."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # which is not needed to read
        dcp.load(flat, storage_reader=reader, no_dist=True)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        tensors.setdefault(group, {})[name] = tensor
    return tensors


def newest_checkpoint(
    folder: Path, ranks: Ranks = ALONE, until: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest whole checkpoint of a run.

    Args:
        folder: The run's ``checkpoints`` folder.
        ranks: All of them call this and read the same one; the first verifies.
        until: The newest up to this step is wanted; if there is none, the oldest after it.

    Returns:
        The checkpoint, or None if the run has none yet, and a sentence per damaged one passed by.

    Raises:
        CheckpointError: If the run has checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    found: Checkpoint | None = None
    saved = list_checkpoints(folder)
    early = [path for path in saved if until is None or _step_of(path) <= until]
    for path in (*reversed(early), *saved[len(early) :]) if ranks.is_first else ():
        try:
            found = read_checkpoint(path)
            break
        except CheckpointError as error:
            damaged.append(str(error))
    chosen = ranks.of_first(found.path if found else None)
    damaged = ranks.of_first(damaged)
    if chosen is not None:
        return found or read_checkpoint(chosen, verify=False), damaged
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
            value = torch.empty_like(parameter).copy_(laid_out(value, parameter))
        else:
            value = value.clone()
        entries.setdefault(int(index), {})[key] = value
    state = optimizer.state_dict()
    state["state"] = entries
    optimizer.load_state_dict(state)


def restore_or_begin(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> int:
    """Take back an optimizer's state, or begin it anew where a checkpoint holds none of it.

    Weights travel light without the moments, which are twice as many numbers.

    Returns:
        Steps done when the optimizer began without moments.
    """
    tensors = checkpoint.tensors.get("optimizer")
    # none are restored too: a run that goes back has moments, of what it goes back from
    restore_optimizer(optimizer, tensors or {})
    if tensors is None:
        return checkpoint.step
    return int(checkpoint.values.get("begun", 0))


def refuse_changed(
    checkpoint: Checkpoint,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    words: Mapping[str, str],
) -> None:
    """Refuse to go on with other things than those that weights were trained on.

    Args:
        checkpoint: Is to be taken back.
        saved: What it says that they were.
        now: What they are.
        words: What is compared, in this order, and what a user calls it.

    Raises:
        TrainingError: Naming the first that changed.
    """
    for name, word in words.items():
        if saved.get(name) != now.get(name):
            raise TrainingError(
                f"{checkpoint.path}: {word} changed since this checkpoint was saved; put back what"
                " there was, or start anew with another --output"
            )
