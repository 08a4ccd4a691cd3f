"""Random numbers that depend on nothing but their key.

Every draw comes from a CPU float32 generator keyed by integers such as (seed, step), never from a
stream that advances, so a picture does not depend on its neighbours in the batch and a resumed run
draws what the uninterrupted run would have drawn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleNoise", "VariedNoise", "keyed_generator", "mix", "slerp"]

_MASK = (1 << 64) - 1
INITIAL = -1  # the step under which a picture's starting noise is drawn


def mix(*key: int) -> int:
    """Hash integers into one 63-bit seed (the splitmix64 finaliser, applied key by key)."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def keyed_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on the key alone."""
    return torch.Generator().manual_seed(mix(*key))


class SampleNoise:
    """One noise stream per sample: noise for sample k depends on (seeds[k], step) alone.

    Args:
        seeds: One seed per sample of the batch.

    Example:
        >>> import torch
        >>> alone = SampleNoise([8]).normal((4, 2, 2), step=3)
        >>> batch = SampleNoise([7, 8]).normal((4, 2, 2), step=3)
        >>> bool(torch.equal(alone[0], batch[1]))
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)

    def normal(self, shape: Sequence[int], step: int = INITIAL, draw: int = 0) -> Tensor:
        """Draw standard normal noise.

        Args:
            shape: Shape of one sample, without the batch dimension, e.g. ``(C, H, W)``.
            step: Index of the sampler's step; the default is the starting noise.
            draw: Tells several draws within one step apart.

        Returns:
            A CPU float32 tensor ``(B, *shape)``.
        """
        return torch.stack(
            [
                torch.randn(tuple(shape), generator=keyed_generator(seed, step, draw))
                for seed in self.seeds
            ]
        )


class VariedNoise(SampleNoise):
    """Noise whose start is turned a part of the way towards that of other seeds.

    Args:
        seeds: One seed per sample of the batch.
        towards: Another for each.
        amount: From 0, the noise of ``seeds``, to 1, the starting noise of ``towards``.
    """

    def __init__(self, seeds: Sequence[int], towards: Sequence[int], amount: float) -> None:
        super().__init__(seeds)
        self.towards = SampleNoise(towards)
        self.amount = amount

    def normal(self, shape: Sequence[int], step: int = INITIAL, draw: int = 0) -> Tensor:
        """Draw standard normal noise; see `SampleNoise.normal`."""
        noise = super().normal(shape, step, draw)
        if step != INITIAL:
            return noise
        ends = self.towards.normal(shape, step, draw)
        return torch.stack([slerp(a, b, self.amount) for a, b in zip(noise, ends, strict=True)])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Go from ``a`` (t = 0) to ``b`` (t = 1) along the great circle (Shoemake 1985).

    Between two draws of normal noise the straight way leads through tensors that are too short to
    be noise; this one keeps their length, and both ends exactly.

    Args:
        a: Any shape.
        b: The same shape.
        t: From 0 to 1.
    """
    wide_a, wide_b = a.double(), b.double()
    cosine = (wide_a * wide_b).sum() / (wide_a.norm() * wide_b.norm())
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    if float(angle.sin()) < 1e-6:  # the same direction: the circle is a point
        return torch.lerp(a, b, t)
    from_a, from_b = ((1.0 - t) * angle).sin(), (t * angle).sin()
    return ((from_a * wide_a + from_b * wide_b) / angle.sin()).to(a.dtype)
