"""The algebra of guidance."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mezzotint.conditioning.base import Conditioning
from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.guidance import ClassifierFreeGuidance
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.5, 2.0, 8.0])
COND = Conditioning(vector=torch.tensor([[1.0], [2.0], [3.0]]))
NULL = Conditioning(vector=torch.zeros(3, 1))


@dataclass
class Counting:
    """A denoiser that depends on everything, and counts what it is asked."""

    calls: int = 0
    samples: int = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        assert len(x) == len(sigma) == len(cond.vector)
        self.calls += 1
        self.samples += len(x)
        return torch.tanh(x / sigma.view(-1, 1, 1, 1) + cond.vector.view(-1, 1, 1, 1) * x.flip(1))


WITH = Counting()(X, SIGMA, COND)
WITHOUT = Counting()(X, SIGMA, NULL)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.5, 7.5])
def test_guided_is_extrapolated(scale: float) -> None:
    denoiser = Counting()
    guided = ClassifierFreeGuidance(denoiser, NULL, scale)(X, SIGMA, COND)
    torch.testing.assert_close(guided, (1 - scale) * WITHOUT + scale * WITH)
    assert (denoiser.calls, denoiser.samples) == (1, 6)


@pytest.mark.parametrize("null", [NULL, None])
def test_scale_one_leaves_the_null_half_out(null: Conditioning | None) -> None:
    denoiser = Counting()
    guided = ClassifierFreeGuidance(denoiser, null, 1.0)(X, SIGMA, COND)
    assert torch.equal(guided, WITH)
    assert denoiser.samples == 3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guiding_images_is_guiding_predictions(prediction: str) -> None:
    """What the network predicts is linear in the image, so extrapolating either is the same."""
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return Counting()(x, t + 1, cond)

    def guided_network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        bare = network(x, t, NULL)
        return bare + 5 * (network(x, t, cond) - bare)

    guided = ClassifierFreeGuidance(Denoiser(network, schedule), NULL, 5.0)(X, SIGMA, COND)
    torch.testing.assert_close(guided, Denoiser(guided_network, schedule)(X, SIGMA, COND))


def test_rescale_takes_contrast_back() -> None:
    def run(rescale: float) -> Tensor:
        return ClassifierFreeGuidance(Counting(), NULL, 6.0, rescale=rescale)(X, SIGMA, COND)

    plain, full = run(0.0), run(1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), WITH.std((1, 2, 3)))
    # the same picture but for contrast, each sample by its own factor
    ratio = full / plain
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    torch.testing.assert_close(run(0.7), 0.7 * full + 0.3 * plain)


def test_interval_guides_inside_alone() -> None:
    denoiser = Counting()
    guided = ClassifierFreeGuidance(denoiser, NULL, 3.0, interval=(0.5, 2.0))
    result = guided(X, SIGMA, COND)
    everywhere = ClassifierFreeGuidance(Counting(), NULL, 3.0)(X, SIGMA, COND)
    # the lower bound is outside, the upper inside
    assert torch.equal(result[0], WITH[0])
    assert torch.equal(result[1], everywhere[1])
    assert torch.equal(result[2], WITH[2])
    assert denoiser.samples == 6
    # where no sample is inside, the null half is not computed
    outside = guided(X, torch.full((3,), 9.0), COND)
    assert torch.equal(outside, Counting()(X, torch.full((3,), 9.0), COND))
    assert denoiser.samples == 9


def test_conditions_are_joined_once_and_anew_for_another() -> None:
    seen: list[Conditioning] = []

    def denoiser(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond)
        return Counting()(x, sigma, cond)

    guided = ClassifierFreeGuidance(denoiser, NULL, 3.0)
    other = Conditioning(vector=torch.tensor([[4.0], [5.0], [6.0]]))
    first = guided(X, SIGMA, COND)
    assert torch.equal(guided(X, SIGMA, COND), first)
    assert seen[0] is seen[1]
    fresh = ClassifierFreeGuidance(Counting(), NULL, 3.0)
    assert torch.equal(guided(X, SIGMA, other), fresh(X, SIGMA, other))
    assert torch.equal(guided(X, SIGMA, COND), first)


def test_conditions_of_other_length_are_joined() -> None:
    def mean_of_tokens(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.crossattn is not None
        assert cond.crossattn_mask is not None
        mask = cond.crossattn_mask[..., None]
        mean = (cond.crossattn * mask).sum((1, 2)) / mask.sum((1, 2))
        return mean.view(-1, 1, 1, 1).expand_as(x)

    cond = Conditioning(crossattn=torch.full((3, 5, 1), 2.0))
    null = Conditioning(crossattn=torch.full((3, 2, 1), 1.0))
    guided = ClassifierFreeGuidance(mean_of_tokens, null, 4.0)(X, SIGMA, cond)
    torch.testing.assert_close(guided, torch.full_like(X, 1 + 4 * (2 - 1)))
