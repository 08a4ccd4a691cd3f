"""Samplers whose steps know nothing of the steps before; and what all samplers share."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Callback", "Denoise", "NoiseSource", "euler", "heun"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``denoise(x (B,C,H,W), sigma (B,)) -> x0``: a denoiser with its condition filled in."""

Callback = Callable[[int, int, Tensor, Tensor], object]
"""``callback(step, steps, x, denoised)`` after each step; what it raises ends the sampling."""


class NoiseSource(Protocol):
    """Where samplers get their noise: `mezzotint.rng.SampleNoise`, or a stand-in."""

    def normal(self, shape: Sequence[int], step: int = ..., draw: int = ...) -> Tensor:
        """Return ``(B, *shape)`` of standard normal noise that depends on the step alone."""
        ...


def begin(x: Tensor, sigmas: Tensor) -> tuple[Tensor, list[float]]:
    levels: list[float] = sigmas.tolist()
    assert len(levels) > 1, "there must be at least one step"
    return x.to(torch.promote_types(x.dtype, torch.float32)), levels


def pairs(levels: list[float]) -> "zip[tuple[float, float]]":
    return zip(levels[:-1], levels[1:], strict=True)


def batch_sigma(x: Tensor, sigma: float) -> Tensor:
    return x.new_full((x.shape[0],), sigma)


def draw(rng: NoiseSource, x: Tensor, step: int) -> Tensor:
    return rng.normal(x.shape[1:], step).to(x)


def report(
    callback: Callback | None, step: int, levels: list[float], x: Tensor, denoised: Tensor
) -> None:
    if callback is not None:
        callback(step, len(levels) - 1, x, denoised)


def finish(x: Tensor, levels: list[float]) -> Tensor:
    return x / math.sqrt(1 + levels[-1] ** 2)


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    r"""Euler's method, ancestral by ``eta``: this one function is also DDIM and DDPM.

    A step goes down to ``sigma_down`` and adds noise up to ``sigma'``::

        sigma_up**2   = eta**2 * sigma'**2 * (sigma**2 - sigma'**2) / sigma**2
        sigma_down**2 = sigma'**2 - sigma_up**2
        x'            = D + (sigma_down / sigma) * (x - D) + sigma_up * noise

    Why it is DDIM (Song et al., arXiv 2010.02502, equation 12): with a = alphas_cumprod, that is
    ``x_vp' = sqrt(a') D + sqrt(1 - a' - s**2) eps + s * noise`` with (equation 16) ``s**2 =
    eta**2 (1 - a') / (1 - a) (1 - a / a')``. Put in ``1 - a = sigma**2 / (1 + sigma**2)`` and
    ``a / a' = (1 + sigma'**2) / (1 + sigma**2)``: s**2 is ``sigma_up**2 / (1 + sigma'**2)``.
    Multiplied by ``sqrt(1 + sigma'**2) = 1 / sqrt(a')``, the equation is the step above, as
    ``eps = (x - D) / sigma``. With eta = 1, s**2 is the posterior variance of DDPM (Ho et al.,
    arXiv 2006.11239, equation 7: the small fixed variance), whose mean is then DDIM's as well.
    With eta = 0 it is Euler's method on the probability flow equation ``dx / dsigma = (x - D) /
    sigma`` (Karras et al., arXiv 2206.00364, equation 1).

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Noise for ``eta`` above 0.
        eta: 0 is deterministic, 1 is ancestral.
        callback: Told of every step.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        up = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        down = math.sqrt(following**2 - up**2)
        x = denoised + (down / sigma) * (x - denoised)
        if up > 0:
            x = x + up * draw(rng, x, i)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al., arXiv 2206.00364, algorithm 1).

    Each step calls the network twice and follows the mean of the two slopes; a step to 0, where
    there is no slope, is Euler's.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Unused; the method is deterministic.
        callback: Told of every step, not of its halves.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        ahead = denoised + (following / sigma) * (x - denoised)
        if following > 0:
            slope = (x - denoised) / sigma
            denoised = denoise(ahead, batch_sigma(x, following))
            slope_ahead = (ahead - denoised) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
        report(callback, i, levels, x, denoised)
    return finish(x, levels)
