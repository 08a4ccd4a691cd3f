"""Samplers against what they must do: closed forms, orders, and one stream of noise per sample."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.samplers import (
    SAMPLERS,
    consistency,
    dpm2,
    dpmpp_2m,
    dpmpp_sde,
    euler,
    get_sampler,
    heun,
    lms,
    plms,
    unipc,
)
from mezzotint.diffusion.schedule import SPACINGS, NoiseSchedule, ScheduleConfig
from mezzotint.errors import RequestError
from mezzotint.rng import SampleNoise

MEAN, VARIANCE = 0.5, 0.25
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
# lcm is for networks that give the end of the path, not the mean of what the image may be
FOR_ANY_NETWORK = sorted(name for name, info in SAMPLERS.items() if not info.distilled)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data N(MEAN, VARIANCE): the mean of x0 given x."""
    noise = sigma.view(-1, 1, 1, 1) ** 2
    return (VARIANCE * x + noise * MEAN) / (VARIANCE + noise)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of two equal Gaussians at -1 and 1, of standard deviation 0.3."""
    noise, own = sigma.view(-1, 1, 1, 1) ** 2, 0.09
    weight = torch.tanh(x / (own + noise))
    return (own * x + noise * weight) / (own + noise)


class UnitNoise:
    """Noise of 1 for one element in one step, so that a run shows its response to each draw."""

    def __init__(self, draws: int = 1) -> None:
        self.draws = draws

    def normal(self, shape: Sequence[int], step: int = -1, draw: int = 0) -> Tensor:
        noise = torch.zeros(1, *shape, dtype=torch.float64)
        noise[..., 2 + self.draws * step + draw] = 1
        return noise


def moments(sampler: Callable[..., Tensor], sigmas: Tensor) -> tuple[float, float]:
    """The exact mean and variance of what a sampler makes of diffused Gaussian data.

    The denoiser is affine, so the result is a * x + b + sum_i c_i * noise_i; one run in which
    each element is moved by one of these reads them all.
    """
    draws = 2  # at most, in a step
    x = torch.zeros(1, 1, 1, 2 + draws * (len(sigmas) - 1), dtype=torch.float64)
    x[..., 1] = 1
    result = sampler(gaussian, x, sigmas, UnitNoise(draws)).flatten() * (1 + sigmas[-1] ** 2).sqrt()
    offset = result[0]
    slope, noise = result[1] - offset, result[2:] - offset
    mean = slope * MEAN + offset
    return mean.item(), (slope**2 * (VARIANCE + sigmas[0] ** 2) + (noise**2).sum()).item()


def even_in_sigma(steps: int) -> Tensor:
    return torch.linspace(5, 0, steps + 1, dtype=torch.float64)


def even_in_log_sigma(steps: int) -> Tensor:
    return torch.logspace(1, math.log10(0.05), steps + 1, dtype=torch.float64)


def even_in_root(steps: int) -> Tensor:
    return torch.linspace(10 ** (1 / 7), 0.02 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7


def slopes(errors: Sequence[float]) -> list[float]:
    """Order of convergence between runs of which each has twice the steps of the last."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


# the shortening of the last step in small runs is not what an order is about
dpmpp_2m_plain = partial(dpmpp_2m, lower_order_final=False)
lms_of_two, unipc_of_one = partial(lms, max_order=2), partial(unipc, max_order=1)
ORDERS = [
    ("euler", euler, 1, (even_in_sigma, even_in_log_sigma, even_in_root)),
    ("ddpm", partial(euler, eta=1.0), 1, (even_in_log_sigma, even_in_root)),
    ("heun", heun, 2, (even_in_sigma, even_in_log_sigma, even_in_root)),
    ("plms", plms, 2, (even_in_log_sigma, even_in_root)),
    ("plms", plms, 4, (even_in_sigma,)),
    ("dpm2", dpm2, 2, (even_in_log_sigma, even_in_root)),
    ("dpm2_ancestral", partial(dpm2, eta=1.0), 2, (even_in_log_sigma, even_in_root)),
    ("dpmpp_sde", dpmpp_sde, 2, (even_in_log_sigma, even_in_root)),
    # with more terms they are of second order too, by their first step, but show it only in runs
    # of thousands of steps: before that the other steps' smaller errors are all there is
    ("lms", lms_of_two, 2, (even_in_log_sigma, even_in_root)),
    ("lms", lms, 4, (even_in_sigma,)),
    ("unipc", unipc_of_one, 2, (even_in_log_sigma, even_in_root)),
    ("plms of velocities", partial(plms, multistep="v_prediction"), 1, (even_in_log_sigma,)),
    # they extrapolate in log sigma, so its steps must not grow without bound as they do to 0
    ("dpmpp_2m", dpmpp_2m_plain, 2, (even_in_log_sigma, even_in_root)),
    ("dpmpp_2m_sde", partial(dpmpp_2m_plain, eta=1.0), 2, (even_in_log_sigma, even_in_root)),
]


@pytest.mark.parametrize(
    ("sampler", "order", "grid"),
    [
        pytest.param(sampler, order, grid, id=f"{name}-{grid.__name__}")
        for name, sampler, order, grids in ORDERS
        for grid in grids
    ],
)
def test_variance_of_gaussian_data_converges_at_the_stated_order(
    sampler: Callable[..., Tensor], order: int, grid: Callable[[int], Tensor]
) -> None:
    errors: list[float] = []
    for steps in (80, 160, 320):
        sigmas = grid(steps)
        mean, variance = moments(sampler, sigmas)
        exact = VARIANCE + sigmas[-1].item() ** 2
        errors.append(abs(variance - exact))
        assert abs(mean - MEAN) <= 0.5 / steps
    # between 160 and 320 steps the next term of the error still shows
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (euler, 1),
        (heun, 2),
        (plms, 2),
        (dpmpp_2m_plain, 2),
        (dpm2, 2),
        (lms_of_two, 2),
        (unipc_of_one, 2),
    ],
)
def test_order_holds_where_the_denoiser_is_not_linear(
    sampler: Callable[..., Tensor], order: int
) -> None:
    x = torch.linspace(-20, 20, 9, dtype=torch.float64).view(1, 1, 1, 9)

    def run(sampler: Callable[..., Tensor], steps: int) -> Tensor:
        return sampler(mixture, x, even_in_log_sigma(steps), UnitNoise())

    exact = run(heun, 6400)
    errors = [(run(sampler, steps) - exact).abs().mean().item() for steps in (100, 200, 400)]
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.15)


def test_stated_orders_are_the_registered_ones() -> None:
    measured: dict[str, int] = {}
    for name, _, order, _ in ORDERS:
        measured.setdefault(name, order)
    same = {"ddim": "euler", "euler_ancestral": "ddpm"}
    for name in FOR_ANY_NETWORK:
        assert SAMPLERS[name].order == measured[same.get(name, name)], name


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", FOR_ANY_NETWORK)
def test_gaussian_data_are_drawn_from_noise(name: str, prediction: str, spacing: str) -> None:
    """The whole way: keyed noise, start, schedule, exact network, denoiser, sampler."""
    schedule = NoiseSchedule(
        ScheduleConfig(prediction_type=prediction, zero_terminal_snr=prediction != "epsilon")
    )

    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        # at times the sampler visits this is exact, and it must be told the right ones
        sigma = schedule.t_to_sigma(t).to(x.dtype).view(-1, 1, 1, 1)
        x = x * (1 + sigma**2).sqrt()
        denoised = gaussian(x, sigma)
        noise = (x - denoised) / sigma
        if prediction == "epsilon":
            return noise
        return (noise - sigma * denoised) / (1 + sigma**2).sqrt()

    info = SAMPLERS[name]
    sigmas = info.sigmas(schedule, 250, spacing)
    rng = SampleNoise([0, 1])
    x = rng.normal((1, 128, 128)) * schedule.start_scale(sigmas[0])
    denoiser = Denoiser(network, schedule)
    drawn = info.function(lambda x, sigma: denoiser(x, sigma, None), x, sigmas, rng).double()
    # noise stands for the diffused data at the start, whose mean is not 0 and whose variance is
    # not that of noise; the probability flow brings that down by the ratio of deviations
    shrink = math.sqrt(VARIANCE / (VARIANCE + sigmas[0].item() ** 2))
    count = drawn.numel()
    deviation = math.sqrt(VARIANCE)
    mean_error = MEAN * shrink + 4 * deviation / math.sqrt(count)
    # 250 steps of first order leave 2 % (or 4 % with noise), four standard deviations another 3 %
    variance_error = VARIANCE * (0.04 + 4 * math.sqrt(2 / count)) + shrink**2
    assert abs(drawn.mean().item() - MEAN) <= mean_error
    assert abs(drawn.var().item() - VARIANCE) <= variance_error


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_consistency_sampling_of_a_consistency_function(steps: int) -> None:
    """With the exact end of each path, any number of steps gives the data's own variance."""

    def end_of_path(x: Tensor, sigma: Tensor) -> Tensor:
        shrink = (VARIANCE / (VARIANCE + sigma.view(-1, 1, 1, 1) ** 2)).sqrt()
        return MEAN + shrink * (x - MEAN)

    def sampler(_: Callable[..., Tensor], *arguments: object) -> Tensor:
        return consistency(end_of_path, *arguments)

    mean, variance = moments(sampler, even_in_sigma(steps))
    assert mean == pytest.approx(MEAN)
    assert variance == pytest.approx(VARIANCE)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_image_k_of_a_batch_is_the_image_alone(name: str) -> None:
    info, schedule = SAMPLERS[name], NoiseSchedule(ScheduleConfig())
    sigmas = info.sigmas(schedule, 12)

    def draw(seeds: list[int]) -> Tensor:
        rng = SampleNoise(seeds)
        x = rng.normal((3, 8, 8)) * schedule.start_scale(sigmas[0])
        return info.function(mixture, x, sigmas, rng)

    batch = draw([5, 6, 7, 8])
    for k, seed in enumerate((5, 6, 7, 8)):
        # vectorised float32 may round an element otherwise where it stands elsewhere
        torch.testing.assert_close(batch[k], draw([seed])[0], rtol=0, atol=1e-6)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_euler_is_ddim_and_ddpm(eta: float) -> None:
    """The algebra of its docstring, in the variance-preserving terms of the papers."""
    sigma, following = 3.0, 1.2
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    a, b = 1 / (1 + sigma**2), 1 / (1 + following**2)
    x0 = gaussian(x, torch.tensor([sigma], dtype=torch.float64))
    eps = (x - x0) / sigma
    # DDIM, equations 12 and 16
    s = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    ddim = math.sqrt(b) * x0 + math.sqrt(1 - b - s**2) * eps + s * noise

    class Given:
        def normal(self, shape: Sequence[int], step: int = -1, draw: int = 0) -> Tensor:
            return noise

    sigmas = torch.tensor([sigma, following], dtype=torch.float64)
    ours = euler(gaussian, x, sigmas, Given(), eta=eta)
    torch.testing.assert_close(ours, ddim)
    if eta == 1.0:
        # DDPM, equation 7: the posterior of x_{t-1} given x_t and x0
        alpha, x_vp = a / b, x * math.sqrt(a)
        mean = math.sqrt(b) * (1 - alpha) / (1 - a) * x0
        mean = mean + math.sqrt(alpha) * (1 - b) / (1 - a) * x_vp
        deviation = math.sqrt((1 - b) / (1 - a) * (1 - alpha))
        torch.testing.assert_close(ours, mean + deviation * noise)


def test_first_order_solvers_are_one() -> None:
    """One step of DPM-Solver++ is one of DDIM (arXiv 2211.01095, section 4.1)."""
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.tensor([7.0, 2.0], dtype=torch.float64)
    expected = euler(mixture, x, sigmas, UnitNoise())
    torch.testing.assert_close(dpmpp_2m(mixture, x, sigmas, UnitNoise()), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_last_step_of_no_length_is_no_step(name: str, spacing: str) -> None:
    """A schedule that ends at its first level, walked by a grid that has that level already."""
    schedule = NoiseSchedule(ScheduleConfig(set_alpha_to_one=False))
    sigmas = schedule.sampling_sigmas(10, spacing)
    doubled = torch.cat([sigmas, sigmas[-1:]])
    x = SampleNoise([0]).normal((1, 4, 4)) * schedule.start_scale(sigmas[0])
    states: list[Tensor] = []
    result = SAMPLERS[name].function(
        mixture, x, doubled, SampleNoise([0]), callback=lambda i, n, x, d: states.append(x)
    )
    torch.testing.assert_close(states[-1], states[-2])
    torch.testing.assert_close(result, states[-1] / (1 + sigmas[-1] ** 2).sqrt())


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_calls_callbacks_and_noise_are_as_registered(name: str, steps: int) -> None:
    info, schedule = SAMPLERS[name], NoiseSchedule(ScheduleConfig())
    sigmas = info.sigmas(schedule, steps)
    calls: list[Tensor] = []
    reports: list[tuple[int, int]] = []
    draws: list[int] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.float32
        assert sigma.shape == (2,)
        assert bool((sigma > 0).all())
        calls.append(sigma)
        return gaussian(x, sigma)

    class Counting:
        def normal(self, shape: Sequence[int], step: int = -1, draw: int = 0) -> Tensor:
            draws.append(step)
            return SampleNoise([0, 1]).normal(shape, step, draw)

    def callback(step: int, total: int, x: Tensor, denoised: Tensor) -> None:
        assert x.shape == denoised.shape == (2, 3, 4, 4)
        reports.append((step, total))

    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    result = info.function(denoise, x, sigmas, Counting(), callback=callback)
    assert result.dtype == torch.float32
    extra = {"plms": 1 if steps > 1 else 0}.get(name, 1 - info.calls_per_step)
    assert len(calls) == info.calls_per_step * steps + extra
    assert reports == [(step, steps) for step in range(steps)]
    # the step to 0 adds none
    each = 2 if name == "dpmpp_sde" else 1
    assert draws == ([k for k in range(steps - 1) for _ in range(each)] if info.stochastic else [])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_a_callback_raises_ends_the_sampling(name: str) -> None:
    class CancelledError(Exception):
        pass

    def callback(step: int, total: int, x: Tensor, denoised: Tensor) -> None:
        assert step <= 2
        if step == 2:
            raise CancelledError

    sigmas = NoiseSchedule(ScheduleConfig()).sampling_sigmas(9, "trailing")
    with pytest.raises(CancelledError):
        SAMPLERS[name].function(
            gaussian, torch.ones(1, 1, 2, 2), sigmas, SampleNoise([0]), callback=callback
        )


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_registered_options_are_those_of_the_function(name: str) -> None:
    info = SAMPLERS[name]
    assert info.name == name
    assert info.description
    parameters = inspect.signature(info.function).parameters
    assert set(info.options) <= set(parameters)
    assert (parameters["eta"].default > 0 if "eta" in parameters else False) == info.stochastic


def test_deterministic_samplers_need_no_noise() -> None:
    assert sorted(DETERMINISTIC) == [
        "ddim",
        "dpm2",
        "dpmpp_2m",
        "euler",
        "heun",
        "lms",
        "plms",
        "unipc",
    ]


def test_unknown_sampler_lists_those_there_are() -> None:
    with pytest.raises(RequestError, match="no sampler 'eular'; did you mean 'euler'") as caught:
        get_sampler("eular")
    assert all(name in str(caught.value) for name in SAMPLERS)
    assert get_sampler("heun") is SAMPLERS["heun"]
