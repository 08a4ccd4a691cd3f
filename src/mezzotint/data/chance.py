"""Draws of plain numbers from a torch generator, which decides them alone."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

__all__ = ["Chance"]

T = TypeVar("T")


class Chance:
    """Plain numbers from one generator, in the order in which they are asked for.

    Args:
        generator: On the CPU; every draw advances it.

    Example:
        >>> a, b = (Chance(torch.Generator().manual_seed(3)) for _ in range(2))
        >>> a.uniform(2.0, 5.0) == b.uniform(2.0, 5.0)
        True
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def share(self) -> float:
        """Return a number from 0 to below 1."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def uniform(self, low: float, high: float) -> float:
        """Return a number from ``low`` to ``high``."""
        return low + (high - low) * self.share()

    def ratio(self, low: float, high: float) -> float:
        """Return a number from ``low`` to ``high``, both positive, its logarithm uniform."""
        return low * math.exp(math.log(high / low) * self.share())

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""
        return low + int(self.share() * (high - low + 1))

    def happens(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.share() < probability

    def choose(self, choices: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """Return one of several, equally likely or as the weights say."""
        if weights is None:
            return choices[self.whole(0, len(choices) - 1)]
        left = self.share() * sum(weights)
        for choice, weight in zip(choices, weights, strict=True):
            left -= weight
            if left < 0:
                return choice
        return next(c for c, w in zip(reversed(choices), reversed(weights), strict=True) if w > 0)

    def order(self, items: Sequence[T]) -> list[T]:
        """Return them shuffled."""
        places: list[int] = torch.randperm(len(items), generator=self.generator).tolist()
        return [items[place] for place in places]
