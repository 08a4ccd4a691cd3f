"""Every sampler against the diffusers scheduler of its name, compared after each step.

Both sides get the same network, start and noise. Where theirs is variance-preserving its sample
is held against ``x / sqrt(1 + sigma**2)``; where theirs is variance-exploding both are divided by
that. Differences are float32 rounding, theirs mostly: they build schedules in float32, where
1 - alphas_cumprod keeps four to five digits at the first times. So 1e-4 of the largest value.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from mezzotint.diffusion.consistency import ConsistencyFunction
from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import Grid, NoiseSchedule, ScheduleConfig
from mezzotint.rng import SampleNoise

# numpy says so of a torch tensor that diffusers gives to np.array
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

TOLERANCE = 1e-4
SHAPE = (3, 6, 5)
RNG = SampleNoise([3, 4])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLAT = ("leading", "trailing", "linspace")
ALL = (*FLAT, "karras")
# The times of "exponential" are fractions, which their DPM and UniPC solvers cut off, and those of
# "karras" too, which DPM2 rounds in the first half of a step alone: there is nothing to compare.
K_ALL, DPM2_ALL = (*ALL, "exponential"), (*FLAT, "exponential")


def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
    """Smooth and nonlinear in the image and the time; each pixel sees its neighbour."""
    u = t.view(-1, 1, 1, 1) / 1000
    return 0.5 * torch.sin(0.8 * x + 3 * u) + 0.4 * torch.tanh(x.roll(1, -1) - u) * torch.cos(5 * u)


@dataclass(frozen=True)
class Case:
    name: str
    scheduler: type[Any]
    spacings: tuple[str, ...]
    predictions: tuple[str, ...]
    variance_exploding: bool = False
    theirs: tuple[tuple[str, Any], ...] = ()  # settings of the scheduler
    step: tuple[tuple[str, Any], ...] = ()  # arguments of its step
    options: tuple[tuple[str, Any], ...] = ()  # options of our function
    set_alpha_to_one: bool = True
    grid: Grid | None = None
    label: str = ""


EPS_V = ("epsilon", "v_prediction")
EVERY = (*EPS_V, "sample", "v_zero_snr")
CLIP = (("clip_sample", False),)
SDE = (("algorithm_type", "sde-dpmsolver++"),)
CASES = (
    Case("ddpm", DDPMScheduler, FLAT, EVERY, theirs=(*CLIP, ("variance_type", "fixed_small"))),
    Case("ddim", DDIMScheduler, FLAT, EVERY, theirs=CLIP),
    Case(
        "ddim",
        DDIMScheduler,
        FLAT,
        EVERY,
        theirs=CLIP,
        step=(("eta", 1.0),),
        options=(("eta", 1.0),),
        label="eta1",
    ),
    Case(
        "ddim",
        DDIMScheduler,
        FLAT,
        EPS_V,
        theirs=(*CLIP, ("set_alpha_to_one", False)),
        set_alpha_to_one=False,
        step=(("eta", 0.5),),
        options=(("eta", 0.5),),
        label="ends-above-0-eta0.5",
    ),
    Case("euler", EulerDiscreteScheduler, K_ALL, EVERY, variance_exploding=True),
    Case(
        "euler_ancestral",
        EulerAncestralDiscreteScheduler,
        FLAT,
        (*EPS_V, "v_zero_snr"),
        variance_exploding=True,
    ),
    Case(
        "plms",
        PNDMScheduler,
        FLAT,
        EPS_V,
        theirs=(("skip_prk_steps", True), ("set_alpha_to_one", True)),
    ),
    Case(
        "plms",
        PNDMScheduler,
        FLAT,
        EPS_V,
        theirs=(("skip_prk_steps", True), ("set_alpha_to_one", False)),
        set_alpha_to_one=False,
        label="ends-above-0",
    ),
    Case(
        "heun",
        HeunDiscreteScheduler,
        K_ALL,
        (*EPS_V, "sample"),
        variance_exploding=True,
        theirs=CLIP,
    ),
    Case("dpm2", KDPM2DiscreteScheduler, DPM2_ALL, EPS_V, variance_exploding=True),
    Case(
        "dpm2_ancestral", KDPM2AncestralDiscreteScheduler, DPM2_ALL, EPS_V, variance_exploding=True
    ),
    Case("lms", LMSDiscreteScheduler, K_ALL, (*EPS_V, "sample"), variance_exploding=True),
    *(
        Case(
            "unipc",
            UniPCMultistepScheduler,
            ALL,
            EVERY,
            theirs=(("solver_order", order),),
            options=(("max_order", order),),
            label=f"order-{order}",
        )
        for order in (1, 2, 3)
    ),
    Case("dpmpp_2m", DPMSolverMultistepScheduler, ALL, EVERY),
    Case("dpmpp_2m_sde", DPMSolverMultistepScheduler, ALL, EVERY, theirs=SDE),
    *(
        Case(
            name,
            DPMSolverMultistepScheduler,
            ALL,
            EPS_V,
            theirs=(
                *extra,
                ("final_sigmas_type", "sigma_min"),
                ("lower_order_final", lower),
            ),
            options=(("lower_order_final", lower),),
            set_alpha_to_one=False,
            grid=Grid(spare=True),
            label=f"ends-above-0-lower-order-final-{lower}",
        )
        for name, extra in (("dpmpp_2m", ()), ("dpmpp_2m_sde", SDE))
        for lower in (True, False)
    ),
)


def combinations() -> Iterator[Any]:
    for case in CASES:
        for steps in (10, 50):
            for spacing in case.spacings:
                for prediction in case.predictions:
                    parts = (case.name, case.label, str(steps), spacing, prediction)
                    yield pytest.param(
                        case, steps, spacing, prediction, id="-".join(filter(None, parts))
                    )


def make_theirs(case: Case, spacing: str, prediction: str) -> Any:
    settings: dict[str, Any] = {**BETAS, **dict(case.theirs), "steps_offset": 1}
    settings["prediction_type"] = prediction.replace("v_zero_snr", "v_prediction")
    settings["timestep_spacing"] = spacing if spacing in FLAT else "linspace"
    if spacing not in FLAT:
        settings[f"use_{spacing}_sigmas"] = True
    if prediction == "v_zero_snr":
        settings["rescale_betas_zero_snr"] = True
    scheduler = case.scheduler(**settings)
    if prediction == "v_zero_snr":
        # theirs of the Euler and DPM families have this in place of 0, as ours all have;
        # test_zero_of_ddim_and_ddpm says what it changes for DDIM and DDPM, which have 0
        scheduler.alphas_cumprod[-1] = 2**-24
    return scheduler


def make_ours(case: Case, prediction: str) -> NoiseSchedule:
    return NoiseSchedule(
        ScheduleConfig(
            prediction_type=prediction.replace("v_zero_snr", "v_prediction"),
            zero_terminal_snr=prediction == "v_zero_snr",
            steps_offset=1,
            set_alpha_to_one=case.set_alpha_to_one,
        )
    )


def run_theirs(
    case: Case, scheduler: Any, x: Tensor, steps: int, feed: Callable[[int], None]
) -> list[Tensor]:
    """The sample after each whole step."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        # or they look the first time up, and of two that are rounded to one take the second
        scheduler.set_begin_index(0)
    times = scheduler.timesteps
    samples: list[Tensor] = []
    for call, t in enumerate(times):
        # PNDM calls twice in the first step, Heun and DPM2 twice in all but the last
        halves = SAMPLERS[case.name].calls_per_step == 2
        step = max(call - 1, 0) if case.name == "plms" else call // 2 if halves else call
        feed(step)
        if case.name in ("ddim", "plms") and scheduler.config.timestep_spacing == "linspace":
            aim_at_next(scheduler, steps, step)
        output = network(scheduler.scale_model_input(x, t), t.float().expand(2), None)
        x = scheduler.step(output, t, x, **dict(case.step)).prev_sample
        half = call == 0 if case.name == "plms" else halves and call % 2 == 0
        if not half or call == len(times) - 1:
            samples.append(x)
    return samples


def aim_at_next(scheduler: Any, steps: int, step: int) -> None:
    """Let DDIM and PNDM jump to the grid's next time.

    They jump by 1000 // steps whatever the spacing. On the linspace grid (999, 888, ...) the
    sample then stands at another time (899) than the one at which the network is asked next, so
    as it is there is no noise level at which the two could be compared. The jump is made from
    `num_inference_steps` alone; give it the number that makes it the grid's.
    """
    grid = torch.linspace(0, 999, steps, dtype=torch.float64).round().long().flip(0).tolist()
    if step + 1 < steps:
        gap = grid[step] - grid[step + 1]
        scheduler.num_inference_steps = 1000 // gap
        assert 1000 // scheduler.num_inference_steps == gap


def start(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    return RNG.normal(SHAPE) * schedule.start_scale(sigmas[0])


def run_ours(
    case: Case, schedule: NoiseSchedule, sigmas: Tensor, *, whole_times: bool
) -> list[Tensor]:
    denoiser = Denoiser(network, schedule, whole_times=whole_times)
    states: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, None)

    sampler = SAMPLERS[case.name]
    result = sampler.function(
        ConsistencyFunction(denoise, schedule) if sampler.distilled else denoise,
        start(schedule, sigmas),
        sigmas,
        RNG,
        callback=lambda step, total, x, denoised: states.append(x),
        **dict(case.options),
    )
    scaled = [x / math.sqrt(1 + sigma**2) for x, sigma in zip(states, sigmas[1:], strict=True)]
    assert torch.equal(result, scaled[-1])
    return scaled


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give every scheduler our noise of the step that is set by calling the fixture."""
    now = [0]

    def noise(shape: Any, **_: Any) -> Tensor:
        assert tuple(shape[1:]) == SHAPE
        return RNG.normal(SHAPE, now[0])

    modules = ["ddpm", "ddim", "euler_ancestral_discrete", "dpmsolver_multistep"]
    modules += ["k_dpm_2_ancestral_discrete", "lcm"]
    for module in modules:
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", noise)
    return lambda step: now.__setitem__(0, step)


@pytest.mark.parametrize(("case", "steps", "spacing", "prediction"), list(combinations()))
def test_every_step_is_that_of_diffusers(
    case: Case, steps: int, spacing: str, prediction: str, feed: Callable[[int], None]
) -> None:
    schedule = make_ours(case, prediction)
    grid = case.grid or SAMPLERS[case.name].grid
    sigmas = schedule.sampling_sigmas(steps, spacing, grid)
    if case.name == "plms":
        # PNDMScheduler combines what the network predicts, whatever that is
        case = replace(case, options=(*case.options, ("multistep", prediction)))
    x = start(schedule, sigmas)
    if not case.variance_exploding:
        x = x / math.sqrt(1 + sigmas[0] ** 2)
    theirs = run_theirs(case, make_theirs(case, spacing, prediction), x, steps, feed)
    if case.variance_exploding:
        theirs = [x / math.sqrt(1 + sigma**2) for x, sigma in zip(theirs, sigmas[1:], strict=True)]
    # their DPM solvers tell the network whole times though Karras noise levels lie between
    whole_times = case.name.startswith("dpmpp") or case.name == "unipc"
    ours = run_ours(case, schedule, sigmas, whole_times=whole_times)
    assert len(ours) == len(theirs) == steps
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= TOLERANCE, errors


@pytest.mark.parametrize("prediction", EPS_V)
@pytest.mark.parametrize("steps", [1, 4, 7, 50, None])
def test_lcm_is_that_of_diffusers(
    steps: int | None, prediction: str, feed: Callable[[int], None]
) -> None:
    """At its own times, and at some near 0, where the input itself weighs in."""
    settings = {"prediction_type": prediction, "steps_offset": 1, "clip_sample": False}
    theirs = LCMScheduler(**BETAS, **settings)
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    if steps is None:
        theirs.set_timesteps(timesteps=[999, 19, 1, 0])
        sigmas = torch.cat([schedule.t_to_sigma(theirs.timesteps), torch.zeros(1)]).float()
    else:
        theirs.set_timesteps(steps)
        sigmas = SAMPLERS["lcm"].sigmas(schedule, steps)
    x = start(schedule, sigmas) / math.sqrt(1 + sigmas[0] ** 2)
    case = Case("lcm", LCMScheduler, FLAT, EPS_V)
    ours = run_ours(case, schedule, sigmas, whole_times=False)
    for step, t in enumerate(theirs.timesteps):
        feed(step)
        output = network(x, t.float().expand(2), None)
        x = theirs.step(output, t, x).prev_sample
        assert relative_error(ours[step], x) <= TOLERANCE, step


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_linspace_ddim_step_as_it_is(steps: int, eta: float, feed: Callable[[int], None]) -> None:
    """Untouched, each step of theirs is ours to the time that it jumps to (see aim_at_next)."""
    theirs = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule(ScheduleConfig())
    denoiser = Denoiser(network, schedule)
    x = RNG.normal(SHAPE)
    for step, t in enumerate(theirs.timesteps):
        feed(0)  # ours is a run of one step, so its noise is that of step 0
        aim = t - 1000 // steps
        sigma = schedule.t_to_sigma(t)
        following = schedule.t_to_sigma(aim) if aim >= 0 else torch.zeros(())
        ours = SAMPLERS["ddim"].function(
            lambda x, sigma: denoiser(x, sigma, None),
            x * schedule.start_scale(sigma),
            torch.stack([sigma, following]).float(),
            RNG,
            eta=eta,
        )
        x = theirs.step(network(x, t.float().expand(2), None), t, x, eta=eta).prev_sample
        assert relative_error(ours, x) <= TOLERANCE, step


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_of_ddim_and_ddpm(name: str, feed: Callable[[int], None]) -> None:
    """These two start from alphas_cumprod = 0; ours from 2**-24, a sigma of 4096 and not infinite.

    That turns DDIM's first step by 1/4096 radian. The ancestral step keeps sigma' / sigma of the
    sample, where theirs keeps nothing. Norms are about 1, and later steps only forget.
    """
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[name]
    case = Case(name, scheduler, FLAT, EVERY, theirs=CLIP)
    schedule = make_ours(case, "v_zero_snr")
    sigmas = SAMPLERS[name].sigmas(schedule, 50, "trailing")
    theirs = make_theirs(case, "trailing", "v_zero_snr")
    theirs.alphas_cumprod[-1] = 0
    x = start(schedule, sigmas) / math.sqrt(1 + sigmas[0] ** 2)
    pairs = zip(
        run_ours(case, schedule, sigmas, whole_times=False),
        run_theirs(case, theirs, x, 50, feed),
        strict=True,
    )
    bound = 1 / 4096 if name == "ddim" else 1.1 * (sigmas[1] / sigmas[0]).item()
    assert max(relative_error(a, b) for a, b in pairs) <= bound


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_schedules_are_those_of_diffusers(name: str, zero_snr: bool) -> None:
    theirs = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0005,
        beta_end=0.015,
        beta_schedule="squaredcos_cap_v2" if name == "cosine" else name,
        rescale_betas_zero_snr=zero_snr,
    )
    ours = NoiseSchedule(
        ScheduleConfig(
            beta_schedule=name,
            beta_start=0.0005,
            beta_end=0.015,
            zero_terminal_snr=zero_snr,
            prediction_type="v_prediction",
        )
    )
    # 1e-6: a thousand float32 products on their side
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
