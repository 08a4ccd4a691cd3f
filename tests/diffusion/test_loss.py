"""The loss and its weights."""

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.loss import diffusion_loss, loss_weight
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig

PREDICTIONS = ("epsilon", "v_prediction", "sample")
GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE, ERROR = torch.randn(3, 5, 2, 4, 4, generator=GENERATOR)
T = torch.tensor([0, 10, 300, 700, 999])


def make(prediction: str, zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule(
        ScheduleConfig(prediction_type=prediction, zero_terminal_snr=zero_terminal_snr)
    )


def loss_of_guess(schedule: NoiseSchedule, guess: Tensor, **options: object) -> Tensor:
    """The loss of a network that takes ``guess`` for the image."""

    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        # the noise that goes with the guess, and from both what is predicted
        signal = schedule.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        noise = (x.double() - signal * guess) / (1 - signal**2).sqrt()
        return schedule.target(guess.double(), noise, t).float()

    return diffusion_loss(network, schedule, X0, T, NOISE, None, **options)  # pyright: ignore


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_image(prediction: str, gamma: float) -> None:
    """All three forms are min(SNR, gamma) times the squared error of the image."""
    schedule = make(prediction)
    loss = loss_of_guess(schedule, X0 + 0.1 * ERROR, weighting="min_snr", gamma=gamma)
    squared = ((0.1 * ERROR) ** 2).flatten(1).mean(1)
    expected = schedule.snr(T).clamp(max=gamma) * squared
    # float32 predictions at time 0, where the noise is 1/34 of the image
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("prediction", "share"), [("epsilon", 0), ("v_prediction", 1)])
def test_simple_is_the_error_of_the_prediction(prediction: str, share: int) -> None:
    schedule = make(prediction)
    loss = loss_of_guess(schedule, X0 + 0.1 * ERROR)
    squared = ((0.1 * ERROR) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, (schedule.snr(T) + share) * squared, rtol=1e-3, atol=0)


def test_the_error_may_be_absolute() -> None:
    schedule = make("sample")
    loss = loss_of_guess(schedule, X0 + 0.1 * ERROR, deviation="absolute")
    torch.testing.assert_close(loss, (0.1 * ERROR).abs().flatten(1).mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_right_prediction_costs_nothing(prediction: str, weighting: str) -> None:
    schedule = make(prediction, zero_terminal_snr=prediction != "epsilon")
    loss = diffusion_loss(
        lambda x, t, cond: schedule.target(X0, NOISE, t),
        schedule,
        X0,
        T,
        NOISE,
        None,
        weighting=weighting,  # pyright: ignore
    )
    assert torch.equal(loss, torch.zeros(5))


def test_network_is_given_the_diffused_image() -> None:
    schedule = make("epsilon")
    seen: list[object] = []

    def network(x: Tensor, t: Tensor, cond: str) -> Tensor:
        seen.extend([x, t, cond])
        return x.bfloat16()

    loss = diffusion_loss(network, schedule, X0, T, NOISE, "told")
    assert torch.equal(seen[0], schedule.add_noise(X0, NOISE, T))  # pyright: ignore
    assert seen[1] is T
    assert seen[2] == "told"
    assert loss.shape == (5,)
    assert loss.dtype == torch.float32


def test_weights() -> None:
    t = torch.arange(1000)
    for prediction in PREDICTIONS:
        assert torch.equal(loss_weight(make(prediction), t, "simple"), torch.ones(1000))
    schedule = make("epsilon")
    weight = loss_weight(schedule, t, "min_snr", gamma=5.0)
    noisy = schedule.snr(t) <= 5
    # where the SNR is at most gamma, min-SNR of the noise is the simple loss
    assert torch.equal(weight[noisy], torch.ones(int(noisy.sum())))
    torch.testing.assert_close(weight[~noisy], 5 / schedule.snr(t)[~noisy])


def test_gradient_reaches_the_network() -> None:
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(
        lambda x, t, cond: scale * x, make("v_prediction"), X0, T, NOISE, None, weighting="min_snr"
    )
    loss.mean().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_drawing_samples_during_training_leaves_gradients_alone() -> None:
    """Tables that were made in inference mode must not end up in the graph."""
    schedule = make("v_prediction")
    with torch.inference_mode():
        schedule.sigma_to_t(torch.ones(1))
    x0 = X0.clone().requires_grad_()
    diffusion_loss(lambda x, t, cond: x, schedule, x0, T, NOISE, None).sum().backward()
    assert x0.grad is not None
    assert bool(torch.isfinite(x0.grad).all())
