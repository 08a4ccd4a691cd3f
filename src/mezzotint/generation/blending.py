"""Fitting what was drawn into a mask to the picture around it."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["blend_in", "membrane"]

_SWEEPS = 16  # of Jacobi's iteration at every size
_SMALLEST = 2  # side of the coarsest picture, in pixels


def blend_in(drawn: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """Move the colours of what was drawn until they meet those around it, smoothly.

    By how much the drawn picture is off beside the mask is carried into it as a membrane carries
    the height of its frame, and taken away: Poisson blending (Pérez et al. 2003, "Poisson image
    editing", equations 2 to 4, with the gradients of what was drawn).

    Args:
        drawn: ``(B, 3, H, W)``, drawn inside and outside of the mask.
        kept: ``(B, 3, H, W)``, what is to stay outside.
        mask: ``(B, 1, H, W)`` in 0..1, 0 where all is kept.

    Returns:
        ``(B, 3, H, W)``: ``kept`` where the mask is 0. A picture that keeps nothing is as drawn.
    """
    known = mask <= 0.0
    off = membrane((kept - drawn).masked_fill(~known, 0.0), known)
    return torch.where(known, kept, drawn + off)


def membrane(values: Tensor, known: Tensor) -> Tensor:
    """Continue values smoothly to where they are not known: a solution of Laplace's equation.

    It is found at a small size first, whose solution is what the next larger begins from.

    Args:
        values: ``(B, C, H, W)``, 0 where not known.
        known: ``(B, 1, H, W)`` bool.

    Returns:
        ``(B, C, H, W)``, equal to ``values`` where known, 0 where nothing of a sample is known.
    """
    height, width = values.shape[-2:]
    share = known.to(values.dtype)
    if min(height, width) <= _SMALLEST:
        total = share.sum((2, 3), keepdim=True).clamp(min=1.0)
        return torch.where(known, values, values.sum((2, 3), keepdim=True) / total)
    weight = F.avg_pool2d(share, 2, ceil_mode=True)
    coarse = F.avg_pool2d(values, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = membrane(coarse * (weight > 0), weight > 0)
    x = torch.where(known, values, F.interpolate(coarse, (height, width), mode="bilinear"))
    for _ in range(_SWEEPS):
        p = F.pad(x, (1, 1, 1, 1), mode="replicate")
        around = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
        x = torch.where(known, values, around / 4)
    return x
