"""Noise schedules: how much noise stands at each training time, and which levels sampling visits.

Two coordinate systems appear. Networks are trained on variance-preserving inputs
``x_vp = sqrt(alphas_cumprod) * x0 + sqrt(1 - alphas_cumprod) * eps`` (Ho et al. 2020,
arXiv 2006.11239, equation 4). Samplers work on variance-exploding states ``x = x0 + sigma * eps``
with ``sigma**2 = (1 - alphas_cumprod) / alphas_cumprod``, so ``x_vp = x / sqrt(1 + sigma**2)``.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mezzotint.config import Config
from mezzotint.errors import RequestError, nearest

__all__ = [
    "DISTILLED_STEPS",
    "MAX_SIGMA",
    "SPACINGS",
    "Grid",
    "NoiseSchedule",
    "PredictionType",
    "ScheduleConfig",
    "Spacing",
    "check_spacing",
    "curve",
    "evenly",
    "most_steps",
    "unit_variance",
]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "sgm_uniform"]

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
MAX_SIGMA = 4096.0  # stands for zero terminal SNR: alphas_cumprod = 2**-24, finite in float32
DISTILLED_STEPS = 50  # of the path that latent consistency models are distilled from
_SNAP = 1e-3  # times nearer than this to a whole one are that one: float32 sigmas lose no more


class ScheduleConfig(Config):
    """What defines a noise schedule; the default is that of the latent diffusion paper.

    Attributes:
        kind: May be left out, and is where it is written.
        beta_schedule: ``linear`` in beta (DDPM), ``scaled_linear``: linear in its square root
            (latent diffusion), or ``cosine`` (Nichol and Dhariwal, arXiv 2102.09672, equation 17).
        beta_start: Beta at the first time; unused by ``cosine``.
        beta_end: Beta at the last time; unused by ``cosine``.
        num_train_timesteps: Number of training times, which count from 0.
        zero_terminal_snr: Rescale so that nothing of the image is left at the last time
            (Lin et al., arXiv 2305.08891, algorithm 1).
        prediction_type: What the network predicts: the noise, the velocity, or the image.
        steps_offset: Added to the times of ``leading`` spacing.
        set_alpha_to_one: Whether sampling ends at sigma 0, or at the first training time's sigma.
    """

    kind: Literal["discrete"] = Field(default="discrete", exclude=True)
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    zero_terminal_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    steps_offset: int = Field(default=0, ge=0)
    set_alpha_to_one: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr cannot go with prediction_type 'epsilon': where there is only"
                " noise, predicting the noise says nothing of the image; use 'v_prediction' or"
                " 'sample'"
            )
        if self.beta_end < self.beta_start:
            raise ValueError(
                f"beta_end ({self.beta_end}) must not be below beta_start ({self.beta_start})"
            )
        if self.steps_offset >= self.num_train_timesteps:
            raise ValueError(
                f"steps_offset ({self.steps_offset}) must be below num_train_timesteps"
                f" ({self.num_train_timesteps})"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Conventions by which samplers lay the same spacing differently.

    They change which pictures come out, not whether they are right; each sampler's are those of
    the diffusers scheduler of its name, so that a public model draws the same picture.

    Attributes:
        whole: Round ``linspace`` times to whole ones; without it, noise levels at times between
            are linear between their neighbours'.
        spare: Lay ``linspace`` and ``leading`` for one step more and leave out the lowest time.
        to_zero: End at sigma 0 even if the schedule says ``set_alpha_to_one: false``.
        distilled: Choose the times of ``trailing`` among those of `NoiseSchedule.distilled_times`.
    """

    whole: bool = True
    spare: bool = False
    to_zero: bool = False
    distilled: bool = False


class NoiseSchedule:
    """The discrete schedule that a configuration defines, in both coordinate systems.

    Attributes:
        config: What it was built from.
        alphas_cumprod: ``(T,)`` float64, falling; the paper's alpha-bar.
        sigmas: ``(T,)`` float64, strictly rising; ``sqrt((1 - alphas_cumprod) / alphas_cumprod)``.

    Example:
        >>> schedule = NoiseSchedule(ScheduleConfig())
        >>> [round(sigma, 3) for sigma in schedule.sampling_sigmas(4, "trailing").tolist()]
        [14.615, 4.082, 1.613, 0.693, 0.0]
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        sigmas = _sigmas(_alphas_cumprod(config))
        self.sigmas = _end_in_noise(sigmas) if config.zero_terminal_snr else sigmas
        self.alphas_cumprod = 1 / (1 + self.sigmas**2)
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def num_train_timesteps(self) -> int:
        """Number of training times, T."""
        return self.config.num_train_timesteps

    @property
    def prediction_type(self) -> PredictionType:
        """What the network predicts."""
        return self.config.prediction_type

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the image is left at the last time."""
        return self.config.zero_terminal_snr

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at training times, linear in log sigma between whole ones.

        Args:
            t: Any shape, in ``[0, T - 1]``; clamped to it.

        Returns:
            The same shape, float64 where the device has it.
        """
        log_sigmas = self._log_sigmas(t.device)
        t = t.to(log_sigmas.dtype).clamp(0, self.num_train_timesteps - 1)
        low = t.floor().long().clamp(max=self.num_train_timesteps - 2)
        weight = t - low
        return ((1 - weight) * log_sigmas[low] + weight * log_sigmas[low + 1]).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Return the training times of noise levels: the inverse of `t_to_sigma`.

        Args:
            sigma: Any shape; levels outside the schedule give its first or last time.

        Returns:
            The same shape, float64 where the device has it; exactly whole where within 0.001 of
            a whole time.
        """
        log_sigmas = self._log_sigmas(sigma.device)
        log_sigma = sigma.to(log_sigmas.dtype).clamp(min=1e-10).log()
        high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, self.num_train_timesteps - 1)
        low = high - 1
        weight = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        t = low + weight.clamp(0, 1)
        whole = t.round()
        return torch.where((t - whole).abs() < _SNAP, whole, t)

    def quantile(self, u: float) -> int:
        """Return the training time below which the share u of all times lies."""
        return min(int(u * self.num_train_timesteps), self.num_train_timesteps - 1)

    def draw_time(self, generator: torch.Generator) -> int:
        """Draw a training time, each as likely as any other."""
        return int(torch.randint(self.num_train_timesteps, (1,), generator=generator))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse images to training times: the network's input, variance-preserving.

        Args:
            x0: ``(B, ...)`` images or latents.
            noise: Standard normal, of the same shape.
            t: ``(B,)`` times.
        """
        signal, amount = self._coefficients(t, x0)
        return signal * x0 + amount * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return v, the derivative of the diffused image by its angle (arXiv 2202.00512)."""
        signal, amount = self._coefficients(t, x0)
        return signal * noise - amount * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict; arguments as in `add_noise`."""
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.velocity(x0, noise, t)
            case "sample":
                return x0

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ``1 / sigma**2`` at times ``(B,)``, float32."""
        return self.t_to_sigma(t).pow(-2).float()

    def input_scale(self, sigma: Tensor) -> Tensor:
        """Return what the samplers' state is multiplied by to be the network's input."""
        return (1 + sigma**2).rsqrt()

    def sampling_sigmas(self, steps: int, spacing: Spacing, grid: Grid | None = None) -> Tensor:
        """Return the noise levels that sampling visits.

        ``leading``, ``trailing`` and ``linspace`` are those of table 2 of Lin et al.
        (arXiv 2305.08891); ``karras`` is equation 5 of Karras et al. (arXiv 2206.00364), rho = 7,
        between the schedule's first and last sigma; ``exponential`` is even in log sigma between
        them. ``sgm_uniform``, so called by the web UIs, is even in time, laid for one step more
        without its lowest time.

        Args:
            steps: Number of steps, from 1 to the number of training times.
            spacing: How the levels are laid.
            grid: The sampler's conventions.

        Returns:
            ``(steps + 1,)`` float32, falling; the last is 0, or the schedule's first sigma if it
            says ``set_alpha_to_one: false``.

        Raises:
            RequestError: If there is no such spacing or the number of steps is out of range.
        """
        grid = grid or Grid()
        check_spacing(steps, most_steps(self.num_train_timesteps, spacing, grid), spacing)
        if spacing in ("karras", "exponential"):
            sigmas = curve(spacing, steps, self.sigmas[-1].item(), self.sigmas[0].item())
        elif spacing == "sgm_uniform":
            last_time = self.num_train_timesteps - 1
            sigmas = self.t_to_sigma(torch.linspace(last_time, 0, steps + 1, dtype=torch.float64))
            sigmas = sigmas[:-1]
        else:
            times = self._times(steps, spacing, grid)
            low, high = times.floor().long(), times.ceil().long()
            sigmas = torch.lerp(self.sigmas[low], self.sigmas[high], times - low)
        ends_at_zero = grid.to_zero or self.config.set_alpha_to_one
        end = torch.zeros(1) if ends_at_zero else self.sigmas[:1]
        return torch.cat([sigmas, end]).float()

    def distilled_times(self) -> Tensor:
        """Return the times between which latent consistency models are distilled.

        Returns:
            ``(51,)`` float64, rising: 0, and then ``k - 1``, ``2 k - 1``, … with k a fiftieth of
            the training times, rounded down (arXiv 2310.04378, section 4.3; k = 20 of 1000).
        """
        skipped = self.num_train_timesteps // min(DISTILLED_STEPS, self.num_train_timesteps)
        count = min(DISTILLED_STEPS, self.num_train_timesteps)
        return (torch.arange(count + 1, dtype=torch.float64) * skipped - 1).clamp(min=0)

    def start_scale(self, sigma: float | Tensor) -> float:
        """Return what standard normal noise is multiplied by to start sampling at ``sigma``."""
        return unit_variance(sigma)

    def _times(self, steps: int, spacing: Spacing, grid: Grid) -> Tensor:
        total, laid = self.num_train_timesteps, steps + grid.spare
        count = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing" and grid.distilled:
            return evenly(self.distilled_times()[1:], steps)
        if spacing == "trailing":
            return (total - count * (total / steps)).round() - 1
        if spacing == "leading":
            times = (laid - 1 - count) * (total // laid)
            # all steps of all training times leave no room above the highest
            return times + min(self.config.steps_offset, total - 1 - int(times[0]))
        times = torch.linspace(total - 1, 0, laid, dtype=torch.float64)[:steps]
        return times.round() if grid.whole else times

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.t_to_sigma(t).view(-1, *[1] * (like.ndim - 1))
        signal = (1 + sigma**2).rsqrt()
        return signal.to(like.dtype), (sigma * signal).to(like.dtype)

    def _log_sigmas(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            # Apple's GPUs have no float64; float32 is still good to a tenth of _SNAP
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._tables[device] = self.sigmas.log().to(dtype).to(device)
        return self._tables[device]


def unit_variance(sigma: float | Tensor) -> float:
    """Return ``sqrt(1 + sigma**2)``, the deviation of the samplers' state.

    The network was trained on images under noise, so the start has the variance of the noise and,
    in its place, of an image.
    """
    return math.sqrt(1 + float(sigma) ** 2)


def evenly(times: Tensor, steps: int) -> Tensor:
    """Choose so many of rising times, from the last down, about evenly by their places."""
    places = torch.arange(steps) * len(times) // steps
    return times.flip(0)[places]


def most_steps(num_train_timesteps: int, spacing: str, grid: Grid) -> int:
    """Return how many steps a spacing has room for."""
    if spacing == "trailing" and grid.distilled:
        return min(DISTILLED_STEPS, num_train_timesteps)
    return num_train_timesteps - grid.spare


def check_spacing(steps: int, most: int, spacing: str) -> None:
    """Raise a RequestError if there is no such spacing, or it has not so many steps."""
    if not 1 <= steps <= most:
        raise RequestError(f"steps: must be from 1 to {most}, got {steps}")
    if spacing not in SPACINGS:
        raise RequestError(f"no spacing {spacing!r}; {nearest(spacing, SPACINGS)}")


def curve(
    spacing: Literal["karras", "exponential"], steps: int, first: float, last: float
) -> Tensor:
    """Lay ``(steps,)`` float64 levels between two; see `NoiseSchedule.sampling_sigmas`."""
    if spacing == "karras":
        return torch.linspace(first ** (1 / 7), last ** (1 / 7), steps, dtype=torch.float64) ** 7
    return torch.linspace(math.log(first), math.log(last), steps, dtype=torch.float64).exp()


def _alphas_cumprod(config: ScheduleConfig) -> Tensor:
    steps = config.num_train_timesteps
    start, end = config.beta_start, config.beta_end
    match config.beta_schedule:
        case "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        case "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        case "cosine":
            u = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def _sigmas(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def _end_in_noise(sigmas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) to 0 at the last time; the first stays as it is."""
    root = (1 + sigmas**2).rsqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    below = int((root > 1 / MAX_SIGMA).sum()) - 1
    # 0 itself has no sigma. Where rescaled times come nearer to it than the largest sigma does
    # (the last three of DDPM's linear schedule), they rise to that evenly in log sigma.
    log_sigmas = _sigmas(root[: below + 1] ** 2).log()
    tail = torch.linspace(
        log_sigmas[-1].item(), math.log(MAX_SIGMA), len(sigmas) - below, dtype=torch.float64
    )
    return torch.cat([log_sigmas, tail[1:]]).exp()
