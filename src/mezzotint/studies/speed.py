"""How fast a device computes, how much a network asks of it, and how long a call takes."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.device import widened

__all__ = ["PEAK_WORDS", "count_flops", "peak_flops", "seconds_of", "synchronize"]

PEAK_WORDS = "a 3 x 3 convolution of 320 channels at 64 x 64, channels last"
_CHANNELS, _SIDE = 320, 64
_BATCH = {"cpu": 2}  # two, as under guidance; a GPU is only filled by more
_BATCH_ELSEWHERE = 64


def peak_flops(
    device: torch.device,
    precision: torch.dtype,
    *,
    channels: int = _CHANNELS,
    side: int = _SIDE,
    calls: int = 5,
) -> float:
    """Measure the most that a device computes, by what diffusion asks of it most.

    That is the widest convolution of Stable Diffusion's UNet at its finest level, of two pictures
    on a processor and of 64 elsewhere.

    Args:
        device: Which.
        precision: Of inputs, weights and output.
        channels: In and out.
        side: Height and width.
        calls: Of which the median counts, after one that does not.

    Returns:
        Floating-point operations a second; a multiplication and an addition are two.
    """
    batch = _BATCH.get(device.type, _BATCH_ELSEWHERE)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device, dtype=precision)
        return values.contiguous(memory_format=torch.channels_last)

    x, weight = random(batch, channels, side, side), random(channels, channels, 3, 3)
    with torch.inference_mode():
        times = [
            seconds_of(lambda: F.conv2d(x, weight, padding=1), device) for _ in range(calls + 1)
        ]
    return 2 * batch * channels**2 * 9 * side**2 / statistics.median(times[1:])


def count_flops(
    build: Callable[[], nn.Module], *inputs: Tensor | None, backward: bool = False
) -> int:
    """Count the floating-point operations of one call of a network; nothing is computed.

    Args:
        build: Makes it; called where no memory is taken.
        *inputs: Only their shapes count.
        backward: Count the gradients of all parameters too.

    Returns:
        Those of convolutions and products of matrices; a multiplication and an addition are two.
    """
    with torch.inference_mode(False):
        with torch.device("meta"):
            network = build()
        shapes = [None if x is None else _without_values(x) for x in inputs]
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = network(*shapes)
            if backward:
                output.float().square().mean().backward()
    return counter.get_total_flops()


def _without_values(x: Tensor) -> Tensor:
    """A tensor of this shape, as the network takes it without autocast."""
    return torch.empty(x.shape, device="meta", dtype=widened(x[:0]).dtype)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes, until the device is done with it."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
