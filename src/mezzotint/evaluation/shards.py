"""One pass of pictures through feature networks, kept batch by batch as files.

A batch is a fixed range of indices and becomes one file, written whole or not at all. Whoever
computes it, one process or several or the run after one that was killed, it holds the same, so the
numbers do not depend on who did.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.device import keep_freed_memory, threads
from mezzotint.errors import DataError, MezzotintError
from mezzotint.evaluation.pictures import PictureSource
from mezzotint.models.features import FeatureNetwork, Resize, load_features

__all__ = [
    "FeaturePass",
    "FeatureSet",
    "NetworkSpec",
    "pictures_at",
    "ranks",
    "run_pass",
    "tell_failure",
    "wait_for",
]

Progress = Callable[[int, int], None]
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 1800.0
_BEGUN = time.time()  # of this process: what another one said before was of an earlier run


@dataclass(frozen=True)
class NetworkSpec:
    """A feature network and where its weights are; see `mezzotint.models.features`."""

    name: str
    weights: str | None = None
    sha256: str | None = None

    def load(self, device: str) -> FeatureNetwork:
        """Load it onto a device."""
        return load_features(self.name, weights=self.weights, sha256=self.sha256).to(device)


@dataclass(frozen=True)
class FeaturePass:
    """What is computed, so that any process can compute any batch of it.

    Attributes:
        source: The pictures.
        networks: What they are seen through.
        resize: How they are brought to the networks' size.
        batch_size: Pictures in a batch.
        folder: Where the batches are kept.
        device: Where the networks stand.
        keep_pictures: Whether the pictures are kept beside their features, for those that are dear.
    """

    source: PictureSource
    networks: tuple[NetworkSpec, ...]
    resize: Resize
    batch_size: int
    folder: Path
    device: str
    keep_pictures: bool = False

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def range(self, number: int) -> tuple[int, int]:
        """Return the indices of a batch: from the first to before the second."""
        start = number * self.batch_size
        return start, min(len(self.source), start + self.batch_size)

    def path(self, number: int) -> Path:
        """Return the file of a batch."""
        return self.folder / f"{number:06d}.safetensors"

    def is_done(self, number: int) -> bool:
        """Whether a batch is there and whole: its header says how long the file is."""
        start, stop = self.range(number)
        try:
            with safe_open(self.path(number), framework="pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
        needed = {f"features.{n.name}" for n in self.networks}
        return needed <= set(shapes) and all(s[0] == stop - start for s in shapes.values())


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What the networks saw.

    Attributes:
        features: ``(N, d)`` float32 by network.
        logits: ``(N, K)`` float32 by network, for those that have them.
        pictures_seconds: What drawing or reading took, over all processes.
        features_seconds: What the networks took.
    """

    features: dict[str, Tensor]
    logits: dict[str, Tensor]
    pictures_seconds: float
    features_seconds: float


def ranks() -> tuple[int, int]:
    """Return this process's rank and how many torchrun, or what sets the same, started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def tell_failure(folder: Path, error: BaseException) -> None:
    """Leave word for the other ranks, which work in the same folder, that this one failed."""
    if ranks()[1] > 1 and folder.is_dir():
        told = str(error) or type(error).__name__
        write_atomically(folder / f".failed-{ranks()[0]}", told.encode())


def wait_for(folder: Path, there: Callable[[], bool]) -> None:
    """Wait for what other ranks do in a folder.

    Args:
        folder: Of the evaluation.
        there: Whether it is done.

    Raises:
        DataError: If one of them failed, or nothing has been done there for half an hour.
    """
    begun = time.time()
    while not there():
        for path in folder.glob(".failed-*"):
            if path.stat().st_mtime >= _BEGUN:
                rank = path.name.rpartition("-")[2]
                raise DataError(f"process {rank} failed: {path.read_text(encoding='utf-8')}")
        if time.time() - max(begun, _last_change(folder)) > _PATIENCE_SECONDS:
            raise DataError(
                f"{folder}: the other processes have done nothing for"
                f" {_PATIENCE_SECONDS / 60:.0f} minutes; run it again: it goes on where it stood"
            )
        time.sleep(_POLL_SECONDS)


def _last_change(folder: Path) -> float:
    """When something was last written into a folder or one of those in it."""
    times: list[float] = []
    for place in (folder, *folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile by another rank
            times.append(place.stat().st_mtime)
    return max(times, default=0.0)


def run_pass(
    job: FeaturePass, *, processes: int = 1, on_progress: Progress | None = None
) -> FeatureSet | None:
    """Compute the batches that are not there yet, and gather all.

    Args:
        job: What is computed.
        processes: How many share the work on this machine, each with its share of the threads.
            Under torchrun each rank takes its part instead.
        on_progress: Called with (pictures done, pictures in all).

    Returns:
        All of it; under torchrun in rank 0 alone, which waits for the others, and None elsewhere.

    Raises:
        DataError: If a picture cannot be read, or a process was ended or waited for in vain.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    total = len(job.source)

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(min(total, done * job.batch_size), total)

    rank, world = ranks()
    missing = [n for n in range(len(job)) if not job.is_done(n)]
    report(len(job) - len(missing))
    if world > 1:
        _compute(job, [n for n in missing if n % world == rank], report)

        def all_are_done() -> bool:
            missing[:] = [n for n in missing if not job.is_done(n)]
            report(len(job) - len(missing))
            return not missing

        if rank == 0:
            wait_for(job.folder.parent, all_are_done)
    elif min(processes, len(missing)) > 1:
        _spawn(job, missing, min(processes, len(missing)), report)
    else:
        _compute(job, missing, report)
    return _gather(job) if rank == 0 else None


def _compute(job: FeaturePass, numbers: Sequence[int], report: Callable[[int], None]) -> None:
    if not numbers:
        return
    if job.device == "cpu":
        keep_freed_memory()  # batch after batch is alike: clearing pages anew took half of the time
    done = len(job) - len(numbers)
    networks = [spec.load(job.device) for spec in job.networks]
    for count, number in enumerate(numbers, 1):
        _compute_batch(job, number, networks)
        report(done + count)


def _compute_batch(job: FeaturePass, number: int, networks: Sequence[FeatureNetwork]) -> None:
    begun = time.perf_counter()
    pictures = job.source.read(*job.range(number))
    seen = time.perf_counter()
    tensors: dict[str, Tensor] = {"pictures": pictures} if job.keep_pictures else {}
    with torch.inference_mode():
        for network in networks:
            features, logits = network.extract(pictures.to(job.device), job.resize)
            tensors[f"features.{network.name}"] = features.float().cpu().contiguous()
            if logits is not None:
                tensors[f"logits.{network.name}"] = logits.float().cpu().contiguous()
    taken = {
        "pictures_seconds": repr(seen - begun),
        "features_seconds": repr(time.perf_counter() - seen),
    }
    write_atomically(job.path(number), safetensors.torch.save(tensors, metadata=taken))


def _spawn(
    job: FeaturePass, missing: Sequence[int], processes: int, report: Callable[[int], None]
) -> None:
    # spawned, not forked: a fork inherits the locks of torch's threads
    context = torch.multiprocessing.get_context("spawn")
    told: Any = context.SimpleQueue()
    share = max(1, threads() // processes)
    workers = [
        context.Process(
            target=_work,
            args=(job, missing[k::processes], share, os.getpid(), told),
            daemon=True,
        )
        for k in range(processes)
    ]
    before = len(job) - len(missing)
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and told.empty():
            report(before + sum(job.path(n).is_file() for n in missing))
            time.sleep(_POLL_SECONDS)
        if not told.empty():
            raise DataError(told.get())
        ended = [worker.exitcode for worker in workers if worker.exitcode]
        if any(code < 0 for code in ended):
            raise DataError(
                f"{job.folder}: one of {processes} processes was killed, as the system does when"
                " memory runs out; run it again with fewer: it goes on where it stood"
            )
        assert not ended, "a process failed, and its traceback says why"
        report(len(job))
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _work(job: FeaturePass, numbers: Sequence[int], share: int, parent: int, told: Any) -> None:
    """What a spawned process does."""
    torch.set_num_threads(share)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this one

    def still_wanted(_: int) -> None:
        if os.getppid() != parent:  # it was killed, and could not end this process
            sys.exit()

    try:
        _compute(job, numbers, still_wanted)
    except MezzotintError as error:
        told.put(str(error))


def _gather(job: FeaturePass) -> FeatureSet:
    """Read all batches into one tensor a network."""
    gathered: dict[str, Tensor] = {}
    seconds = {"pictures_seconds": 0.0, "features_seconds": 0.0}
    for number in range(len(job)):
        start, stop = job.range(number)
        with safe_open(job.path(number), framework="pt") as file:
            for name, value in (file.metadata() or {}).items():
                seconds[name] += float(value)
            for key in file.keys():  # noqa: SIM118
                if key == "pictures":
                    continue
                part = file.get_tensor(key)
                if key not in gathered:
                    gathered[key] = torch.empty(len(job.source), part.shape[1])
                gathered[key][start:stop] = part
    return FeatureSet(
        {n.name: gathered[f"features.{n.name}"] for n in job.networks},
        {k.removeprefix("logits."): v for k, v in gathered.items() if k.startswith("logits.")},
        **seconds,
    )


def pictures_at(job: FeaturePass, indices: Sequence[int]) -> Tensor:
    """Return pictures of a pass that is done: ``(B, 3, H, W)`` uint8."""
    if not job.keep_pictures:
        return torch.cat([job.source.read(k, k + 1) for k in indices])
    found: list[Tensor] = []
    for k in indices:
        with safe_open(job.path(k // job.batch_size), framework="pt") as file:
            found.append(file.get_slice("pictures")[k % job.batch_size])
    return torch.stack(found)
