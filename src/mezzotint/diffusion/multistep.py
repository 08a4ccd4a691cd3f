"""Samplers that remember: they combine estimates of earlier steps with the newest one."""

import math
from typing import Literal

import torch
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

__all__ = ["dpmpp_2m", "lms", "plms", "unipc"]

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


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    max_order: int = 4,
    callback: Callback | None = None,
) -> Tensor:
    """Linear multistep: the slopes of the last steps, as a polynomial in sigma, integrated.

    The method of Adams and Bashforth for uneven steps, on the probability flow equation ``dx /
    dsigma = (x - D) / sigma`` (Karras et al., arXiv 2206.00364, equation 1). It is begun with fewer
    slopes, and so of second order.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Unused; the method is deterministic.
        max_order: How many slopes are combined, from 1 to 4.
        callback: Told of every step.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    past: list[tuple[float, Tensor]] = []  # levels and slopes, the newest first
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        if following < sigma:  # a step of no length would put two nodes at one place
            past = [(sigma, (x - denoised) / sigma), *past[: max_order - 1]]
            nodes = [level for level, _ in past]
            for k, (_, slope) in enumerate(past):
                x = x + _integral_of_basis(nodes, k, sigma, following) * slope
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def _integral_of_basis(nodes: list[float], k: int, start: float, end: float) -> float:
    """Integrate Lagrange's polynomial that is 1 at node k and 0 at the others.

    Gauss's rule of two points is exact up to the third degree, that of four nodes.
    """
    middle, half = (start + end) / 2, (end - start) / 2

    def basis(at: float) -> float:
        others = [node for j, node in enumerate(nodes) if j != k]
        return math.prod((at - node) / (nodes[k] - node) for node in others)

    return half * sum(basis(middle + side * half / math.sqrt(3)) for side in (-1, 1))


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    rng: NoiseSource,
    *,
    max_order: int = 2,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC, a predictor and a corrector that share their network calls (arXiv 2302.04867).

    Algorithms 5 and 6 of Zhao et al. for networks that predict the image, with B(h) = exp(h) - 1.
    The estimate that the next step needs anyway corrects the state that it was made at; the
    corrected state has no estimate of its own. The first steps, and the last, are of lower order.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        x: ``(B, C, H, W)`` state at ``sigmas[0]``.
        sigmas: ``(steps + 1,)`` falling noise levels.
        rng: Unused; the method is deterministic.
        max_order: Of the predictor: how many estimates it combines, from 1 to 3.
        callback: Told of every step, with the state before its correction.

    Returns:
        ``(B, C, H, W)`` the image at the last noise level, variance-preserving.
    """
    x, levels = begin(x, sigmas)
    steps = len(levels) - 1
    past: list[tuple[float, Tensor]] = []  # levels and estimates, the newest first
    before, order = x, 0  # the state before the last step, and the order of that
    for i, (sigma, following) in enumerate(pairs(levels)):
        denoised = denoise(x, batch_sigma(x, sigma))
        if past and following < sigma < past[0][0]:
            x = _unified_step(before, [(sigma, denoised), *past[:order]], sigma, corrects=True)
        if following < sigma:  # a step of no length would put two estimates at one place
            past = [(sigma, denoised), *past[: max_order - 1]]
            before, order = x, min(len(past), steps - i)
            x = _unified_step(x, past[:order], following, corrects=False)
        report(callback, i, levels, x, denoised)
    return finish(x, levels)


def _unified_step(
    x: Tensor, estimates: list[tuple[float, Tensor]], following: float, *, corrects: bool
) -> Tensor:
    """Step to a level by estimates at others, one of them at that level itself if it corrects.

    The estimates are the values of a polynomial in log sigma; its integral against the exponential
    kernel gives each its weight.
    """
    if corrects:
        ahead, (sigma, base), *others = estimates
        others = [*others, ahead]
    else:
        (sigma, base), *others = estimates
    ratio = following / sigma
    plain = ratio * x + (1 - ratio) * base
    if following == 0 or ratio == 1 or not others:
        return plain
    h = -math.log(ratio)
    places = [math.log(sigma / level) / h for level, _ in others]  # 1 at the level ahead
    weights = _unified_weights(places, h) if len(places) > 1 else [0.5]
    change = sum(
        (
            (weight / place) * (estimate - base)
            for weight, place, (_, estimate) in zip(weights, places, others, strict=True)
        ),
        x.new_zeros(()),
    )
    return plain + (1 - ratio) * change


def _unified_weights(places: list[float], h: float) -> list[float]:
    """Solve ``sum_k weight_k * place_k**(n - 1) = n! phi_(n + 1)(-h) / B(h)`` for n = 1, 2, …."""
    phi = math.expm1(-h)  # B(h), with the sign that cancels
    right: list[float] = []
    term, factorial = phi / -h - 1.0, 1.0
    for n in range(1, len(places) + 1):
        right.append(term * factorial / phi)
        factorial *= n + 1
        term = term / -h - 1.0 / factorial
    rows = [[place**n for place in places] for n in range(len(places))]
    solved: list[float] = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    ).tolist()
    return solved
