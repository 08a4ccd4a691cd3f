"""Every parameterisation is one denoiser."""

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig

GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(2, 6, 3, 4, 4, generator=GENERATOR)
T = torch.tensor([0, 1, 250, 500, 998, 999])


def make(prediction: str, zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule(
        ScheduleConfig(prediction_type=prediction, zero_terminal_snr=zero_terminal_snr)
    )


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction", True),
        ("sample", False),
        ("sample", True),
    ],
)
def test_a_right_prediction_gives_the_image(prediction: str, zero_snr: bool) -> None:
    schedule = make(prediction, zero_snr)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: str) -> Tensor:
        assert cond == "told"
        seen.extend([x, t])
        return schedule.target(X0, NOISE, T)

    sigma = schedule.sigmas[T].float()
    x = X0 + sigma.view(-1, 1, 1, 1) * NOISE
    denoised = Denoiser(network, schedule)(x, sigma, "told")
    # x is rounded to 2**-24 of itself, so the image is good to that part of sigma
    tolerance = 1e-6 * (1 + sigma.view(-1, 1, 1, 1))
    assert bool(((denoised - X0).abs() < tolerance).all())
    # the network saw what it was trained on
    torch.testing.assert_close(seen[0], schedule.add_noise(X0, NOISE, T), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[1], T.float())


def test_state_is_float32_whatever_the_network_computes_in() -> None:
    schedule = make("v_prediction")
    denoiser = Denoiser(lambda x, t, cond: x.bfloat16(), schedule)
    assert denoiser(X0, torch.ones(6), None).dtype == torch.float32
    assert denoiser(X0.bfloat16(), torch.ones(6), None).dtype == torch.float32
    assert denoiser(X0.double(), torch.ones(6), None).dtype == torch.float64


@pytest.mark.parametrize("whole", [False, True])
def test_whole_times_change_the_time_alone(whole: bool) -> None:
    schedule = make("epsilon")
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    sigma = schedule.t_to_sigma(torch.full((6,), 500.4, dtype=torch.float64)).float()
    denoised = Denoiser(network, schedule, whole_times=whole)(X0, sigma, None)
    torch.testing.assert_close(seen[0], torch.full((6,), 500.0 if whole else 500.4))
    assert torch.equal(denoised, X0)
