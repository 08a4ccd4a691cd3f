"""Samplers whose steps know nothing of the steps before; and what all samplers share."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Callback",
    "Denoise",
    "NoiseSource",
    "consistency",
    "dpm2",
    "dpmpp_sde",
    "euler",
    "heun",
]

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


def draw(rng: NoiseSource, x: Tensor, step: int, number: int = 0) -> Tensor:
    return rng.normal(x.shape[1:], step, number).to(x)


def report(
    callback: Callback | None, step: int, levels: list[float], x: Tensor, denoised: Tensor
) -> None:
    if callback is not None:
        callback(step, len(levels) - 1, x, denoised)


def finish(x: Tensor, levels: list[float]) -> Tensor:
    return x / math.sqrt(1 + levels[-1] ** 2)


def down_and_up(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """Split a step into one down to ``sigma_down`` and noise of ``sigma_up``; see `euler`."""
    up = eta * following * math.sqrt(1 - (following / sigma) ** 2)
    return math.sqrt(following**2 - up**2), up


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
        down, up = down_and_up(sigma, following, eta)
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


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """The midpoint method, as DPM-Solver-2 takes it (Lu et al., arXiv 2206.00927, algorithm 1).

    The slope that a step follows is that at the level halfway in log sigma. Each step calls the
    network twice; one to 0, where there is no halfway, is Euler's.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Noise for ``eta`` above 0.
        eta: 0 is deterministic, 1 is ancestral, with the split of `euler`.
        callback: Told of every step, not of its halves.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        down, up = down_and_up(sigma, following, eta)
        slope = (x - denoised) / sigma
        if 0 < down < sigma:
            middle = math.sqrt(sigma * down)
            halfway = x + (middle - sigma) * slope
            denoised = denoise(halfway, batch_sigma(x, middle))
            slope = (halfway - denoised) / middle
        x = x + (down - sigma) * slope
        if up > 0:
            x = x + up * draw(rng, x, i)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ of single steps on the reverse SDE (Lu et al., arXiv 2211.01095, algorithm 1).

    A step first goes to the level halfway in log sigma, noise and all, and asks the network there;
    what that says of the image is then what the whole step moves towards. The noise of the whole
    step is that of its first half, carried on, and fresh noise for the second half. Twice the calls
    of `dpmpp_2m` for the same number of steps, and no memory. A step to 0 takes the image as it is
    estimated.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Noise, drawn twice a step, for ``eta`` above 0.
        eta: 0 is deterministic, 1 the reverse SDE.
        callback: Told of every step, not of its halves.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        down, up = down_and_up(sigma, following, eta)
        noise = None
        if 0 < following < sigma:
            middle = math.sqrt(sigma * following)
            half_down, half_up = down_and_up(sigma, middle, eta)
            halfway = denoised + (half_down / sigma) * (x - denoised)
            if up > 0:
                first, second = draw(rng, x, i, 0), draw(rng, x, i, 1)
                halfway = halfway + half_up * first
                rest_down, rest_up = down_and_up(middle, following, eta)
                carried = half_up * rest_down / middle
                noise = (carried * first + rest_up * second) / math.hypot(carried, rest_up)
            denoised = denoise(halfway, batch_sigma(x, middle))
        x = denoised + (down / sigma) * (x - denoised)
        if noise is not None:
            x = x + up * noise
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def consistency(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al., arXiv 2303.01469, algorithm 1).

    For networks that are distilled to give the end of the whole path and not the mean of what the
    image may be, as latent consistency models are (Luo et al., arXiv 2310.04378): each step jumps
    to the image and back up to the next level with fresh noise, ``x' = D + sigma' * noise``.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Noise.
        eta: 1 is all fresh noise; the share ``sqrt(1 - eta**2)`` of it is what was there.
        callback: Told of every step.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        if following == sigma:  # a step of no length
            report(callback, i, levels, x, denoised)
            continue
        kept = math.sqrt(1 - eta**2) * following / sigma
        x = denoised + kept * (x - denoised)
        if eta > 0 and following > 0:
            x = x + eta * following * draw(rng, x, i)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)
