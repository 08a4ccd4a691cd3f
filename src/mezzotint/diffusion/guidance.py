"""Classifier-free guidance: a denoiser made of two (Ho and Salimans, arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

__all__ = ["ClassifierFreeGuidance", "Joinable"]


class Joinable(Protocol):
    """A condition that can be joined with others along the batch."""

    def cat(self, *others: Self) -> Self:
        """Join batches."""
        ...


C = TypeVar("C", bound=Joinable)


class ClassifierFreeGuidance(Generic[C]):
    """A denoiser that goes further the way in which the condition pulls.

    ``D = D_null + scale * (D_cond - D_null)``, equation 6 of the paper (whose w is scale - 1) on
    estimates of the image instead of the noise; as these are linear in one another, the two are
    the same. Both halves run as one batch. Their conditions are joined once, as long as the
    condition stays the same object.

    Args:
        denoiser: ``(x, sigma, cond) -> x0``.
        null: The condition that says nothing, of the batch size of the conditions; ``None`` will do
            where there is no guidance.
        scale: 1 is no guidance; the null half is then not computed.
        rescale: From 0 to 1, how far the contrast of the guided image is taken back to that of
            the conditional one: phi of Lin et al. (arXiv 2305.08891, section 3.4), here on
            estimates of the image.
        interval: Noise levels ``(low, high)`` outside which there is no guidance: low < sigma <=
            high (Kynkäänniemi et al., arXiv 2404.07724).
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, C], Tensor],
        null: C | None,
        scale: float,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.null = null
        self.scale = scale
        self.rescale = rescale
        self.interval = interval
        self._joined: tuple[C, C] | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: C) -> Tensor:
        """Estimate the clean image under guidance; shapes as in `Denoiser`."""
        inside = self._inside(sigma)
        if self.scale == 1 or not bool(inside.any()):
            return self.denoiser(x, sigma, cond)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), self._both(cond))
        conditional, unconditional = both.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale:
            dims = tuple(range(1, x.ndim))
            contrast = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (1 + self.rescale * (contrast - 1))
        return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), guided, conditional)

    def _both(self, cond: C) -> C:
        assert self.null is not None, "guidance needs a null condition"
        if self._joined is None or self._joined[0] is not cond:
            self._joined = cond, cond.cat(self.null)
        return self._joined[1]

    def _inside(self, sigma: Tensor) -> Tensor:
        if self.interval is None:
            return torch.ones_like(sigma, dtype=torch.bool)
        low, high = self.interval
        return (low < sigma) & (sigma <= high)
