"""The processes that train one model together, and what they tell one another.

``torchrun``, ``accelerate launch`` and a SLURM script that calls one of them start the processes
and set the same variables; the rest is torch's own.
"""

import atexit
import contextlib
import functools
import gc
import os
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mezzotint.errors import TrainingError
from mezzotint.evaluation.shards import ranks
from mezzotint.rng import mix

__all__ = ["ALONE", "Ranks", "join_ranks", "positions_of", "rank_device"]

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # others may wait while one encodes a whole data set
_STEP = timedelta(hours=1)  # or draws; a rank that is silent for longer is lost


class Ranks:
    """This process and the others of a run; alone, every method returns what it was given.

    All ranks call the same methods in the same order.

    Args:
        rank: Of this process, from 0.
        world: How many there are.
        control: A group that talks on the processor, for all that is no tensor of the training.
        each_step: Another, which loses its patience sooner.

    Raises:
        TrainingError: By every method, if another process has ended.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        control: dist.ProcessGroup | None = None,
        each_step: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self._control, self._each_step = control, each_step

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    def own_seed(self, seed: int) -> int:
        """Return a seed of this rank's own; the first one's, and that of one alone, is as given."""
        return seed if self.is_first else mix(seed, self.rank)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the ranks of a floating-point tensor of one shape."""
        return self.sum(value) / self.world if self.several else value

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks of a tensor of one shape."""
        if not self.several:
            return value
        total = value.detach().clone()
        with self.told():
            dist.all_reduce(total)
        return total

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in the order of ranks; all have one shape."""
        if not self.several:
            return [value]
        gathered = [torch.empty_like(value) for _ in range(self.world)]
        with self.told():
            dist.all_gather(gathered, value.contiguous())
        return gathered

    def gather_values(self, value: T) -> list[T]:
        """Return every rank's plain value, in the order of ranks."""
        if not self.several:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self.told():
            dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of all ranks' numbers, place by place."""
        if not self.several:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        with self.told():
            dist.all_reduce(together, dist.ReduceOp.MAX, group=self._each_step)
        return together.tolist()

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the means over all ranks of numbers, place by place."""
        if not self.several:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        with self.told():
            dist.all_reduce(together, group=self._each_step)
        return (together / self.world).tolist()

    def of_first(self, value: T) -> T:
        """Return the first rank's plain value."""
        return self.gather_values(value)[0]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather_values(None)

    def part(self) -> None:
        """Leave the others for good, and end the threads that talk to them.

        One that lets go of its last tensor while the interpreter ends would abort the process.
        """
        self._control = self._each_step = None
        gc.collect()
        dist.destroy_process_group()

    @contextlib.contextmanager
    def told(self) -> Generator[None]:
        """Say in words what a ``with`` block raises where another process has ended."""
        try:
            yield
        except RuntimeError as error:
            # of gloo's connections torch has no narrower error
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise TrainingError(
                f"rank {self.rank}: another process of the run has ended or cannot be reached; its"
                " own last words say why. Start all again with --resume"
            ) from error


ALONE = Ranks()


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Generator[Ranks]:
    """Join the processes that were started with this one, for the length of a ``with`` block.

    All leave it together, when the first has written everything; unless it ends by an error.

    Args:
        device: What this process computes on.

    Raises:
        TrainingError: If the others cannot be met.
    """
    if ranks()[1] == 1:
        yield ALONE
        return
    joined = _meet(device.type)
    yield joined
    joined.wait()


@functools.cache  # processes that part and meet again may wait for one another for ever
def _meet(kind: str) -> Ranks:
    rank, world = ranks()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        groups = [dist.new_group(backend="gloo", timeout=t) for t in (_PATIENCE, _STEP)]
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {rank} of {world}: cannot meet the others: {error}; start all by torchrun, which"
            " sets MASTER_ADDR and MASTER_PORT too"
        ) from error
    control, each_step = groups
    assert isinstance(control, dist.ProcessGroup) and isinstance(each_step, dist.ProcessGroup)
    joined = Ranks(rank, world, control, each_step)
    atexit.register(joined.part)
    return joined


def rank_device(device: torch.device) -> torch.device:
    """Return this process's own device: of CUDA devices that of its place on this machine."""
    if str(device) != "cuda" or ranks()[1] == 1:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def positions_of(step: int, batch_size: int, accumulate: int, ranks: Ranks) -> list[int]:
    """Return the positions in the data's order that a rank sees in a step.

    A step sees the same samples, in the same parts, whatever the number of ranks.

    Args:
        step: Steps done before it.
        batch_size: Samples of one forward pass, of all ranks together.
        accumulate: Forward passes of a step.
        ranks: This process among the others.

    Example:
        >>> positions_of(1, 4, 2, Ranks(1, 2))
        [10, 11, 14, 15]
    """
    each = batch_size // ranks.world
    first = step * batch_size * accumulate + ranks.rank * each
    return [first + part * batch_size + k for part in range(accumulate) for k in range(each)]
