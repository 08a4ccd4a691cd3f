import math

import pytest
import torch
from torch.nn import functional as F

from mezzotint.models.regularizers import DiagonalGaussian, VectorQuantizer
from mezzotint.rng import SampleNoise


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gaussian(mean: float, var: float, shape: tuple[int, ...] = (2, 3, 4, 5)) -> DiagonalGaussian:
    moments = torch.cat([torch.full(shape, mean), torch.full(shape, math.log(var))], dim=1)
    return DiagonalGaussian(moments)


@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (1.5, 0.25), (-2.0, 3.0)])
def test_kl_equals_the_distributions_of_torch(mean: float, var: float) -> None:
    posterior = gaussian(mean, var)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, math.sqrt(var)), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), exact * torch.full((2,), 60.0))


def test_samples_have_the_moments_of_the_posterior() -> None:
    posterior = gaussian(1.5, 0.25, (1, 1, 300, 300))
    z = posterior.sample(torch.Generator().manual_seed(0))
    # the standard error of the mean of 90,000 values is 0.0017
    assert abs(float(z.mean()) - 1.5) < 0.007
    assert abs(float(z.std()) - 0.5) < 0.007
    assert torch.equal(posterior.mode(), posterior.mean)


def test_a_sample_depends_on_its_own_stream_alone() -> None:
    alone = gaussian(0.0, 1.0, (1, 3, 4, 5)).sample(SampleNoise([9]))
    batch = gaussian(0.0, 1.0, (2, 3, 4, 5)).sample(SampleNoise([8, 9]))
    assert torch.equal(batch[1:], alone)


def test_the_log_variance_is_clamped() -> None:
    moments = torch.tensor([0.0, 1e6]).view(1, 2, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert float(posterior.logvar) == 20.0
    assert torch.isfinite(posterior.var).all()
    assert float(DiagonalGaussian(-moments).logvar) == -30.0


def test_every_vector_becomes_its_nearest_code() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(32, 5)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(32, 5, generator=generator))
    z = torch.randn(2, 5, 6, 7, generator=generator)
    found = quantizer(z)
    distances = torch.cdist(z.movedim(1, -1).reshape(-1, 5), quantizer.embedding.weight)
    expected = distances.argmin(dim=1).view(2, 6, 7)
    assert torch.equal(found.indices, expected)
    # z + (e - z) is e but for one rounding
    torch.testing.assert_close(found.z_q, quantizer.lookup(expected), rtol=0, atol=1e-6)
    again = quantizer(found.z_q)
    assert torch.equal(again.indices, expected)
    assert again.loss.item() < 1e-12


def test_the_commitment_weight_is_the_encoders() -> None:
    quantizer = VectorQuantizer(4, 2, commitment_weight=0.25)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    found = quantizer(z)
    found.loss.backward()
    codes = quantizer.lookup(found.indices).detach()
    count = z.numel()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z.detach() - codes) / count)
    expected = torch.zeros(4, 2)
    pull = (2 * (codes - z.detach()) / count).movedim(1, -1).reshape(-1, 2)
    expected.index_add_(0, found.indices.flatten(), pull)
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)
    torch.testing.assert_close(found.loss, 1.25 * F.mse_loss(z, codes))


def test_gradients_pass_straight_through() -> None:
    quantizer = VectorQuantizer(4, 2)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    weight = torch.randn(1, 2, 3, 3)
    (quantizer(z).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_half_precision_finds_the_codes_of_float32() -> None:
    """In bf16 products neighbouring codes would be confused; the search leaves autocast."""
    quantizer = VectorQuantizer(256, 4)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(10.0 + 0.01 * torch.randn(256, 4))
    z = (10.0 + 0.01 * torch.randn(1, 4, 8, 8)).float()
    expected = quantizer(z).indices
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).indices, expected)


def test_dead_codes_are_moved_onto_the_data() -> None:
    quantizer = VectorQuantizer(16, 3)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[:2] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    quantizer.reset_usage()
    z = torch.rand(4, 3, 5, 5)
    quantizer(z)
    assert int(quantizer.usage.sum()) == 100
    assert int((quantizer.usage > 0).sum()) == 2
    kept = quantizer.embedding.weight[:2].clone()
    assert quantizer.reseed_dead(z, torch.Generator().manual_seed(0)) == 14
    assert torch.equal(quantizer.embedding.weight[:2], kept)
    vectors = z.movedim(1, -1).reshape(-1, 3)
    distance = torch.cdist(quantizer.embedding.weight[2:], vectors).amin(dim=1)
    assert distance.max().item() < 1e-3  # cdist's own rounding
    quantizer.reset_usage()
    quantizer(z)
    assert bool((quantizer.usage[2:] > 0).all())


def test_usage_is_counted_in_training_alone_and_is_no_weight() -> None:
    quantizer = VectorQuantizer(16, 3).eval()
    quantizer(torch.rand(1, 3, 4, 4))
    assert int(quantizer.usage.sum()) == 0
    assert list(quantizer.state_dict()) == ["embedding.weight"]


def test_fewer_vectors_than_dead_codes() -> None:
    quantizer = VectorQuantizer(16, 3)
    assert quantizer.reseed_dead(torch.rand(1, 3, 2, 2), torch.Generator().manual_seed(0)) == 16
    assert len(quantizer.embedding.weight.unique(dim=0)) == 4
