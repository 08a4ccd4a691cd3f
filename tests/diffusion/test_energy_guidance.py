"""Energies against what Bayes' rule says of normal data, in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning.base import Conditioning
from mezzotint.diffusion.energy_guidance import EnergyGuidance
from mezzotint.diffusion.guidance import ClassifierFreeGuidance
from mezzotint.diffusion.proximal import pull_towards
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mezzotint.rng import SampleNoise

STD = 0.7  # of the data
TARGET = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


def gaussian(x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
    """The exact denoiser of data ~ N(0, STD**2)."""
    return x * STD**2 / (STD**2 + column(sigma) ** 2)


def low_res(deviation: float):
    def energy(x0: Tensor) -> Tensor:
        far = F.avg_pool2d(x0, x0.shape[-1] // 4) - TARGET
        return far.square().sum((1, 2, 3)) / (2 * deviation**2)

    return energy


def draw(guided, count: int, *, sampler: str = "ddim", steps: int = 50):
    info, schedule = SAMPLERS[sampler], NoiseSchedule(ScheduleConfig())
    sigmas, rng = info.sigmas(schedule, steps), SampleNoise(range(count))
    start = rng.normal((3, 16, 16)) * schedule.start_scale(sigmas[0])
    with torch.inference_mode():
        return info.function(lambda x, sigma: guided(x, sigma, None), start, sigmas, rng)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    return -10 * (((images - target) / 2) ** 2).mean((1, 2, 3)).log10()


@pytest.mark.parametrize("through_network", [True, False])
@pytest.mark.parametrize("deviation", [0.3, 0.05])
def test_the_mean_is_the_posteriors(deviation: float, through_network: bool) -> None:
    """For normal data every step is affine in the noise, so that no noise gives the mean."""
    guided = EnergyGuidance(
        gaussian, low_res(deviation), data_std=STD, through_network=through_network
    )
    # from far out, where what y says of the noise no longer matters
    levels = torch.cat([torch.logspace(3, -3, 60), torch.zeros(1)])
    with torch.inference_mode():
        mean = SAMPLERS["euler"].function(
            lambda x, sigma: guided(x, sigma, None),
            torch.zeros(1, 3, 16, 16),
            levels,
            SampleNoise([0]),
        )
    prior = STD**2 / 16  # variance of the mean of 4x4 pixels
    expected = TARGET * prior / (prior + deviation**2)
    torch.testing.assert_close(F.avg_pool2d(mean, 4), expected, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_variance_is_the_posteriors(sampler: str) -> None:
    deviation = 0.2
    drawn = draw(
        EnergyGuidance(gaussian, low_res(deviation), data_std=STD), 64, sampler=sampler, steps=100
    )
    small = F.avg_pool2d(drawn, 4)
    prior = STD**2 / 16
    expected = math.sqrt(prior * deviation**2 / (prior + deviation**2))
    assert small.std(0).square().mean().sqrt().item() == pytest.approx(expected, rel=0.08)
    # what the energy says nothing of varies as without it
    rest = drawn - F.interpolate(small, scale_factor=4)
    assert rest.std().item() == pytest.approx(STD * math.sqrt(15 / 16), rel=0.08)


@pytest.mark.parametrize("deviation", [1e-3, 1e-6])
def test_no_scale_is_too_large(deviation: float) -> None:
    chance = psnr(F.avg_pool2d(draw(gaussian, 8), 4), TARGET)
    drawn = draw(EnergyGuidance(gaussian, low_res(deviation), data_std=STD), 8)
    assert chance.mean() < 15
    assert psnr(F.avg_pool2d(drawn, 4), TARGET).min() > 60


def test_a_single_gradient_overshoots_where_the_search_does_not() -> None:
    """Why the search is the default: the step of arXiv 2209.14687 has a largest scale."""
    drawn = draw(EnergyGuidance(gaussian, low_res(0.01), data_std=STD, method="gradient"), 2)
    assert not drawn.isfinite().all() or drawn.abs().max() > 100


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
SIGMA = torch.tensor([0.1, 1.0, 6.0])


def curved(x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
    """A denoiser that is not linear, and in which neighbours matter."""
    return torch.tanh(x + 0.3 * x.roll(1, 3)) / (1 + column(sigma))


def quartic(x0: Tensor) -> Tensor:
    return ((x0.square().mean((1, 2, 3)) - 0.3) ** 2) + 0.1 * x0[:, 0].sum((1, 2))


@pytest.mark.parametrize("root", [False, True])
def test_one_gradient_is_bayes_rule_on_the_estimate(root: bool) -> None:
    state = X.clone().requires_grad_()
    energy = quartic(curved(state, SIGMA)) + (5.0 if root else 0.0)
    value = energy.sqrt() if root else energy
    (gradient,) = torch.autograd.grad(value.sum(), state)
    expected = curved(X, SIGMA) - 1e-3 * column(SIGMA) ** 2 * gradient
    guided = EnergyGuidance(
        curved,
        lambda x0: quartic(x0) + (5.0 if root else 0.0),
        1e-3,
        method="gradient",
        root=root,
        data_std=100.0,  # so that the step's length is not the limit
    )
    torch.testing.assert_close(guided(X, SIGMA, None), expected)


def test_nothing_is_done_outside_the_interval_or_at_scale_0() -> None:
    def never(x0: Tensor) -> Tensor:
        raise AssertionError("the energy was asked")

    plain = curved(X, SIGMA)
    assert torch.equal(EnergyGuidance(curved, never, 0.0)(X, SIGMA, None), plain)
    outside = EnergyGuidance(curved, never, interval=(7.0, 9.0))
    assert torch.equal(outside(X, SIGMA, None), plain)
    some = EnergyGuidance(curved, quartic, interval=(0.1, 1.0))(X, SIGMA, None)
    everywhere = EnergyGuidance(curved, quartic)(X, SIGMA, None)
    assert torch.equal(some[[0, 2]], plain[[0, 2]])
    assert torch.equal(some[1], everywhere[1]) and not torch.equal(some[1], plain[1])


@pytest.mark.parametrize("through_network", [True, False])
def test_samples_do_not_see_one_another(through_network: bool) -> None:
    guided = EnergyGuidance(curved, quartic, 50.0, through_network=through_network)
    together = guided(X, SIGMA, None)
    for k in range(3):
        alone = guided(X[k : k + 1], SIGMA[k : k + 1], None)
        torch.testing.assert_close(alone[0], together[k], atol=1e-5, rtol=1e-5)


def test_a_steep_network_carries_nothing_away() -> None:
    """At high noise levels an error in the network's slope is multiplied by sigma squared."""

    def steep(x: Tensor, sigma: Tensor, cond: object) -> Tensor:
        return 0.1 * torch.sin(x)

    sigma = torch.full((3,), 4096.0)
    far = torch.full_like(X, 1e6)
    plain = steep(4096 * X, sigma, None)
    led = EnergyGuidance(steep, lambda x0: (x0 - 0.5).square().sum((1, 2, 3)))
    straight = EnergyGuidance(
        steep, lambda x0: (x0 - 0.5).square().sum((1, 2, 3)), through_network=False
    )
    moved = led(4096 * X, sigma, None) - plain
    limit = straight(4096 * X, sigma, None) - plain
    assert led(far, sigma, None).isfinite().all()
    assert (moved.flatten(1).norm(dim=1) <= 1.001 * limit.flatten(1).norm(dim=1)).all()


class Network(nn.Module):
    """A real network whose weights want gradients, and which is told a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Linear(2, 2), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        return self.conv(torch.tanh(x)).float() + self.embed(cond.vector)[..., None, None]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_leads_a_guided_denoiser_in_inference_mode(scale: float) -> None:
    network = Network()

    def run() -> Tensor:
        cond = Conditioning(vector=torch.ones(3, 2) / 2)
        null = Conditioning(vector=torch.zeros(3, 2))
        guided = ClassifierFreeGuidance(network, null, scale)
        return EnergyGuidance(guided, quartic)(X.clone(), SIGMA.clone(), cond)

    with torch.inference_mode():
        inside = run()
    outside = run()
    assert torch.equal(inside, outside) and not outside.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_it_leads_in_bfloat16() -> None:
    network, cond = Network(), Conditioning(vector=torch.ones(3, 2))

    def energy(x0: Tensor) -> Tensor:
        return 10 * (F.avg_pool2d(x0, 2) - 0.5).square().sum((1, 2, 3))

    guided = EnergyGuidance(network, energy)
    full = guided(X, SIGMA, cond)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = guided(X, SIGMA, cond)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.03, rtol=0.03)


def test_quadratic_energies_are_solved_exactly() -> None:
    """An average's energy bends in one way in two directions: two steps of conjugate gradients."""
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(4, 3, 16, 16, generator=generator)
    spread, deviation = torch.tensor([0.01, 0.2, 1.0, 1.0]).view(-1, 1, 1, 1), 0.05
    step = pull_towards(low_res(deviation), centre, spread, 2)
    gain = spread / (spread / 16 + deviation**2) / 16
    expected = gain * F.interpolate(TARGET - F.avg_pool2d(centre, 4), scale_factor=4)
    torch.testing.assert_close(step, expected, atol=2e-3, rtol=2e-3)


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e4),
    spread=st.floats(1e-4, 10),
    iterations=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_the_search_never_makes_worse(
    seed: int, scale: float, spread: float, iterations: int
) -> None:
    centre = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    variance = torch.full((2, 1, 1, 1), spread)

    def wavy(x0: Tensor) -> Tensor:
        return scale * (torch.sin(5 * x0) + 0.1 * x0**2).sum((1, 2, 3))

    def objective(step: Tensor) -> Tensor:
        return step.square().sum((1, 2, 3)) / (2 * spread) + wavy(centre + step)

    step = pull_towards(wavy, centre, variance, iterations)
    at_start = objective(torch.zeros_like(step))
    assert (objective(step) <= at_start + 1e-5 * scale).all()
