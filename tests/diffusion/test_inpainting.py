"""What is known stays, whatever the sampler; and the rest is drawn as if the state had it."""

import math

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.inpainting import HoldKnown
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mezzotint.rng import SampleNoise


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser in which neighbours matter: the mean of a smooth image's posterior, about."""
    level = sigma.view(-1, 1, 1, 1)
    smooth = (x + x.roll(1, 2) + x.roll(1, 3)) / 3
    return torch.tanh(smooth / (1 + level))


def case() -> tuple[NoiseSchedule, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 2:6, 3:8] = 1
    return NoiseSchedule(ScheduleConfig()), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), mask


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_is_known_stays(name: str) -> None:
    schedule, known, noise, mask = case()
    sampler = SAMPLERS[name]
    sigmas = sampler.sigmas(schedule, 6)
    hold = HoldKnown(denoise, known, noise, mask)
    start = known + sigmas[0] * noise
    drawn = hold.keep(sampler.function(hold, start, sigmas, SampleNoise([1, 2])))
    assert torch.equal(torch.where(mask > 0.5, known, drawn), known)
    assert (drawn - known).abs()[:, :, 2:6, 3:8].mean() > 0.1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_with_all_to_draw_it_is_plain_sampling(name: str) -> None:
    schedule, known, noise, mask = case()
    sampler = SAMPLERS[name]
    sigmas = sampler.sigmas(schedule, 6)
    hold = HoldKnown(denoise, known, noise, torch.ones_like(mask))
    start = noise * schedule.start_scale(sigmas[0])
    drawn = sampler.function(hold, start, sigmas, SampleNoise([1, 2]))
    plain = sampler.function(denoise, start, sigmas, SampleNoise([1, 2]))
    assert torch.equal(drawn, plain)


@pytest.mark.parametrize("free", [False, True])
def test_it_is_ddim_with_the_state_put_right_after_each_step(free: bool) -> None:
    """The loop of Lugmayr et al., in variance-preserving coordinates, written out."""
    schedule, known, noise, mask = case()
    sampler = SAMPLERS["ddim"]
    sigmas = sampler.sigmas(schedule, 8)
    start = noise * schedule.start_scale(sigmas[0]) if free else known + sigmas[0] * noise
    hold = HoldKnown(denoise, known, noise, mask, free_level=sigmas[0].item() if free else None)
    drawn = hold.keep(sampler.function(hold, start, sigmas, SampleNoise([1, 2])))

    x = start / math.sqrt(1 + sigmas[0].item() ** 2)
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        a, b = (1 / math.sqrt(1 + s**2) for s in (sigma, following))
        x0 = denoise(x / a, torch.full((2,), sigma))
        eps = (x - a * x0) / (a * sigma)
        x = b * x0 + b * following * eps
        x = torch.where(mask > 0.5, x, b * known + b * following * noise)
    torch.testing.assert_close(drawn, x, atol=2e-5, rtol=1e-4)
