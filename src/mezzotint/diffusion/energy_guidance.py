"""Guidance by a function of the clean image, without training the model for it.

Dhariwal and Nichol (arXiv 2105.05233) lead a model by the gradient of a classifier of noisy images;
Rombach et al. (arXiv 2112.10752, appendix C, equations 15 to 17) by any differentiable function of
the estimate of the clean image, which needs no training. "Energy guidance" is that (arXiv
2303.09833), "universal guidance" (2302.07121), and "diffusion posterior sampling" (2209.14687).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from mezzotint.diffusion.proximal import Energy, pull_towards

__all__ = ["Energy", "EnergyGuidance"]

C = TypeVar("C")


class EnergyGuidance(Generic[C]):
    r"""A denoiser that leads towards images of low energy.

    With ``p(y | x0)`` proportional to ``exp(-scale * energy(x0))``, Bayes' rule turns the estimate
    D of the clean image into ``D + sigma**2 * grad_x log p(y | x)``. What remains is to average
    ``p(y | x0)`` over the clean images that x may have come from. Around D, take these as normal
    with variance ``r**2 = sigma**2 s**2 / (sigma**2 + s**2)``, as for normal data of deviation s
    (Song et al., "Pseudoinverse-guided diffusion models", ICLR 2023). To second order then

    ``-log p(y | x) = min_z |z - D(x)|**2 / (2 r**2) + scale * energy(z)``,

    whose gradient is ``-(dD/dx)^T (z - D) / r**2`` at the best z. Where the energy is steeper than
    the spread r allows, z stops at its minimum: no step is too long, whatever the scale. For
    normal data and a quadratic energy, the samples are exactly those of the posterior.

    Args:
        denoiser: ``(x, sigma, cond) -> x0``; guided itself, if need be.
        energy: ``x0 (B, C, H, W) -> (B,)``, differentiable, each value from its own sample alone:
            -log p(y | x0), up to a constant.
        scale: How strongly it acts; 0 is no guidance.
        through_network: Take the gradient through the network. Otherwise ``dD/dx`` is put at
            ``r**2 / sigma**2``, so that z is the result: cheaper, as the network is not
            differentiated, and less true to the model.
        method: ``"proximal"`` finds z by ``iterations`` of conjugate gradients; ``"gradient"`` goes
            one step of the energy's gradient at D, as in arXiv 2209.14687, which is for small
            scales.
        iterations: Of the search for z; each evaluates the energy twice.
        root: Take the root of the energy in its place, whose gradient is as long whether the goal
            is far or near: the normalisation of arXiv 2209.14687.
        interval: Noise levels ``(low, high)`` outside which there is no guidance: low < sigma <=
            high.
        data_std: s, of the clean images; latents are normalised to 1.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, C], Tensor],
        energy: Energy,
        scale: float = 1.0,
        *,
        through_network: bool = True,
        method: Literal["proximal", "gradient"] = "proximal",
        iterations: int = 2,
        root: bool = False,
        interval: tuple[float, float] | None = None,
        data_std: float = 1.0,
    ) -> None:
        self.denoiser = denoiser
        self.energy = energy
        self.scale = scale
        self.through_network = through_network
        self.iterations = iterations if method == "proximal" else 0
        self.root = root
        self.interval = interval
        self.data_std = data_std

    def __call__(self, x: Tensor, sigma: Tensor, cond: C) -> Tensor:
        """Estimate the clean image under guidance; shapes as in `Denoiser`.

        Gradients are computed whatever the caller's mode, `torch.inference_mode` too.
        """
        inside = self._inside(sigma)
        if self.scale == 0 or not bool(inside.any()):
            return self.denoiser(x, sigma, cond)
        with torch.inference_mode(False), torch.set_grad_enabled(self.through_network):
            # tensors of inference mode can take no part in a gradient, their copies can
            state = x.detach().clone().requires_grad_(self.through_network)
            level = sigma.detach().clone()
            x0 = self.denoiser(state, level, _ordinary(cond))
            column = level.to(x0.dtype).view(-1, *[1] * (x.ndim - 1))
            spread = column**2 / (1 + (column / self.data_std) ** 2)  # r**2
            step = pull_towards(self._scaled, x0.detach(), spread, self.iterations)
            if self.through_network:
                (gradient,) = torch.autograd.grad(x0, state, step / spread)
                step = _no_longer_than(column**2 * gradient.to(step.dtype), step)
            chosen = inside.view(-1, *[1] * (x.ndim - 1))
            return torch.where(chosen, x0.detach() + step, x0.detach())

    def _scaled(self, x0: Tensor) -> Tensor:
        energy = self.energy(x0)
        if self.root:
            energy = (energy + torch.finfo(energy.dtype).tiny ** 0.5).sqrt()
        return self.scale * energy

    def _inside(self, sigma: Tensor) -> Tensor:
        if self.interval is None:
            return torch.ones_like(sigma, dtype=torch.bool)
        low, high = self.interval
        return (low < sigma) & (sigma <= high)


def _no_longer_than(step: Tensor, limit: Tensor) -> Tensor:
    """Shorten steps to the length of others, sample by sample.

    ``sigma**2 dD/dx`` is a covariance, and at most r**2 for normal data. At high noise levels a
    network's error in dD/dx is multiplied by sigma**2, and must not carry the sample away.
    """
    dims = tuple(range(1, step.ndim))
    length, most = (t.square().sum(dims, keepdim=True).sqrt() for t in (step, limit))
    return step * (most / length.clamp(min=torch.finfo(step.dtype).tiny)).clamp(max=1.0)


def _ordinary(value: C) -> C:
    """Copy the tensors of inference mode that a condition holds."""
    if isinstance(value, Tensor):
        return cast(C, value.clone() if value.is_inference() else value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _ordinary(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return cast(C, dataclasses.replace(cast(Any, value), **fields))
    return value
