"""The best compromise between an image and an energy, sample by sample."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Energy", "pull_towards"]

Energy = Callable[[Tensor], Tensor]
"""``energy(x0 (B,C,H,W)) -> (B,)``: differentiable, lower where the image is better."""

_TRIAL = 0.1  # how far a step is first tried, in deviations r per value


def pull_towards(energy: Energy, centre: Tensor, spread: Tensor, iterations: int) -> Tensor:
    """Minimise ``|z - centre|**2 / (2 spread) + energy(z)`` over z.

    Nonlinear conjugate gradients (Polak and Ribière's, begun anew where they do not descend). How
    far to go along each direction is read off a parabola through a trial point, so that quadratic
    energies are minimised as by linear conjugate gradients. Samples do not see one another.

    Args:
        energy: ``(B, C, H, W) -> (B,)``.
        centre: ``(B, C, H, W)``.
        spread: ``(B, 1, 1, 1)``, above 0: a variance.
        iterations: How many directions to go; 0 goes one step of the energy's gradient at the
            centre, ``-spread * gradient``, however long.

    Returns:
        ``(B, C, H, W)``: ``z - centre``.
    """

    def objective(step: Tensor) -> Tensor:
        return _each(step * step) / (2 * spread) + _column(energy(centre + step), step)

    def with_gradient(step: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            step = step.detach().requires_grad_()
            value = objective(step)
            (gradient,) = torch.autograd.grad(value.sum(), step)
        return value.detach(), gradient

    step = torch.zeros_like(centre)
    value, gradient = with_gradient(step)
    if not iterations:
        return -spread * gradient
    direction, reach = -gradient, torch.full_like(spread, _TRIAL)
    for _ in range(iterations):
        length = _length(objective, step, value, gradient, direction, spread, reach)
        further = step + length * direction
        new_value, new_gradient = with_gradient(further)
        better = new_value < value
        momentum = _each(new_gradient * (new_gradient - gradient)) / _positive(_each(gradient**2))
        conjugate = momentum.clamp(min=0) * direction - new_gradient
        descends = _each(conjugate * new_gradient) < 0
        direction = torch.where(better, torch.where(descends, conjugate, -new_gradient), -gradient)
        step, value = torch.where(better, further, step), torch.where(better, new_value, value)
        gradient = torch.where(better, new_gradient, gradient)
        reach = torch.where(better, reach, reach / 4)
    return step


@torch.no_grad()
def _length(
    objective: Callable[[Tensor], Tensor],
    step: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    spread: Tensor,
    reach: Tensor,
) -> Tensor:
    """How far to go: to the lowest point of a parabola, no farther than without the energy."""
    slope = _each(gradient * direction)
    square = _positive(_each(direction**2))
    most = -slope * spread / square
    trial = torch.minimum(reach * (spread * direction[0].numel() / square).sqrt(), most)
    trial = _positive(trial)
    bend = 2 * (objective(step + trial * direction) - value - trial * slope) / trial**2
    best = torch.where(bend > 0, -slope / _positive(bend), trial)
    return torch.minimum(torch.nan_to_num(best, nan=0.0), most)


def _each(values: Tensor) -> Tensor:
    """Sum over each sample: ``(B, 1, 1, 1)``."""
    return values.sum(tuple(range(1, values.ndim)), keepdim=True)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=torch.finfo(values.dtype).tiny)
