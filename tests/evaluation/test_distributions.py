"""Distances of distributions against closed forms, SciPy and numpy; calibration by drawing."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mezzotint.errors import DataError
from mezzotint.evaluation import distributions
from mezzotint.evaluation.distributions import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    nearest_neighbours,
    precision_recall,
)


def draw(count: int, dim: int, seed: int, shift: float = 0.0, rank: int = 6) -> Tensor:
    """Features as of a network: rectified, correlated, float32."""
    mixing = torch.randn(rank, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, rank, generator=generator)
    x[:, 0] += shift
    return (x @ mixing + 0.3 * torch.randn(count, dim, generator=generator)).relu()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum here goes over several blocks, the last of them short."""
    monkeypatch.setattr(distributions, "_BLOCK", 64)


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics(10_000, mean.double(), covariance.double())


def test_frechet_distance_of_diagonal_gaussians():
    """|m - n|^2 + sum (s - t)^2, since diagonal covariances commute."""
    m, n = torch.randn(2, 7).double()
    s, t = torch.rand(2, 7).double()
    t[2] = s[4] = 0.0
    found = frechet_distance(gaussian(m, (s**2).diag()), gaussian(n, (t**2).diag()))
    expected = float((m - n).square().sum() + (s - t).square().sum())
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_rotated_gaussians():
    """Rotated about each other in a plane: Tr (C_a C_b)^(1/2) of 2x2 matrices has a closed form."""
    angle = 0.7
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    a = torch.tensor([9.0, 1.0], dtype=torch.float64).diag()
    b = turn @ torch.tensor([4.0, 0.25], dtype=torch.float64).diag() @ turn.T
    # (Tr M^(1/2))^2 = Tr M + 2 (det M)^(1/2)
    both = math.sqrt(float((a @ b).trace()) + 2.0 * math.sqrt(float(torch.det(a @ b))))
    zero = torch.zeros(2)
    found = frechet_distance(gaussian(zero, a), gaussian(zero, b))
    assert found == pytest.approx(10.0 + 4.25 - 2.0 * both, rel=1e-12)


def test_frechet_distance_equals_scipys_root():
    x, y = draw(400, 48, 0), draw(300, 48, 1, shift=0.5) * 1.2
    found = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    a, b = x.double().numpy(), y.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    apart = a.mean(0) - b.mean(0)
    expected = apart @ apart + np.trace(ca) + np.trace(cb) - 2.0 * np.trace(root)
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_images_than_dimensions():
    """Covariances of rank N - 1: their product's roots are the singular values of X Y^T."""
    x, y = draw(40, 200, 0, rank=50), draw(70, 200, 1, shift=0.5, rank=50)
    found = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    a, b = (s.double() - s.double().mean(0) for s in (x, y))
    both = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(39 * 69)
    apart = x.double().mean(0) - y.double().mean(0)
    traces = a.square().sum() / 39 + b.square().sum() / 69
    assert found == pytest.approx(float(apart @ apart + traces - 2.0 * both), rel=1e-9)
    # the same where only covariances are known, as after a merge
    merged = FeatureStatistics.of(x[:10]).merge(FeatureStatistics.of(x[10:]))
    assert frechet_distance(merged, FeatureStatistics.of(y)) == pytest.approx(found, rel=1e-7)
    assert frechet_distance(merged, FeatureStatistics.of(x.flip(0))) < 1e-7 * float(traces)


def test_constant_features_have_a_distance_too():
    x, y = torch.full((5, 3), 1.0), torch.full((4, 3), 3.0)
    found = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert found == pytest.approx(12.0)


def test_statistics_merge_as_if_they_were_one():
    x = draw(150, 12, 0) + 1000.0  # far from 0, where squares would lose digits
    whole = FeatureStatistics.of(x)
    merged = FeatureStatistics.of(x[:7]).merge(FeatureStatistics.of(x[7:]))
    assert merged.count == whole.count == 150
    expected = np.cov(x.double().numpy(), rowvar=False)
    for found in (whole, merged):
        np.testing.assert_allclose(found.mean, x.double().numpy().mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-12)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    m, n = len(x), len(y)
    within_x = (kernel(x, x).sum() - np.trace(kernel(x, x))) / (m * (m - 1))
    within_y = (kernel(y, y).sum() - np.trace(kernel(y, y))) / (n * (n - 1))
    return within_x + within_y - 2.0 * kernel(x, y).mean()


def test_kid_and_its_jackknife_equal_the_definition():
    x, y = draw(130, 24, 0), draw(90, 24, 1, shift=0.4)
    found = kid(x, y)
    a, b = x.double().numpy(), y.double().numpy()
    assert found.value == pytest.approx(plain_kid(a, b), rel=1e-10)
    without_x = np.array([plain_kid(np.delete(a, i, 0), b) for i in range(len(a))])
    without_y = np.array([plain_kid(a, np.delete(b, i, 0)) for i in range(len(b))])
    variance = sum((len(w) - 1) * w.var() for w in (without_x, without_y))
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-8)


def test_kid_of_gaussians_is_unbiased_to_its_closed_form():
    """In one dimension E (1 + xy)^3 = sum of binomials times products of moments."""

    def moments(mean: float) -> tuple[float, ...]:
        return 1.0, mean, mean**2 + 1.0, mean**3 + 3.0 * mean

    def expectation(a: float, b: float) -> float:
        binomials = (1.0, 3.0, 3.0, 1.0)
        return sum(c * p * q for c, p, q in zip(binomials, moments(a), moments(b), strict=True))

    shift = 0.5
    expected = expectation(0, 0) + expectation(shift, shift) - 2.0 * expectation(0, shift)
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    y = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1)) + shift
    values = torch.tensor([kid(a, b).value for a, b in zip(x.split(50), y.split(50), strict=True)])
    assert abs(float(values.mean()) - expected) < 3.0 * float(values.std()) / 20.0


@pytest.mark.parametrize(
    ("shift", "options", "overstates"),
    [
        (0.0, {}, (1.25, 1.6)),
        (0.8, {}, (0.85, 1.15)),
        # what subsets share is counted as if the statistic were linear, which is cautious
        (0.8, {"subsets": 10, "subset_size": 60}, (0.85, 1.6)),
    ],
)
def test_kid_tells_how_sure_it_is(
    shift: float, options: dict[str, int], overstates: tuple[float, float]
):
    """The standard error against the deviation over drawn samples, of equal laws and of others.

    Over 150 samples the deviation itself is known to 6 %, to 15 % where it is skewed.
    """
    estimates = [
        kid(draw(120, 24, 2 * k, shift), draw(120, 24, 2 * k + 1), **options) for k in range(150)
    ]
    values = np.array([e.value for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    low, high = overstates
    assert low < np.sqrt((errors**2).mean()) / values.std() < high
    within = np.abs(values - values.mean()) < 2.0 * errors
    assert within.mean() >= 0.93


def test_two_halves_of_the_same_data_are_within_two_standard_errors_of_zero():
    data = draw(200, 24, 0)
    hits = 0
    for seed in range(100):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        found = kid(data[order[:100]], data[order[100:]])
        hits += abs(found.value) <= 2.0 * found.standard_error
    assert hits >= 95


def test_kid_in_subsets_is_reproducible_and_of_all_images_equal_to_the_whole():
    x, y = draw(90, 16, 0), draw(120, 16, 1, shift=0.3)
    options = {"subsets": 5, "subset_size": 40}
    assert kid(x, y, seed=3, **options) == kid(x, y, seed=3, **options)
    assert kid(x, y, seed=3, **options) != kid(x, y, seed=4, **options)
    whole = kid(x, y[:90])
    again = kid(x, y[:90], subsets=2, subset_size=90)
    assert again.value == pytest.approx(whole.value, rel=1e-10)
    assert again.standard_error == pytest.approx(whole.standard_error, rel=1e-10)


def test_inception_score_of_certain_and_of_clueless_classifiers():
    sure = torch.eye(4).repeat_interleave(10, dim=0) * 1000.0
    assert inception_score(sure, splits=1).value == pytest.approx(4.0)
    assert inception_score(torch.zeros(40, 4)).value == pytest.approx(1.0)
    # in its order each half has two of the classes
    assert inception_score(sure, splits=2, shuffle_seed=None).value == pytest.approx(2.0)
    assert inception_score(sure, splits=2).value > 3.0


def test_inception_score_equals_the_definition():
    logits = torch.randn(107, 9, generator=torch.Generator().manual_seed(0)) * 2.0
    found = inception_score(logits, splits=10, shuffle_seed=5)
    shuffled = logits.double().numpy()[np.random.RandomState(5).permutation(107)]
    p = np.exp(shuffled) / np.exp(shuffled).sum(1, keepdims=True)
    scores = []
    for k in range(10):
        part = p[k * 107 // 10 : (k + 1) * 107 // 10]
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert found.value == pytest.approx(np.mean(scores), rel=1e-10)
    # the deviation among parts estimates the same, though only from ten numbers
    among = np.std(scores, ddof=1) / math.sqrt(10)
    assert 0.4 < found.standard_error / among < 2.5


def test_the_inception_score_tells_how_sure_it_is():
    generator = torch.Generator().manual_seed(0)
    estimates = [
        inception_score(torch.randn(400, 6, generator=generator) * 2.0, splits=2)
        for _ in range(100)
    ]
    deviation = np.std([e.value for e in estimates])
    assert 0.8 < np.mean([e.standard_error for e in estimates]) / deviation < 1.25


def plain_distances(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def test_precision_and_recall_equal_the_definition():
    generated, real = draw(150, 10, 0, shift=0.8), draw(100, 10, 1)
    radii_real = np.sort(plain_distances(real, real), 1)[:, 3]
    radii_generated = np.sort(plain_distances(generated, generated), 1)[:, 3]
    between = plain_distances(generated, real)
    expected = (
        (between <= radii_real).any(1).mean(),
        (between <= radii_generated[:, None]).any(0).mean(),
    )
    assert 0.2 < expected[0] < 0.95
    assert precision_recall(generated, real) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_equal_the_definition():
    generated, real = draw(150, 10, 0, shift=0.8), draw(100, 10, 1)
    radii = np.sort(plain_distances(real, real), 1)[:, 5]
    inside = plain_distances(generated, real) <= radii
    expected = inside.sum() / (5 * 150), inside.any(0).mean()
    assert density_coverage(generated, real) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_tell_two_failures_apart():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4) * 50.0

    def around(modes: list[int], count: int) -> Tensor:
        where = torch.tensor([modes[i % len(modes)] for i in range(count)])
        return centres[where] + torch.randn(count, 4, generator=generator)

    real = around([0, 1], 300)
    precision, recall = precision_recall(around([0], 300), real)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    precision, recall = precision_recall(around([0, 1, 2, 3], 600), real)
    assert 0.4 < precision < 0.55
    assert recall > 0.9
    assert density_coverage(around([0, 1], 300), real) == pytest.approx((1.0, 0.95), abs=0.12)


def test_copies_of_training_images_are_at_distance_zero():
    training, fresh = draw(200, 32, 0), draw(20, 32, 1)
    generated = torch.cat([training[[150, 3]], fresh])
    distances, indices = nearest_neighbours(generated, training)
    assert indices[:2].tolist() == [150, 3]
    assert distances[:2].tolist() == [0.0, 0.0]
    between = plain_distances(fresh, training)
    np.testing.assert_allclose(distances[2:], between.min(1), rtol=1e-12)
    assert np.array_equal(indices[2:], between.argmin(1))


def test_a_neighbour_other_than_itself():
    x = draw(150, 16, 0)
    x[77] = x[5]
    distances, indices = nearest_neighbours(x, x, exclude_self=True)
    assert indices[[5, 77]].tolist() == [77, 5]
    between = plain_distances(x, x)
    np.fill_diagonal(between, np.inf)
    np.testing.assert_allclose(distances, between.min(1), rtol=1e-12)


X = torch.rand(4, 3)
FEW: dict[str, tuple[Callable[[], object], str]] = {
    "fid": (lambda: FeatureStatistics.of(X[:1]), "FID: 1 images are too few.* at least 2"),
    "kid": (lambda: kid(X, X[:2]), "KID: 2 real images are too few.* at least 3"),
    "kid in subsets": (lambda: kid(X, X, subsets=100), "4 generated images .* at least 1,000"),
    "is": (lambda: inception_score(X), "Inception Score: 4 images .* at least 20"),
    "precision": (lambda: precision_recall(X, X, k=4), "4 generated images .* at least 5"),
    "coverage": (lambda: density_coverage(X[:1], X), "4 real images .* at least 6"),
    "neighbour": (lambda: nearest_neighbours(X[:1], X[:1], exclude_self=True), "at least 2"),
    "width": (lambda: kid(X, torch.rand(5, 2)), "width 3 and 2 are of different networks"),
    "nan": (lambda: kid(X, X * float("nan")), "features of the real images are not all finite"),
}


@pytest.mark.parametrize("case", FEW)
def test_too_few_images_are_refused_with_the_number_that_is_needed(case: str):
    call, message = FEW[case]
    with pytest.raises(DataError, match=message):
        call()
