"""Rectified flow: straight paths from images to noise, in the coordinates that samplers know.

A flow's state is ``x_t = (1 - t) * x0 + t * eps`` and its network predicts ``eps - x0``, the
velocity along the path (Liu et al., arXiv 2209.03003, equation 1; Lipman et al., arXiv 2210.02747,
section 4.1). Divided by ``1 - t`` it is the samplers' ``x0 + sigma * eps`` with ``sigma = t /
(1 - t)``: as for a variance-preserving schedule, only the network's input is scaled otherwise. So
every sampler is one for flows too; Euler's method in sigma is Euler's method in t.
"""

from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from mezzotint.config import Config
from mezzotint.diffusion.schedule import (
    DISTILLED_STEPS,
    MAX_SIGMA,
    Grid,
    NoiseSchedule,
    ScheduleConfig,
    Spacing,
    check_spacing,
    curve,
    evenly,
    most_steps,
    unit_variance,
)

__all__ = ["AnyScheduleConfig", "FlowSchedule", "FlowScheduleConfig", "Schedule", "build_schedule"]

_LAST = MAX_SIGMA / (1 + MAX_SIGMA)  # the time that stands for 1, where sigma is finite


class FlowScheduleConfig(Config):
    """What defines a rectified flow; the network predicts the velocity ``eps - x0``.

    Attributes:
        shift: Moves times towards the noise, in training and sampling alike: t becomes ``shift * t
            / (1 + (shift - 1) * t)``. An image of n times as many pixels as one for which 1 is
            right wants sqrt(n) (Esser et al., arXiv 2403.03206, section 5.3.2).
        num_train_timesteps: The network is told t times this.
    """

    kind: Literal["flow"] = "flow"
    shift: float = Field(default=1.0, ge=0.01, le=100)
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)

    @property
    def prediction_type(self) -> Literal["flow_prediction"]:
        """What the network predicts."""
        return "flow_prediction"


class FlowSchedule:
    """A rectified flow, with the methods of `NoiseSchedule`.

    Training times count from 0 to T = ``num_train_timesteps`` and need not be whole.

    Attributes:
        config: What it was built from.

    Example:
        >>> schedule = FlowSchedule(FlowScheduleConfig(shift=3.0))
        >>> [round(sigma, 3) for sigma in schedule.sampling_sigmas(4, "trailing").tolist()]
        [4096.0, 9.0, 3.0, 1.0, 0.0]
    """

    def __init__(self, config: FlowScheduleConfig) -> None:
        self.config = config

    @property
    def num_train_timesteps(self) -> int:
        """The last training time, T."""
        return self.config.num_train_timesteps

    @property
    def prediction_type(self) -> Literal["flow_prediction"]:
        """What the network predicts."""
        return self.config.prediction_type

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the image is left at the last time."""
        return True

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at training times.

        Args:
            t: Any shape, in ``[0, T]``; clamped to it, and to the time of sigma = 4096.

        Returns:
            The same shape, float64 where the device has it.
        """
        part = (self._precise(t) / self.num_train_timesteps).clamp(0, _LAST)
        return part / (1 - part)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Return the training times of noise levels: the inverse of `t_to_sigma`."""
        sigma = self._precise(sigma).clamp(0, MAX_SIGMA)
        return sigma / (1 + sigma) * self.num_train_timesteps

    def quantile(self, u: float) -> float:
        """Return the training time below which the share u of uniformly drawn times lies."""
        return float(self._shifted(torch.tensor(u, dtype=torch.float64))) * self.num_train_timesteps

    def draw_time(self, generator: torch.Generator) -> float:
        """Draw a training time, uniform but for the shift."""
        return self.quantile(float(torch.rand((), generator=generator)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse images to training times: the network's input.

        Args:
            x0: ``(B, ...)`` images or latents.
            noise: Standard normal, of the same shape.
            t: ``(B,)`` times.
        """
        part = (self._precise(t) / self.num_train_timesteps).view(-1, *[1] * (x0.ndim - 1))
        part = part.to(x0.dtype)
        return (1 - part) * x0 + part * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict, the same at all times of a path."""
        return noise - x0

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ``1 / sigma**2`` at times ``(B,)``, float32."""
        return self.t_to_sigma(t).pow(-2).float()

    def input_scale(self, sigma: Tensor) -> Tensor:
        """Return what the samplers' state is multiplied by to be the network's input."""
        return 1 / (1 + sigma)

    def sampling_sigmas(self, steps: int, spacing: Spacing, grid: Grid | None = None) -> Tensor:
        """Return the noise levels that sampling visits; sampling always ends at 0.

        Flat spacings are even in t before the shift. ``trailing`` is 1, 1 - 1 / steps, …;
        ``linspace`` goes from 1 to the shifted 1 / T, as in diffusers'
        FlowMatchEulerDiscreteScheduler, and ``leading`` from 1 - 1 / steps + 1 / T to 1 / T.
        The others are those of `NoiseSchedule.sampling_sigmas` between the levels of 1 / T and 1.

        Args:
            steps: Number of steps, from 1 to the number of training times.
            spacing: How the levels are laid.
            grid: The sampler's conventions.

        Returns:
            ``(steps + 1,)`` float32, falling; the first, but for ``leading``, is 4096.

        Raises:
            RequestError: If there is no such spacing or the number of steps is out of range.
        """
        grid = grid or Grid()
        total = self.num_train_timesteps
        check_spacing(steps, most_steps(total, spacing, grid), spacing)
        laid = steps + grid.spare
        count = torch.arange(steps, dtype=torch.float64)
        lowest = 1 / total
        if spacing in ("karras", "exponential"):
            ends = self.t_to_sigma(self._shifted(torch.tensor([1.0, lowest]).double()) * total)
            sigmas = curve(spacing, steps, *ends.tolist())
        elif spacing == "trailing" and grid.distilled:
            sigmas = self.t_to_sigma(evenly(self.distilled_times()[1:], steps))
        else:
            match spacing:
                case "trailing":
                    parts = 1 - count / steps
                case "leading":
                    parts = (laid - 1 - count) / laid + lowest
                case "sgm_uniform":
                    parts = torch.linspace(1, lowest, steps + 1, dtype=torch.float64)[:-1]
                case _:
                    # the scheduler takes the end from levels that are shifted already
                    end = self.quantile(lowest) / total
                    parts = torch.linspace(1, end, laid, dtype=torch.float64)[:steps]
            sigmas = self.t_to_sigma(self._shifted(parts) * total)
        return torch.cat([sigmas, torch.zeros(1)]).float()

    def distilled_times(self) -> Tensor:
        """Return the times between which consistency models are distilled.

        Returns:
            ``(51,)`` float64, rising: from 0 to T, even but for the shift.
        """
        count = min(DISTILLED_STEPS, self.num_train_timesteps)
        parts = torch.arange(count + 1, dtype=torch.float64) / count
        return self._shifted(parts) * self.num_train_timesteps

    def start_scale(self, sigma: float | Tensor) -> float:
        """Return what standard normal noise is multiplied by to start sampling at ``sigma``."""
        return unit_variance(sigma)

    def _shifted(self, part: Tensor) -> Tensor:
        shift = self.config.shift
        return shift * part / (1 + (shift - 1) * part)

    def _precise(self, values: Tensor) -> Tensor:
        # Apple's GPUs have no float64
        return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


Schedule = NoiseSchedule | FlowSchedule


def _with_kind(value: Any) -> Any:
    """Files from before there were flows say no kind."""
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "discrete", **cast(dict[str, Any], value)}
    return value


AnyScheduleConfig = Annotated[
    ScheduleConfig | FlowScheduleConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)
]


def build_schedule(config: ScheduleConfig | FlowScheduleConfig) -> Schedule:
    """Build the schedule that a configuration defines."""
    if isinstance(config, FlowScheduleConfig):
        return FlowSchedule(config)
    return NoiseSchedule(config)
