"""Schedules against their formulas, round trips, and the levels that sampling visits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import Grid, NoiseSchedule, ScheduleConfig
from mezzotint.errors import ConfigError, RequestError

DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
V = {"prediction_type": "v_prediction"}
CONFIGS = {
    "latent-diffusion": {},
    "ddpm": DDPM,
    "cosine": {"beta_schedule": "cosine"},
    "zero-snr": {**V, "zero_terminal_snr": True},
    "zero-snr-ddpm": {**V, **DDPM, "zero_terminal_snr": True},
    "zero-snr-cosine": {**V, "beta_schedule": "cosine", "zero_terminal_snr": True},
    "short": {"num_train_timesteps": 10, "steps_offset": 1},
}
SCHEDULES = {name: NoiseSchedule(ScheduleConfig(**settings)) for name, settings in CONFIGS.items()}
FLAT = ("leading", "trailing", "linspace")


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


def product_of_alphas(betas: list[float]) -> torch.Tensor:
    alphas = itertools.accumulate((1 - beta for beta in betas), lambda a, b: a * b)
    return torch.tensor(list(alphas), dtype=torch.float64)


def test_linear_is_its_formula() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    torch.testing.assert_close(
        SCHEDULES["ddpm"].alphas_cumprod, product_of_alphas(betas), rtol=1e-10, atol=0
    )


def test_scaled_linear_is_its_formula() -> None:
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    betas = [(low + (high - low) * t / 999) ** 2 for t in range(1000)]
    schedule = SCHEDULES["latent-diffusion"]
    torch.testing.assert_close(
        schedule.alphas_cumprod, product_of_alphas(betas), rtol=1e-10, atol=0
    )
    # the range that users of Stable Diffusion know
    assert schedule.sigmas[0].item() == pytest.approx(0.0292, abs=5e-5)
    assert schedule.sigmas[-1].item() == pytest.approx(14.6146, abs=5e-5)


def test_cosine_is_its_formula() -> None:
    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    alphas_cumprod = SCHEDULES["cosine"].alphas_cumprod
    expected = torch.tensor([f(t + 1) / f(0) for t in range(999)], dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod[:-1], expected, rtol=1e-9, atol=0)
    # beta is at most 0.999, which only the last reaches
    assert (alphas_cumprod[-1] / alphas_cumprod[-2]).item() == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "base", "raised"),
    [
        ("zero-snr", "latent-diffusion", 1),
        ("zero-snr-ddpm", "ddpm", 4),
        ("zero-snr-cosine", "cosine", 1),
    ],
)
def test_zero_terminal_snr_is_its_formula(name: str, base: str, raised: int) -> None:
    """Algorithm 1 of arXiv 2305.08891 but where it would pass sigma = 4096."""
    root = SCHEDULES[base].alphas_cumprod.sqrt()
    shifted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ours = SCHEDULES[name]
    torch.testing.assert_close(
        ours.alphas_cumprod[:-raised].sqrt(), shifted[:-raised], rtol=1e-9, atol=0
    )
    assert ours.sigmas[-1].item() == pytest.approx(4096)
    assert ours.alphas_cumprod[-1].item() == pytest.approx(2**-24, rel=1e-6)
    assert bool((shifted[-raised:] < 1 / 4096).all())


def test_levels_rise_strictly(schedule: NoiseSchedule) -> None:
    assert bool((schedule.sigmas.diff() > 0).all())
    assert bool(torch.isfinite(schedule.sigmas.float()).all())


def test_t_to_sigma_to_t_is_exact_on_whole_times(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_train_timesteps)
    sigma = schedule.t_to_sigma(t)
    torch.testing.assert_close(sigma, schedule.sigmas, rtol=1e-12, atol=0)
    # also after the float32 that samplers carry
    assert torch.equal(schedule.sigma_to_t(sigma.float()), t.double())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
def test_round_trip_between_whole_times(name: str, part: float) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([part * (schedule.num_train_timesteps - 1)], dtype=torch.float64)
    # 0.001 is what snapping to whole times may move
    torch.testing.assert_close(
        schedule.sigma_to_t(schedule.t_to_sigma(t)), t, rtol=0, atol=1.001e-3
    )


def test_levels_outside_the_schedule_are_its_ends(schedule: NoiseSchedule) -> None:
    last = schedule.num_train_timesteps - 1
    assert schedule.sigma_to_t(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, last]
    ends = schedule.t_to_sigma(torch.tensor([-3.0, last + 5.0]))
    torch.testing.assert_close(ends, schedule.sigmas[[0, -1]])


def test_signal_noise_and_velocity_are_one_rotation(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 8, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.randint(schedule.num_train_timesteps, (8,), generator=generator)
    z, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    signal = schedule.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    amount = (1 - schedule.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * z - amount * v, x0)
    torch.testing.assert_close(amount * z + signal * v, noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_network_predicts(prediction: str) -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    x0, noise, t = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 3.0), torch.tensor([0, 500])
    expected = {
        "epsilon": noise,
        "v_prediction": schedule.velocity(x0, noise, t),
        "sample": x0,
    }
    assert torch.equal(schedule.target(x0, noise, t), expected[prediction])


def test_snr_is_the_ratio_of_signal_to_noise() -> None:
    schedule = SCHEDULES["zero-snr"]
    t = torch.tensor([0, 400, 999])
    a = schedule.alphas_cumprod[t]
    torch.testing.assert_close(schedule.snr(t), (a / (1 - a)).float())


@pytest.mark.parametrize(
    ("spacing", "grid", "times"),
    [
        # table 2 of arXiv 2305.08891 for 10 of 1000, there counted from 1
        ("leading", Grid(), [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("trailing", Grid(), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("linspace", Grid(), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        # one more step laid and the lowest time left out
        ("leading", Grid(spare=True), [900, 810, 720, 630, 540, 450, 360, 270, 180, 90]),
        ("linspace", Grid(spare=True), [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]),
        ("trailing", Grid(spare=True), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_spacings(spacing: str, grid: Grid, times: list[int]) -> None:
    schedule = SCHEDULES["latent-diffusion"]
    sigmas = schedule.sampling_sigmas(10, spacing, grid)
    assert sigmas.dtype == torch.float32
    assert schedule.sigma_to_t(sigmas[:-1]).tolist() == times
    assert sigmas[-1] == 0


def test_offset_moves_leading_times_alone() -> None:
    plain = SCHEDULES["latent-diffusion"]
    moved = NoiseSchedule(ScheduleConfig(steps_offset=1))
    times = moved.sigma_to_t(moved.sampling_sigmas(50, "leading")[:-1]).tolist()
    assert times == [981 - 20 * i for i in range(50)]
    for spacing in ("trailing", "linspace", "karras"):
        assert torch.equal(moved.sampling_sigmas(50, spacing), plain.sampling_sigmas(50, spacing))


def test_linspace_between_whole_times() -> None:
    schedule = SCHEDULES["latent-diffusion"]
    sigmas = schedule.sampling_sigmas(4, "linspace", Grid(whole=False))
    third = 999 / 3  # 333: whole, and so is 666
    assert schedule.sigma_to_t(sigmas[:-1]).tolist() == [999, 2 * third, third, 0]
    between = schedule.sampling_sigmas(3, "linspace", Grid(whole=False))[1]
    assert between.item() == pytest.approx((schedule.sigmas[499:501].mean()).item())


def test_karras_is_its_formula() -> None:
    schedule = SCHEDULES["latent-diffusion"]
    low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    expected = [
        (high ** (1 / 7) + i / 19 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(20)
    ]
    sigmas = schedule.sampling_sigmas(20, "karras")
    torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0]))


@pytest.mark.parametrize("spacing", [*FLAT, "karras"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_levels_fall_whatever_the_number_of_steps(
    schedule: NoiseSchedule, sampler: str, spacing: str
) -> None:
    grid = SAMPLERS[sampler].grid
    most = schedule.num_train_timesteps - grid.spare
    if spacing == "trailing" and grid.distilled:
        most = len(schedule.distilled_times()) - 1
    for steps in {1, 2, 3, 7, most // 3, most // 2, most // 2 + 1, most - 1, most} - {0}:
        sigmas = schedule.sampling_sigmas(steps, spacing, grid)
        assert sigmas.shape == (steps + 1,)
        assert bool((sigmas.diff() < 0).all()), steps
        assert sigmas[0] <= schedule.sigmas[-1].float()
        if spacing != "leading":
            assert sigmas[0] == schedule.sigmas[-1].float()


@pytest.mark.parametrize("spacing", [*FLAT, "karras"])
def test_a_schedule_may_end_above_zero(spacing: str) -> None:
    schedule = NoiseSchedule(ScheduleConfig(set_alpha_to_one=False))
    sigmas = schedule.sampling_sigmas(20, spacing)
    assert sigmas[-1].item() == pytest.approx(0.0292, abs=5e-5)
    assert schedule.sampling_sigmas(20, spacing, Grid(to_zero=True))[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_out_of_range(steps: int) -> None:
    with pytest.raises(RequestError, match=f"steps: must be from 1 to 1000, got {steps}"):
        SCHEDULES["latent-diffusion"].sampling_sigmas(steps, "trailing")


def test_unknown_spacing_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="'trailin'; did you mean 'trailing'"):
        SCHEDULES["latent-diffusion"].sampling_sigmas(10, "trailin")  # pyright: ignore


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_start_has_the_variance_that_the_network_knows(name: str) -> None:
    schedule = SCHEDULES[name]
    sigma = schedule.sigmas[-1].float()
    assert schedule.start_scale(sigma) / math.sqrt(1 + sigma**2) == pytest.approx(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr cannot go with prediction_type 'epsilon'"),
        ({"beta_start": 0.1, "beta_end": 0.01}, r"beta_end \(0.01\) must not be below beta_start"),
        ({"steps_offset": 1000}, r"steps_offset \(1000\) must be below num_train_timesteps"),
        ({"beta_shedule": "linear"}, "did you mean 'beta_schedule'"),
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ],
)
def test_wrong_configurations(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig.from_dict(data)


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        ScheduleConfig().beta_start = 0.1  # pyright: ignore
