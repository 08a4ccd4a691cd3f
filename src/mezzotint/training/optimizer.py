"""AdamW as a recipe says it: learning rate over time, clipping."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezzotint.device import Execution
from mezzotint.training.recipe import OptimizerConfig

__all__ = [
    "apply_gradients",
    "build_optimizer",
    "learning_rate_factor",
    "loss_scaler",
    "use_channels_last",
]


def learning_rate_factor(
    config: OptimizerConfig, step: int, progress: float, begun: int = 0
) -> float:
    """The learning rate at a step, as a share of its peak.

    Args:
        config: The schedule.
        step: Steps done before this one.
        progress: Share of the budget that is spent, in [0, 1).
        begun: Steps done when the optimizer began without moments, from which it warms up.
    """
    warmup = min(1.0, (step + 1 - begun) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warmup


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW; each group's ``lr`` is kept as its peak under ``peak``."""
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(
        groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    factor: float,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor | float]:
    """Clip, step and clear.

    Args:
        optimizer: From `build_optimizer`, gradients accumulated.
        config: Says where to clip.
        factor: Share of the peak learning rate.
        scaler: From `loss_scaler`, by which the loss was scaled; the caller updates it.

    Returns:
        For the log: ``gradient_norm``, the global one before clipping; and in float16
            ``skipped_steps``, 1 where the gradients overflowed, so that there was no step and there
            is no norm: the scaler tries ever larger factors, and takes the last one back.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = config.gradient_clip if config.gradient_clip is not None else math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not scaler.is_enabled():
        return {"gradient_norm": norm}
    skipped = not bool(torch.isfinite(norm))
    return {"skipped_steps": 1.0} if skipped else {"skipped_steps": 0.0, "gradient_norm": norm}


def loss_scaler(execution: Execution) -> torch.amp.GradScaler:
    """Return what keeps float16 gradients from vanishing; in other precisions it does nothing."""
    half = execution.precision is torch.float16
    return torch.amp.GradScaler(execution.device.type, enabled=half)


def use_channels_last(module: nn.Module) -> None:
    """Store the convolution weights of a module with the channels innermost."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
