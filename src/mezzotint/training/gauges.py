"""What a training step shows of itself: latents, loss by noise level, share of peak arithmetic."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mezzotint.device import Execution, widened

__all__ = [
    "NOISE_BINS",
    "counted",
    "derive",
    "latent_gauges",
    "noise_gauges",
    "peak_flops",
    "picture_gauges",
    "usage_gauges",
    "worse_gauge",
]

T = TypeVar("T")

NOISE_BINS = 4
_LEAST_POWER = 1e-2  # where there is nothing to explain, nothing is worse than it
_MOST_CHANNELS = 16  # that are told one by one


@torch.no_grad()
def latent_gauges(z: Tensor) -> dict[str, Tensor]:
    """Return per-channel means of latents ``(B, C, h, w)`` and of their squares, each ``(C,)``."""
    z = widened(z)
    return {"latent_mean": z.mean((0, 2, 3)), "latent_square": z.square().mean((0, 2, 3))}


@torch.no_grad()
def noise_gauges(losses: Tensor, level: Tensor) -> dict[str, Tensor]:
    """Return sums and counts of losses by noise level, each ``(NOISE_BINS,)``.

    Args:
        losses: ``(B,)``.
        level: ``(B,)`` in [0, 1), the share of the schedule's times that have less noise.
    """
    place = (level * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
    empty = losses.new_zeros(NOISE_BINS)
    return {
        "noise_sum": empty.index_add(0, place, losses),
        "noise_count": empty.index_add(0, place, torch.ones_like(losses)),
    }


@torch.no_grad()
def worse_gauge(error: Tensor, of_nothing: Tensor) -> Tensor:
    """Return 1 where an error is more than twice that of predicting nothing, else 0; a scalar."""
    return (error > 2.0 * of_nothing.clamp(min=_LEAST_POWER)).to(error.dtype)


@torch.no_grad()
def picture_gauges(fake: Tensor, wanted: Tensor, images: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Return how near pictures come to others, ``psnr`` in dB among it, and gauges of latents.

    Args:
        fake: ``(B, 3, H, W)`` in about -1..1.
        wanted: What they shall be, in -1..1.
        images: What is trained on, whose mean square is the error of making nothing of it.
        z: ``(B, C, h, w)``.
    """
    told = {"error": F.mse_loss(fake, wanted), "power": images.square().mean()}
    told["worse_than_nothing"] = worse_gauge(told["error"], told["power"])
    told["psnr"] = -10.0 * torch.log10(told["error"] / 4.0)
    return told | latent_gauges(z)


def usage_gauges(usage: Tensor) -> dict[str, float]:
    """Return how a codebook is used, from how often each code was chosen, ``(K,)``.

    Returns:
        ``codes_used``, the share that was chosen at all; ``codes_perplexity``, the exponential of
        the entropy, in codes (VQ-VAE, arXiv 1711.00937); ``vectors_per_code``, how many choices
        these are of.
    """
    total = float(usage.sum())
    if not total:
        return {}
    share = usage.double() / total
    return {
        "codes_used": float((usage > 0).double().mean()),
        "codes_perplexity": float(torch.special.entr(share).sum().exp()),
        "vectors_per_code": total / usage.numel(),
    }


def derive(means: Mapping[str, list[float]]) -> dict[str, float]:
    """Turn averages over steps and ranks into what the log tells.

    Args:
        means: By name, one number or one for each channel or noise level.

    Returns:
        Numbers by name. Of latents ``latent_mean`` and ``latent_std`` over all, and ``/k`` for
        channel k; ``loss_by_noise/k`` from 1, the least noise, to ``NOISE_BINS``; and
        ``unexplained``, the error as a share of that of predicting nothing.
    """
    told = {name: value[0] for name, value in means.items() if len(value) == 1}
    if "latent_mean" in means:
        told |= _latents(means["latent_mean"], means["latent_square"])
    for k, count in enumerate(means.get("noise_count", ())):
        if count > 0:
            told[f"loss_by_noise/{k + 1}"] = means["noise_sum"][k] / count
    if "loss_of_zero" in told:
        told["unexplained"] = told["loss"] / max(told.pop("loss_of_zero"), _LEAST_POWER)
    elif "error" in told:
        told["unexplained"] = told.pop("error") / max(told.pop("power"), _LEAST_POWER)
    told.pop("latent_square", None)
    if "logits_real" in told:
        told["discriminator_gap"] = told["logits_real"] - told["logits_fake"]
    return told


def _latents(mean: list[float], square: list[float]) -> dict[str, float]:
    over_all = sum(mean) / len(mean)
    told = {
        "latent_mean": over_all,
        "latent_std": _root(sum(square) / len(square) - over_all**2),
    }
    if 1 < len(mean) <= _MOST_CHANNELS:
        for k, (m, s) in enumerate(zip(mean, square, strict=True)):
            told[f"latent_mean/{k}"], told[f"latent_std/{k}"] = m, _root(s - m * m)
    return told


def _root(variance: float) -> float:
    return variance**0.5 if variance > 0 else 0.0 * variance  # not a number stays none


class _Counter(TorchDispatchMode):
    """Counts by torch's own formulas, and lets every operation do what it does uncounted.

    torch's ``FlopCounterMode`` takes operations apart that have kernels of their own, SiLU's
    gradient among them, so that a step which it counts ends in other bits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def counted(work: Callable[[], T]) -> tuple[T, int]:
    """Do some work; returns what it gave, and its floating-point operations on this process.

    Those of matrix products, convolutions and attention are counted, forward and backward. What
    is computed is the same, bit for bit, as if nobody counted.
    """
    with _Counter() as counter:
        result = work()
    return result, counter.flops


@functools.cache
def peak_flops(execution: Execution) -> float:
    """Measure the floating-point operations a second of one large matrix product.

    It is in the run's precision, with the threads of this process, the best of a few: what the
    machine gives at that moment, so that a share of it can be above 1 where others used it then.
    """
    device = execution.device
    side = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(execution.precision) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        begun = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
