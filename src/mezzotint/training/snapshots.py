"""Averages of a run as they stood at intervals, in its folder ``ema/``.

``step-N.safetensors`` holds the averages after N updates, the weights of the k-th named ``k/…``,
and beside them what they are: ``sigma_rel`` of each, and a checksum. A file is written whole or
not at all, and stays.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, distributed

from mezzotint.checkpoints.folder import whole_or_not
from mezzotint.errors import CheckpointError, TrainingError
from mezzotint.storage.safetensors_file import Entry, narrowed, read_header, write_safetensors
from mezzotint.storage.stored import StoredTensor
from mezzotint.training.ema import ExponentialMovingAverage, PowerEMAConfig, whole
from mezzotint.training.power_function import MOST_SIGMA_REL, Profile

__all__ = ["Snapshot", "read_snapshots", "save_if_due", "save_snapshot", "stored_tensors"]

_NAME = re.compile(r"step-(\d+)\.safetensors")
_FORMAT_VERSION = 1
_MOST_FLOAT16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Snapshot:
    """The averages that a run had at one step.

    Attributes:
        step: Updates done.
        profiles: What the averages hold, in order.
        overwritten: By the names of weights that were overwritten in part, the step until which
            they are of no use; see `ExponentialMovingAverage.overwrite`.
        tensors: Where they lie, by the weights' names, one per profile.
        described: What the file says of itself, as its checksum has it.
        sha256: Of that, and of all tensors by name and then in the order of the profiles.
        path: The file.
    """

    step: int
    profiles: tuple[Profile, ...]
    overwritten: dict[str, int]
    tensors: dict[str, tuple[StoredTensor, ...]]
    described: bytes
    sha256: str
    path: Path


def save_if_due(ema: ExponentialMovingAverage, folder: Path, *, last: bool = False) -> Path | None:
    """Store the averages if their recipe says so at this step; see `save_snapshot`.

    Args:
        ema: The averages.
        folder: The run's ``ema``.
        last: Whether training is at its end, where there is a snapshot in any case.
    """
    if not isinstance(ema.config, PowerEMAConfig) or not ema.updates:  # as of skipped steps alone
        return None
    regular = ema.updates % ema.config.snapshot_steps == 0
    return save_snapshot(ema, folder) if regular != last else None


@torch.no_grad()
def save_snapshot(ema: ExponentialMovingAverage, folder: Path) -> Path | None:
    """Store averages of power functions, and drop snapshots of later steps.

    Those are of a training that went on from here before, and was taken up again. Of several
    ranks the first writes; all must call this together where the averages are sharded.

    Args:
        ema: The averages.
        folder: The run's ``ema``; made if need be.

    Returns:
        The file, or None where an average is no longer a number: nothing could be made of it.

    Raises:
        TrainingError: If it cannot be written.
    """
    config = ema.config
    assert isinstance(config, PowerEMAConfig)
    wanted = getattr(torch, config.snapshot_precision)
    metadata = {
        "format_version": str(_FORMAT_VERSION),
        "step": str(ema.updates),
        "sigma_rel": json.dumps(config.sigma_rel),
        "overwritten": json.dumps(ema.overwritten),
    }
    digest = hashlib.sha256(_described(metadata))
    stored: dict[str, Tensor] = {}
    for name in sorted(ema.average):
        for k, average in enumerate(ema.averages):
            tensor = whole(average[name]).cpu()
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest < float("inf"):
                return None
            dtype = wanted if largest <= _MOST_FLOAT16 else torch.float32
            stored[f"{k}/{name}"] = narrowed(name, tensor, dtype)
            digest.update(_bytes(stored[f"{k}/{name}"]))
    metadata["sha256"] = digest.hexdigest()
    path = folder / f"step-{ema.updates}.safetensors"
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return path
    entries: list[Entry] = [
        (name, tensor.dtype, tuple(tensor.shape), partial(stored.__getitem__, name))
        for name, tensor in stored.items()
    ]
    try:
        with whole_or_not(path) as temporary:
            write_safetensors(temporary, entries, metadata)
    except CheckpointError as error:
        raise TrainingError(f"{error}; free space, and go on with --resume") from error
    ahead = (later for step, later in _files(folder) if step > ema.updates)
    for left in (*ahead, *folder.glob(".step-*")):  # and what a killed process had begun
        left.unlink(missing_ok=True)
    return path


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Read what the snapshots of a run are, in the order of their steps; no weights yet.

    Raises:
        CheckpointError: If one is damaged, is no snapshot, or does not go with the others.
    """
    found = [_read(step, path) for step, path in _files(folder)]
    for snapshot in found:
        shapes, first = _shapes(snapshot), _shapes(found[0])
        if shapes != first:
            names = sorted(n for n in shapes.keys() | first.keys() if shapes.get(n) != first.get(n))
            raise CheckpointError(
                f"{snapshot.path}: is of another network than {found[0].path.name}, which differs"
                f" in {names[0]}"
            )
    return found


def stored_tensors(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, list[Tensor]]]:
    """Read snapshots weight by weight, so that no more than one of each stands in memory.

    Args:
        snapshots: Of one network.

    Yields:
        The name of a weight, and its averages: of the first snapshot, in the order of its
        profiles, then of the second, and so on.

    Raises:
        CheckpointError: After the last, if what was read is not what was written.
    """
    digests = [hashlib.sha256(snapshot.described) for snapshot in snapshots]
    for name in sorted(snapshots[0].tensors):
        averages: list[Tensor] = []
        for snapshot, digest in zip(snapshots, digests, strict=True):
            for stored in snapshot.tensors[name]:
                averages.append(stored.read())
                digest.update(_bytes(averages[-1]))
        yield name, averages
    for snapshot, digest in zip(snapshots, digests, strict=True):
        if digest.hexdigest() != snapshot.sha256:
            raise CheckpointError(
                f"{snapshot.path}: the checksum does not match; it is damaged. Move it away to do"
                " without it"
            )


def _files(folder: Path) -> list[tuple[int, Path]]:
    """The snapshots in a folder, by step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(m[1]), path) for path in paths if (m := _NAME.fullmatch(path.name)))


def _read(step: int, path: Path) -> Snapshot:
    stored, metadata = read_header(path)
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > _FORMAT_VERSION:
        raise CheckpointError(f"{path}: written by a newer Mezzotint; upgrade Mezzotint")
    try:
        lengths = [float(length) for length in json.loads(metadata["sigma_rel"])]
        overwritten = {str(n): int(u) for n, u in json.loads(metadata["overwritten"]).items()}
        if int(metadata["step"]) != step or step < 1:
            raise ValueError("its name says another step")
        if not lengths or not all(0 < length <= MOST_SIGMA_REL for length in lengths):
            raise ValueError(f"sigma_rel is {metadata['sigma_rel']}")
        names = [name.removeprefix("0/") for name in stored if name.startswith("0/")]
        tensors = {n: tuple(stored[f"{k}/{n}"] for k in range(len(lengths))) for n in names}
        if not names or len(stored) != len(names) * len(lengths):
            raise ValueError("its weights are not those of its averages")
        profiles = tuple(Profile(step, length) for length in lengths)
        described, sha256 = _described(metadata), metadata["sha256"]
        return Snapshot(step, profiles, overwritten, tensors, described, sha256, path)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no snapshot of averages: {error}") from None


def _described(metadata: dict[str, str]) -> bytes:
    return "\n".join(metadata[key] for key in ("step", "sigma_rel", "overwritten")).encode()


def _shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {name: stored[0].shape for name, stored in snapshot.tensors.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
