"""Which samples a step sees, as a pure function of (seed, step); and one batch made ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Generic, TypeVar

import torch

from mezzotint.rng import keyed_generator

__all__ = ["Batches", "DataOrder"]

T = TypeVar("T")


class DataOrder:
    """Every image once an epoch, in an order that depends on (seed, epoch) alone.

    Args:
        count: Number of images.
        seed: The recipe's seed.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> list[int]:
        return torch.randperm(
            self.count, generator=keyed_generator(self.seed, 0x0DE2, epoch)
        ).tolist()

    def index(self, position: int) -> int:
        """Return the image at a global position: ``step * batch + place`` in the batch."""
        epoch, place = divmod(position, self.count)
        return self._permutation(epoch)[place]


class Batches(Generic[T]):
    """Makes the batch of the next step in a thread while the current one is trained on.

    Args:
        make: From a step to its batch; a pure function of the step.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """Return the batch of a step and begin the one after it."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._pool.submit(self._make, step)
        batch = future.result()
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return batch

    def forget(self) -> None:
        """Drop the batch that was made ahead, for it would be another one now."""
        if self._ahead is not None:
            self._ahead[1].exception()  # made to its end: it uses the data
        self._ahead = None

    def close(self) -> None:
        """End the thread, until the next batch is asked for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._ahead = None
