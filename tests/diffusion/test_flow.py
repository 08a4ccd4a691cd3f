"""Rectified flow: its path, its levels, and that samplers and losses take it as any other model."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.flow import FlowSchedule, FlowScheduleConfig, build_schedule
from mezzotint.diffusion.loss import diffusion_loss, loss_weight
from mezzotint.diffusion.samplers import SAMPLERS, euler
from mezzotint.diffusion.schedule import SPACINGS, Grid, NoiseSchedule, ScheduleConfig, Spacing
from mezzotint.errors import ConfigError, RequestError
from mezzotint.rng import SampleNoise

MEAN, VARIANCE = 0.5, 0.25
FLOW, SHIFTED = (FlowSchedule(FlowScheduleConfig(shift=shift)) for shift in (1.0, 3.0))
GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE, ERROR = torch.randn(3, 6, 3, 4, 4, generator=GENERATOR)
T = torch.tensor([0.0, 1.5, 250.0, 640.25, 990.0, 1000.0])
FOR_ANY_NETWORK = sorted(name for name, info in SAMPLERS.items() if not info.distilled)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data N(MEAN, VARIANCE)."""
    noise = sigma.to(x.dtype).view(-1, 1, 1, 1) ** 2
    return (VARIANCE * x + noise * MEAN) / (VARIANCE + noise)


def flow_network(schedule: FlowSchedule) -> Callable[[Tensor, Tensor, None], Tensor]:
    """The exact network for these data: what it sees is on the path, and its time is t * 1000."""

    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        part = (t.double() / schedule.num_train_timesteps).view(-1, 1, 1, 1)
        # of x_t = (1 - t) x0 + t eps the mean of eps - x0
        x, own = x.double(), (1 - part) * VARIANCE
        spread = (1 - part) ** 2 * VARIANCE + part**2
        return -MEAN + (part - own) / spread * (x - (1 - part) * MEAN)

    return network


def test_times_and_levels_are_their_formulas() -> None:
    sigma = FLOW.t_to_sigma(torch.tensor([0.0, 200.0, 500.0, 900.0, 1000.0, 2000.0]))
    torch.testing.assert_close(sigma, torch.tensor([0, 0.25, 1, 9, 4096, 4096]).double())
    t = FLOW.sigma_to_t(torch.tensor([0.0, 0.25, 1.0, 9.0, 4096.0, 1e9]))
    last = 1000 * 4096 / 4097
    torch.testing.assert_close(t, torch.tensor([0, 200, 500, 900, last, last]).double())
    # the shift moves which levels are visited and trained, not what a time means
    assert torch.equal(SHIFTED.t_to_sigma(T), FLOW.t_to_sigma(T))


def test_the_path_is_straight() -> None:
    part = (T / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(FLOW.add_noise(X0, NOISE, T), (1 - part) * X0 + part * NOISE)
    assert torch.equal(FLOW.add_noise(X0, NOISE, T)[-1], NOISE[-1])  # nothing of the image is left
    assert torch.equal(FLOW.target(X0, NOISE, T), NOISE - X0)
    # and its velocity is what is predicted
    slope = (FLOW.add_noise(X0, NOISE, T + 1) - FLOW.add_noise(X0, NOISE, T)) * 1000
    torch.testing.assert_close(slope, FLOW.target(X0, NOISE, T), rtol=1e-3, atol=1e-3)


def test_a_right_prediction_gives_the_image() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: str) -> Tensor:
        seen.extend([x, t])
        return NOISE - X0

    times = T[1:-1]
    sigma = FLOW.t_to_sigma(times).float()
    x = X0[1:-1] + sigma.view(-1, 1, 1, 1) * NOISE[1:-1]
    denoiser = Denoiser(lambda x, t, cond: network(x, t, cond)[1:-1], FLOW)
    torch.testing.assert_close(denoiser(x, sigma, "told"), X0[1:-1], rtol=1e-5, atol=1e-5)
    expected = FLOW.add_noise(X0, NOISE, T)[1:-1]
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], times, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [0.03, 0.7, 5.0, 14.0])
def test_one_optimal_denoiser_in_every_parameterisation(sigma: float) -> None:
    """Networks that predict differently, each right, are one denoiser."""
    x = (1 + sigma**2) ** 0.5 * X0.double()
    level = torch.full((6,), sigma, dtype=torch.float64)
    expected = gaussian(x, level)
    noise = (x - expected) / sigma
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))

        def network(x_vp: Tensor, t: Tensor, cond: None, which: str = prediction) -> Tensor:
            c_in = (1 + sigma**2) ** -0.5
            torch.testing.assert_close(x_vp, c_in * x)
            if which == "v_prediction":
                return c_in * noise - c_in * sigma * expected
            return noise if which == "epsilon" else expected

        torch.testing.assert_close(Denoiser(network, schedule)(x, level, None), expected)
    flow = Denoiser(flow_network(FLOW), FLOW)
    # the network is told its time in float32
    torch.testing.assert_close(flow(x, level, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", FOR_ANY_NETWORK)
def test_every_sampler_transports_noise_to_gaussian_data(
    name: str, spacing: Spacing, schedule: FlowSchedule
) -> None:
    info = SAMPLERS[name]
    sigmas = info.sigmas(schedule, 250, spacing)
    rng = SampleNoise([0, 1])
    x = rng.normal((1, 96, 96)) * schedule.start_scale(sigmas[0])
    denoiser = Denoiser(flow_network(schedule), schedule)
    drawn = info.function(lambda x, sigma: denoiser(x, sigma, None), x, sigmas, rng).double()
    count = drawn.numel()
    # four standard deviations of the estimates, and 4 % for 250 steps of first order
    assert abs(drawn.mean().item() - MEAN) <= 4 * math.sqrt(VARIANCE / count) + 5e-3
    assert abs(drawn.var().item() - VARIANCE) <= VARIANCE * (0.04 + 4 * math.sqrt(2 / count))


def test_one_step_reaches_data_that_are_one_point() -> None:
    """Paths to a single point are straight, so that Euler's step of any length stays on them."""
    point = torch.tensor([0.3, -2.0]).view(1, 2, 1, 1)
    # a path ends where its noise is: eps = (x_t - (1 - t) * point) / t
    denoiser = Denoiser(lambda x, t, cond: (x - point) / (t.view(-1, 1, 1, 1) / 1000), FLOW)
    sigmas = FLOW.sampling_sigmas(1, "trailing")
    x = NOISE[:, :2] * FLOW.start_scale(sigmas[0])
    drawn = euler(lambda x, sigma: denoiser(x, sigma, None), x, sigmas, SampleNoise([0] * 6))
    torch.testing.assert_close(drawn, point.expand_as(drawn), rtol=0, atol=1e-4)


def test_euler_in_sigma_is_euler_in_t() -> None:
    network = flow_network(SHIFTED)
    denoiser = Denoiser(network, SHIFTED)
    sigmas = SHIFTED.sampling_sigmas(5, "trailing")[1:]  # from t < 1, where both can stand
    parts = (sigmas.double() / (1 + sigmas.double())).tolist()
    state = NOISE.double()
    x = state * (1 + sigmas[0].double())
    ours = euler(lambda x, sigma: denoiser(x, sigma, None), x, sigmas, SampleNoise([0] * 6))
    for part, following in zip(parts[:-1], parts[1:], strict=True):
        t = torch.full((6,), 1000 * part)
        state = state + (following - part) * network(state, t, None)
    torch.testing.assert_close(ours, state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "grid", "parts"),
    [
        ("trailing", Grid(), [1, 0.75, 0.5, 0.25]),
        ("trailing", Grid(spare=True), [1, 0.75, 0.5, 0.25]),
        ("leading", Grid(), [0.751, 0.501, 0.251, 0.001]),
        ("leading", Grid(spare=True), [0.801, 0.601, 0.401, 0.201]),
        ("linspace", Grid(), [1, 0.667, 0.334, 0.001]),
        ("linspace", Grid(spare=True), [1, 0.75025, 0.5005, 0.25075]),
        ("sgm_uniform", Grid(), [1, 0.75025, 0.5005, 0.25075]),
    ],
)
def test_spacings(spacing: Spacing, grid: Grid, parts: list[float]) -> None:
    sigmas = FLOW.sampling_sigmas(4, spacing, grid).double()
    assert sigmas[-1] == 0
    wanted = torch.tensor(parts).double().clamp(max=4096 / 4097)
    torch.testing.assert_close(sigmas[:-1] / (1 + sigmas[:-1]), wanted, rtol=1e-6, atol=1e-7)


def test_the_shift_keeps_the_signal_of_a_larger_image() -> None:
    """sqrt(n) of the pixels: sigma is multiplied by it (arXiv 2403.03206, equation 23)."""
    plain, shifted = (s.sampling_sigmas(10, "trailing")[1:-1] for s in (FLOW, SHIFTED))
    torch.testing.assert_close(shifted, 3 * plain)


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_levels_fall_whatever_the_number_of_steps(
    sampler: str, spacing: Spacing, schedule: FlowSchedule
) -> None:
    grid = SAMPLERS[sampler].grid
    most = 1000 - grid.spare
    for steps in (1, 2, 3, 7, most // 2, most):
        sigmas = schedule.sampling_sigmas(steps, spacing, grid)
        assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
        assert bool((sigmas.diff() < 0).all()), steps
        assert sigmas[-1] == 0
        if spacing != "leading":
            assert sigmas[0] == 4096
    with pytest.raises(RequestError, match=f"steps: must be from 1 to {most}, got {most + 1}"):
        schedule.sampling_sigmas(most + 1, spacing, grid)


def test_the_loss_by_hand() -> None:
    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        torch.testing.assert_close(x, FLOW.add_noise(X0, NOISE, T))
        assert torch.equal(t, T)
        return NOISE - X0 + 0.1 * ERROR

    squared = ((0.1 * ERROR) ** 2).flatten(1).mean(1)
    loss = diffusion_loss(network, FLOW, X0, T, NOISE, None)
    torch.testing.assert_close(loss, squared, rtol=1e-4, atol=0)
    # (1 - t)**2 / t**2 is the SNR, and t times the error of the velocity is that of the image
    parts = (T / 1000).tolist()
    weights = [
        min((1 - t) ** 2 / t**2 + 1, 5) * t**2 if t else 0.0 for t in (min(p, 1.0) for p in parts)
    ]
    loss = diffusion_loss(network, FLOW, X0, T, NOISE, None, weighting="min_snr")
    torch.testing.assert_close(loss, torch.tensor(weights) * squared, rtol=1e-3, atol=1e-12)
    loss = diffusion_loss(network, FLOW, X0, T, NOISE, None, deviation="absolute")
    torch.testing.assert_close(loss, (0.1 * ERROR).abs().flatten(1).mean(1), rtol=1e-4, atol=0)


ENDING = [
    FlowScheduleConfig(),
    FlowScheduleConfig(shift=3.0),
    *(
        ScheduleConfig(prediction_type=prediction, zero_terminal_snr=True, beta_schedule=betas)
        for prediction in ("v_prediction", "sample")
        for betas in ("linear", "scaled_linear", "cosine")
    ),
]


@pytest.mark.parametrize("config", ENDING, ids=str)
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_first_step_of_sampling_is_always_trained(
    config: ScheduleConfig | FlowScheduleConfig, weighting: str
) -> None:
    """min(SNR, gamma) would give the last time, where there is no signal, a weight of 0."""
    schedule = build_schedule(config)
    start = schedule.sigma_to_t(schedule.sampling_sigmas(10, "trailing")[:1])
    assert schedule.snr(start) < 1e-6
    every = torch.tensor([schedule.quantile((k + 0.5) / 1000) for k in range(1000)])
    weights = loss_weight(schedule, every, weighting)  # pyright: ignore
    assert loss_weight(schedule, start, weighting) >= 0.2 * weights.mean()  # pyright: ignore
    if config.prediction_type != "sample":
        # by the weight of the simple loss, but that the last time of a flow stands for 1
        assert loss_weight(schedule, start, weighting).item() == pytest.approx(1, abs=1e-3)  # pyright: ignore


def test_a_schedule_that_keeps_some_signal_is_weighed_as_in_the_paper() -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction"))
    t = torch.tensor([0, 300, 999])
    snr = schedule.snr(t)
    expected = snr.clamp(max=5) / (snr + 1)
    assert torch.equal(loss_weight(schedule, t, "min_snr"), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shift": 0.0}, "shift: .*greater than or equal to 0.01, got 0.0"),
        ({"prediction_type": "epsilon"}, "unknown key 'prediction_type'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ],
)
def test_wrong_configurations(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowScheduleConfig.from_dict(data)


@pytest.mark.parametrize("name", FOR_ANY_NETWORK)
def test_image_k_of_a_batch_is_the_image_alone(name: str) -> None:
    info, denoiser = SAMPLERS[name], Denoiser(flow_network(FLOW), FLOW)
    sigmas = info.sigmas(FLOW, 6)

    def draw(seeds: Sequence[int]) -> Tensor:
        rng = SampleNoise(seeds)
        x = rng.normal((1, 8, 8)) * FLOW.start_scale(sigmas[0])
        return info.function(lambda x, sigma: denoiser(x, sigma, None), x, sigmas, rng)

    both = draw([5, 6])
    torch.testing.assert_close(both[1], draw([6])[0], rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.1
