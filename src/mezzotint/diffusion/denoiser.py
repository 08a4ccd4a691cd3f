"""The one contract that samplers know: ``denoiser(x, sigma, cond) -> x0``."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mezzotint.diffusion.flow import Schedule

__all__ = ["Denoiser", "Network"]

C = TypeVar("C")
Network = Callable[[Tensor, Tensor, C], Tensor]
"""``network(input (B,C,H,W), timestep (B,), cond)``: predicts noise, velocity or image."""


class Denoiser(Generic[C]):
    """Any of the schedule's networks as an estimate of the clean image.

    With ``c_in = 1 / sqrt(1 + sigma**2)``, for a rectified flow ``1 / (1 + sigma)``, the network F
    sees ``c_in * x`` and its training time, and in its terms the estimate of the image is

    | predicts            | estimate                               |
    |---------------------|----------------------------------------|
    | ``epsilon``         | ``x - sigma * F``                      |
    | ``v_prediction``    | ``c_in**2 * x - sigma * c_in * F``     |
    | ``sample``          | ``F``                                  |
    | ``flow_prediction`` | ``c_in * x - sigma * c_in * F``        |

    Args:
        network: What was trained on the schedule.
        schedule: Its noise schedule, which also says what it predicts.
        whole_times: Round the times that the network sees, for networks that know only whole
            ones. The noise level itself stays exact.
    """

    def __init__(
        self, network: Network[C], schedule: Schedule, *, whole_times: bool = False
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.whole_times = whole_times

    def __call__(self, x: Tensor, sigma: Tensor, cond: C) -> Tensor:
        """Estimate the clean image.

        Args:
            x: ``(B, C, H, W)`` variance-exploding state, ``x0 + sigma * eps``.
            sigma: ``(B,)`` noise level of each sample, above 0.
            cond: What the network is told, as a batch of B.

        Returns:
            ``(B, C, H, W)``, float32 or better whatever the network's precision.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = self.schedule.sigma_to_t(sigma)
        if self.whole_times:
            t = t.round()
        sigma = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        c_in = self.schedule.input_scale(sigma)
        output = self.network(c_in * x, t.float(), cond).to(x.dtype)
        match self.schedule.prediction_type:
            case "epsilon":
                return x - sigma * output
            case "v_prediction":
                return c_in**2 * x - sigma * c_in * output
            case "sample":
                return output
            case "flow_prediction":
                return c_in * x - sigma * c_in * output
