"""Euler's steps along a flow against diffusers' FlowMatchEulerDiscreteScheduler, step by step."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.flow import FlowSchedule, FlowScheduleConfig
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.rng import SampleNoise

SHAPE = (3, 6, 5)
NOISE = SampleNoise([3, 4]).normal(SHAPE)
SHIFTS = (1.0, 3.0, 0.7)


def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
    """Smooth and nonlinear in the image and the time; each pixel sees its neighbour."""
    u = t.view(-1, 1, 1, 1) / 1000
    return 0.5 * torch.sin(0.8 * x + 3 * u) + 0.4 * torch.tanh(x.roll(1, -1) - u) * torch.cos(5 * u)


def run_theirs(scheduler: FlowMatchEulerDiscreteScheduler, x: Tensor) -> list[Tensor]:
    states: list[Tensor] = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2), None), t, x).prev_sample
        states.append(x)
    return states


def run_ours(sampler: str, schedule: FlowSchedule, sigmas: Tensor) -> list[Tensor]:
    """The states on the path of the flow."""
    denoiser, states = Denoiser(network, schedule), list[Tensor]()
    SAMPLERS[sampler].function(
        lambda x, sigma: denoiser(x, sigma, None),
        NOISE * (1 + sigmas[0]),
        sigmas,
        SampleNoise([3, 4]),
        callback=lambda step, steps, x, denoised: states.append(x),
    )
    return [x / (1 + sigma) for x, sigma in zip(states, sigmas[1:], strict=True)]


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_step_is_that_of_diffusers(shift: float, steps: int, sampler: str) -> None:
    schedule = FlowSchedule(FlowScheduleConfig(shift=shift))
    sigmas = schedule.sampling_sigmas(steps, "linspace")
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(theirs.sigmas[1:], (sigmas / (1 + sigmas))[1:], rtol=1e-5, atol=0)
    # their first time is 1, for which ours has 4096 / 4097; the last test says what that changes
    theirs.sigmas[0] = 4096 / 4097
    theirs.timesteps = 1000 * theirs.sigmas[:-1]
    for ours, other in zip(
        run_ours(sampler, schedule, sigmas), run_theirs(theirs, NOISE), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", SHIFTS)
def test_trailing_is_what_pipelines_ask_of_it(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12))
    sigmas = FlowSchedule(FlowScheduleConfig(shift=shift)).sampling_sigmas(12, "trailing")
    torch.testing.assert_close(theirs.sigmas[1:], (sigmas / (1 + sigmas))[1:], rtol=1e-5, atol=0)


def test_a_first_time_of_1_is_ours_to_a_part_in_4096() -> None:
    """Untouched, theirs begins at t = 1. The network changes by less than 10 in t, 3 in x."""
    schedule = FlowSchedule(FlowScheduleConfig(shift=3.0))
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(20)
    assert theirs.sigmas[0] == 1
    ours = run_ours("euler", schedule, schedule.sampling_sigmas(20, "linspace"))
    for a, b in zip(ours, run_theirs(theirs, NOISE), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 / 4096)
