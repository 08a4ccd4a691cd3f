"""From noise to an image: samplers are pure functions, and these are their names.

Each is ``(denoise, x, sigmas, rng, *, callback=None, **options) -> x`` and knows neither network
nor model. The state ``x = x0 + sigma * eps`` is variance-exploding and float32 or better; step i
goes from ``sigmas[i]`` to ``sigmas[i + 1]``. If the last level is above 0 the result is
``x / sqrt(1 + sigma**2)``, as samplers that preserve variance leave it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mezzotint.diffusion.flow import Schedule
from mezzotint.diffusion.multistep import dpmpp_2m, lms, plms, unipc
from mezzotint.diffusion.schedule import Grid, Spacing
from mezzotint.diffusion.single_step import (
    Callback,
    Denoise,
    NoiseSource,
    consistency,
    dpm2,
    dpmpp_sde,
    euler,
    heun,
)
from mezzotint.errors import RequestError, nearest

__all__ = [
    "SAMPLERS",
    "Callback",
    "Denoise",
    "NoiseSource",
    "SamplerInfo",
    "consistency",
    "dpm2",
    "dpmpp_2m",
    "dpmpp_sde",
    "euler",
    "get_sampler",
    "heun",
    "lms",
    "plms",
    "unipc",
]


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """A sampler by name: the function, what it is set to, and what may be asked of it.

    Attributes:
        name: Its name, a key of `SAMPLERS`.
        function: The pure function, set to what the name stands for.
        description: One line for people.
        order: Order of convergence in the number of steps: of the image, or for a stochastic one
            of the mean and variance that it gives Gaussian data.
        options: Names of the options that can be given.
        grid: Conventions of its noise levels.
        default_spacing: The spacing used when a request names none.
        calls_per_step: Network calls per step (``plms`` makes one more in the first; those that
            make two make one in the last, if it ends at 0).
        stochastic: Whether it draws noise on the way unless an option says otherwise.
        distilled: Whether it is for networks alone that were distilled for it, and asks a
            `mezzotint.diffusion.consistency.ConsistencyFunction`.
    """

    name: str
    function: Callable[..., Tensor]
    description: str
    order: int
    options: tuple[str, ...] = ()
    grid: Grid = field(default_factory=Grid)
    default_spacing: Spacing = "trailing"
    calls_per_step: int = 1
    stochastic: bool = False
    distilled: bool = False

    def sigmas(self, schedule: Schedule, steps: int, spacing: Spacing | None = None) -> Tensor:
        """Return the noise levels ``(steps + 1,)`` that this sampler visits.

        Raises:
            RequestError: If the number of steps is out of range.
        """
        return schedule.sampling_sigmas(steps, spacing or self.default_spacing, self.grid)


_K_GRID = Grid(whole=False, to_zero=True)
_DPM_GRID = Grid(spare=True, to_zero=True)

SAMPLERS: dict[str, SamplerInfo] = {
    info.name: info
    for info in (
        SamplerInfo(
            name="ddpm",
            function=partial(euler, eta=1.0),
            grid=Grid(to_zero=True),
            order=1,
            stochastic=True,
            description="Ho et al. 2020, small fixed variance: many steps, much variety",
        ),
        SamplerInfo(
            name="ddim",
            function=euler,
            options=("eta",),
            order=1,
            description="Song et al. 2020: deterministic unless eta says otherwise",
        ),
        SamplerInfo(
            name="euler",
            function=partial(euler, eta=0.0),
            grid=_K_GRID,
            order=1,
            description="Euler's method on the probability flow: the plainest",
        ),
        SamplerInfo(
            name="euler_ancestral",
            function=partial(euler, eta=1.0),
            options=("eta",),
            grid=_K_GRID,
            order=1,
            stochastic=True,
            description="Euler's method with fresh noise at each step",
        ),
        SamplerInfo(
            name="plms",
            function=plms,
            options=("multistep",),
            order=2,
            description="Liu et al. 2022: four noise estimates combined in DDIM's step",
        ),
        SamplerInfo(
            name="heun",
            function=heun,
            grid=_K_GRID,
            order=2,
            calls_per_step=2,
            description="Heun's method: two network calls a step, second order",
        ),
        SamplerInfo(
            name="dpmpp_2m",
            function=partial(dpmpp_2m, eta=0.0),
            options=("lower_order_final",),
            grid=_DPM_GRID,
            order=2,
            description="DPM-Solver++ of second order: good pictures in 10 to 25 steps",
        ),
        SamplerInfo(
            name="dpmpp_2m_sde",
            function=partial(dpmpp_2m, eta=1.0),
            options=("eta", "lower_order_final"),
            grid=_DPM_GRID,
            order=2,
            stochastic=True,
            description="DPM-Solver++ of second order with fresh noise at each step",
        ),
        SamplerInfo(
            name="dpmpp_sde",
            function=dpmpp_sde,
            options=("eta",),
            grid=_K_GRID,
            order=2,
            calls_per_step=2,
            stochastic=True,
            description="DPM-Solver++ of single steps with fresh noise: two network calls a step",
        ),
        SamplerInfo(
            name="dpm2",
            function=partial(dpm2, eta=0.0),
            grid=_K_GRID,
            order=2,
            calls_per_step=2,
            description="DPM-Solver-2, the midpoint method: two network calls a step",
        ),
        SamplerInfo(
            name="dpm2_ancestral",
            function=partial(dpm2, eta=1.0),
            options=("eta",),
            grid=_K_GRID,
            order=2,
            calls_per_step=2,
            stochastic=True,
            description="The midpoint method with fresh noise at each step",
        ),
        SamplerInfo(
            name="lms",
            function=lms,
            options=("max_order",),
            grid=_K_GRID,
            order=2,
            description="Linear multistep: up to four slopes combined",
        ),
        SamplerInfo(
            name="unipc",
            function=unipc,
            options=("max_order",),
            grid=_DPM_GRID,
            order=2,
            description="UniPC: a predictor and a corrector for one network call a step",
        ),
        SamplerInfo(
            name="lcm",
            function=consistency,
            options=("eta",),
            grid=Grid(to_zero=True, distilled=True),
            order=1,
            stochastic=True,
            distilled=True,
            description="Consistency sampling, for models that were distilled for few steps",
        ),
    )
}


def get_sampler(name: str) -> SamplerInfo:
    """Look a sampler up.

    Raises:
        RequestError: If there is none of that name; the message lists those there are.
    """
    if name not in SAMPLERS:
        raise RequestError(f"no sampler {name!r}; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
