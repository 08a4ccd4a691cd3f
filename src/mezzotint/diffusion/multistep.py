"""Samplers that remember: they combine estimates of earlier steps with the newest one."""

import math
from typing import Literal

from torch import Tensor

from mezzotint.diffusion.single_step import (
    Callback,
    Denoise,
    NoiseSource,
    batch_sigma,
    begin,
    draw,
    finish,
    pairs,
    report,
)

__all__ = ["dpmpp_2m", "plms"]

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    multistep: Literal["epsilon", "v_prediction"] = "epsilon",
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al., arXiv 2202.09778), started as Stable Diffusion does.

    Each step is DDIM's with the noise estimate replaced by a combination of the last four, whose
    coefficients are those of Adams and Bashforth for even steps. It is of second order, and of
    fourth where the steps are even in sigma. The first step has no past, so it is made, the
    network asked again at its end, and made anew with the mean of both estimates: one call more
    than there are steps.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Unused; the method is deterministic.
        multistep: What is combined: noise estimates, as in the paper, or velocities, as
            diffusers' PNDMScheduler does with a network that predicts them (of first order).
        callback: Told of every step.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)

    def estimate(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        denoised = denoise(x, batch_sigma(x, sigma))
        noise = (x - denoised) / sigma
        if multistep == "epsilon":
            return denoised, noise
        return denoised, (noise - sigma * denoised) / math.sqrt(1 + sigma**2)

    def move(x: Tensor, estimated: Tensor, sigma: float, following: float) -> Tensor:
        if multistep == "v_prediction":
            estimated = (estimated + sigma * x / math.sqrt(1 + sigma**2)) / math.sqrt(1 + sigma**2)
        return x + (following - sigma) * estimated

    past: list[Tensor] = []
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised, estimated = estimate(x, sigma)
        past = [estimated, *past[:3]]
        if i == 0 and following > 0:
            _, ahead = estimate(move(x, estimated, sigma, following), following)
            combined = (estimated + ahead) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(past) - 1]
            combined = sum((w * e for w, e in zip(weights, past, strict=True)), x.new_zeros(()))
        x = move(x, combined, sigma, following)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    eta: float = 0.0,
    lower_order_final: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ (2M), and with ``eta`` above 0 its stochastic form.

    With h = log(sigma / sigma') the step solves the linear part of the equation exactly and
    takes D to be linear in log sigma, from its last two values (Lu et al., arXiv 2211.01095,
    algorithm 2, midpoint form)::

        D~ = D + h / (2 h_previous) * (D - D_previous)
        x' = (sigma' / sigma) * exp(-eta h) * x + (1 - exp(-(1 + eta) h)) * D~
             + sigma' * sqrt(1 - exp(-2 eta h)) * noise

    eta = 0 is the ordinary differential equation, eta = 1 the paper's SDE-DPM-Solver++ (2M). The
    first step, and one to 0, are of first order.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Noise for ``eta`` above 0.
        eta: 0 is deterministic, 1 the reverse SDE.
        lower_order_final: With fewer than 15 steps, make the last of first order wherever it
            ends: steadier when steps are long.
        callback: Told of every step.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    steps = len(levels) - 1
    previous: tuple[Tensor, float] | None = None  # the last estimate and the last h
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        ratio = following / sigma  # exp(-h)
        first_order = following == 0 or (lower_order_final and i == steps - 1 and steps < 15)
        estimated = denoised
        if previous is not None and not first_order:
            last, last_h = previous
            estimated = denoised + (-math.log(ratio) / (2 * last_h)) * (denoised - last)
        x = ratio ** (1 + eta) * x + (1 - ratio ** (1 + eta)) * estimated
        if eta > 0 and following > 0:
            x = x + following * math.sqrt(1 - ratio ** (2 * eta)) * draw(rng, x, i)
        if following > 0:
            previous = denoised, -math.log(ratio)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)
