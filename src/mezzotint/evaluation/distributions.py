"""Distances between distributions of pictures, from the features of samples of them, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import DataError

__all__ = [
    "Estimate",
    "FeatureStatistics",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kid",
    "nearest_neighbours",
    "polynomial_kernel",
    "precision_recall",
]

_BLOCK = 2048  # rows and columns of a matrix between samples that stand in memory at once


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample, and how far it is likely off.

    Attributes:
        value: The estimate.
        standard_error: The standard deviation that it would have over samples of this size.
    """

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, all that the Fréchet distance looks at.

    Attributes:
        count: Number of images.
        mean: ``(d,)`` float64.
        covariance: ``(d, d)`` float64, unbiased: divided by ``count - 1``.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Measure features ``(N, d)``.

        Raises:
            DataError: If there are fewer than 2 images, or a feature is not finite.
        """
        _require("FID", features, 2, "images")
        mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        for part in features.split(_BLOCK):
            mean += part.double().sum(0)
        mean /= len(features)
        scatter = mean.new_zeros(len(mean), len(mean))
        for part in features.split(_BLOCK):
            centred = part.double() - mean
            scatter.addmm_(centred.T, centred)
        degrees = len(features) - 1
        statistics = cls(len(features), mean, scatter / degrees)
        if degrees < len(mean):
            # so few images are a root themselves, which saves looking for one
            vars(statistics)["root"] = (features.double() - mean).T / degrees**0.5
        return statistics

    def merge(self, other: Self) -> Self:
        """Return the statistics of both samples together (Chan et al. 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter.addr_(apart, apart, alpha=self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return type(self)(count, mean, scatter / (count - 1))

    @cached_property
    def root(self) -> Tensor:
        """R ``(d, r)`` with ``R R^T`` the covariance.

        A sample of N has rank N - 1 at most. Eigenvalues beyond it, and those that rounding alone
        can make, are dropped: their square roots would not be small any more.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        dim = len(values)
        floor = float(values[-1].clamp(min=0.0)) * dim * torch.finfo(torch.float64).eps
        kept = values > floor
        kept[: max(0, dim - (self.count - 1))] = False  # eigenvalues rise
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Fréchet distance of two Gaussians (FID, arXiv 1706.08500, equation 6).

    ``|m_a - m_b|^2 + Tr C_a + Tr C_b - 2 Tr (C_a C_b)^(1/2)``. With ``C = R R^T`` on either side
    the eigenvalues of ``C_a C_b`` are the squared singular values of ``R_a^T R_b``, so that their
    roots are found without squaring first and no covariance needs to be regular.

    Args:
        a: Of one sample.
        b: Of the other.
    """
    both = torch.linalg.svdvals(a.root.T @ b.root).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2.0 * both
    return max(0.0, float(distance))


def kid(
    generated: Tensor,
    real: Tensor,
    *,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the kernel distance (KID, arXiv 1801.01401, section 4).

    The squared maximum mean discrepancy of the kernel ``(x.y / d + 1)^3``, unbiased: 0 on average
    where the distributions are the same, and then below 0 as often as not.

    The standard error is the jackknife's, which leaves out each image of either sample in turn. It
    is right where the distributions differ; where they are the same the statistic degenerates, and
    the jackknife overstates, by up to a factor of 1.41 (Efron and Stein 1981).

    Args:
        generated: Features ``(N, d)``.
        real: Features ``(M, d)``.
        subsets: Average over this many random subsets, as the customary 100; None takes all pairs
            of images, which uses a sample best. The standard error of an average counts that its
            subsets share images; it is not the deviation among them that other programs print.
        subset_size: Images in each.
        seed: Of the subsets, drawn with numpy's `RandomState` as in torch-fidelity.

    Raises:
        DataError: If there are fewer than 3 images, or than ``subset_size``, on either side, or a
            feature is not finite.
    """
    needed = 3 if subsets is None else max(3, subset_size)
    _require("KID", generated, needed, "generated images")
    _require("KID", real, needed, "real images")
    _require_same_width(generated, real)
    if subsets is None:
        value, variance = _discrepancy(generated, real)
        return Estimate(value, variance**0.5)
    random = np.random.RandomState(seed)
    found: list[tuple[float, float]] = []
    for _ in range(subsets):
        x, y = (
            side[torch.from_numpy(random.choice(len(side), subset_size, replace=False))]
            for side in (generated, real)
        )
        found.append(_discrepancy(x, y))
    value, variance = np.asarray(found).mean(0)
    # two subsets share this part of their images, and so of their variance
    shared = subset_size / min(len(generated), len(real))
    return Estimate(float(value), float(variance * (shared + (1.0 - shared) / subsets)) ** 0.5)


def _discrepancy(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The unbiased squared discrepancy and its jackknife variance."""
    m, n = len(x), len(y)
    xx, yy = _kernel_sums(x), _kernel_sums(y)
    xy, yx = _cross_kernel_sums(x, y)
    total_x, total_y, cross = xx.sum(), yy.sum(), xy.sum()
    within_x, within_y = total_x / (m * (m - 1)), total_y / (n * (n - 1))
    value = within_x + within_y - 2.0 * cross / (m * n)
    without_x = (total_x - 2.0 * xx) / ((m - 1) * (m - 2)) - 2.0 * (cross - xy) / ((m - 1) * n)
    without_y = (total_y - 2.0 * yy) / ((n - 1) * (n - 2)) - 2.0 * (cross - yx) / (m * (n - 1))
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return float(value), float(variance)


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return KID's kernel ``(x . y / d + 1)**3`` between rows, ``(M, d)`` and ``(N, d)``.

    Returns:
        ``(M, N)`` float64 (arXiv 1801.01401, section 4).
    """
    return (a.double() @ b.double().T / a.shape[1] + 1.0) ** 3


def _kernel_sums(x: Tensor) -> Tensor:
    """The sum ``(N,)`` of the kernel between each row and all others."""
    sums = x.new_zeros(len(x), dtype=torch.float64)
    for rows, columns in _blocks(len(x), len(x)):
        if columns.start < rows.start:  # symmetric
            continue
        block = polynomial_kernel(x[rows], x[columns])
        if rows == columns:
            block.fill_diagonal_(0.0)
        else:
            sums[columns] += block.sum(0)
        sums[rows] += block.sum(1)
    return sums


def _cross_kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    by_row, by_column = (side.new_zeros(len(side), dtype=torch.float64) for side in (x, y))
    for rows, columns in _blocks(len(x), len(y)):
        block = polynomial_kernel(x[rows], y[columns])
        by_row[rows] += block.sum(1)
        by_column[columns] += block.sum(0)
    return by_row, by_column


def inception_score(
    logits: Tensor, *, splits: int = 10, shuffle_seed: int | None = 2020
) -> Estimate:
    """Return the Inception Score (arXiv 1606.03498, section 4): from 1 to the number of classes.

    ``exp(E_x KL(p(y|x) || p(y)))``, averaged over parts of the sample. Written with entropies,
    ``exp(H(p(y)) - E_x H(p(y|x)))``, it tells at once what it would be without each image; the
    standard error is the jackknife's. (What papers print after ± is the deviation among the parts.)

    Args:
        logits: ``(N, K)``.
        splits: Number of parts.
        shuffle_seed: Of the order before it is split, drawn with numpy's `RandomState` as in
            torch-fidelity; None keeps the order.

    Raises:
        DataError: If there are fewer than 2 images to a part, or a logit is not finite.
    """
    _require("the Inception Score", logits, 2 * splits, "images")
    count = len(logits)
    order = torch.arange(count)
    if shuffle_seed is not None:
        order = torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(count))
    scores: list[float] = []
    variances: list[float] = []
    for k in range(splits):
        part = logits[order[k * count // splits : (k + 1) * count // splits]].double()
        value, variance = _exponential_information(F.log_softmax(part, dim=1))
        scores.append(value)
        variances.append(variance)
    return Estimate(sum(scores) / splits, sum(variances) ** 0.5 / splits)


def _exponential_information(log_p: Tensor) -> tuple[float, float]:
    """``exp`` of the mutual information of image and class, and its jackknife variance."""
    p, n = log_p.exp(), len(log_p)
    entropies = -(p * log_p).sum(1)
    marginal = p.mean(0)
    score = (_entropy(marginal) - entropies.mean()).exp()
    # what is left may round to just below 0 where one image has all of a class
    marginals = ((n * marginal - p) / (n - 1)).clamp(min=0.0)
    without = (_entropy(marginals) - (entropies.sum() - entropies) / (n - 1)).exp()
    return float(score), float((n - 1) * without.var(correction=0))


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equation 2).

    Precision is the share of generated images in the manifold of the real ones: within the distance
    of a real image to its k-th nearest other. Recall is the same with the parts exchanged.

    Args:
        generated: Features ``(N, d)``.
        real: Features ``(M, d)``.
        k: Neighbours.

    Raises:
        DataError: If there are ``k`` images or fewer on either side, or a feature is not finite.
    """
    _require("precision", generated, k + 1, "generated images")
    _require("precision", real, k + 1, "real images")
    _require_same_width(generated, real)
    radii_generated, radii_real = _squared_radii(generated, k), _squared_radii(real, k)
    inside_real = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    inside_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, squares in _squared_distances(generated, real):
        inside_real[rows] |= (squares <= radii_real[columns]).any(1)
        inside_generated[columns] |= (squares <= radii_generated[rows, None]).any(0)
    return float(inside_real.double().mean()), float(inside_generated.double().mean())


def density_coverage(generated: Tensor, real: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Return density and coverage (Naeem et al., arXiv 2002.09797, equations 3 and 4).

    Density counts in how many real images' neighbourhoods a generated image lies, over k: it may
    exceed 1, and an outlier among the real images counts once. Coverage is the share of real images
    with a generated one in their neighbourhood.

    Args:
        generated: Features ``(N, d)``.
        real: Features ``(M, d)``.
        k: Neighbours.

    Raises:
        DataError: If there is no generated image, ``k`` real ones or fewer, or a feature is not
            finite.
    """
    _require("density", generated, 1, "generated images")
    _require("density", real, k + 1, "real images")
    _require_same_width(generated, real)
    radii = _squared_radii(real, k)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    memberships = 0
    for _rows, columns, squares in _squared_distances(generated, real):
        inside = squares <= radii[columns]
        memberships += int(inside.sum())
        covered[columns] |= inside.any(0)
    return memberships / (k * len(generated)), float(covered.double().mean())


def nearest_neighbours(
    features: Tensor, reference: Tensor, *, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the nearest reference to each image, by Euclidean distance.

    Generated images that are nearer to training images than these are to one another are copies.

    Args:
        features: ``(N, d)``.
        reference: ``(M, d)``.
        exclude_self: Whether the two are the same images and each should find another.

    Returns:
        Distances ``(N,)`` float64, exactly 0 for equal features, and indices ``(N,)`` int64.

    Raises:
        DataError: If there is no image to find, or a feature is not finite.
    """
    assert not exclude_self or len(features) == len(reference)
    _require("the nearest neighbour", features, 1, "images")
    _require("the nearest neighbour", reference, 1 + exclude_self, "reference images")
    _require_same_width(features, reference)
    _, indices = _smallest(features, reference, 1, exclude_self)
    nearest = indices[:, 0]
    distances = torch.cat(
        [
            (part.double() - reference[index].double()).norm(dim=1)
            for part, index in zip(features.split(_BLOCK), nearest.split(_BLOCK), strict=True)
        ]
    )
    return distances, nearest


def _squared_radii(features: Tensor, k: int) -> Tensor:
    """The squared distance ``(N,)`` of each row to its k-th nearest other."""
    return _smallest(features, features, k, exclude_self=True)[0][:, -1]


def _smallest(a: Tensor, b: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """The k smallest squared distances ``(N, k)`` from each row of a to rows of b, and which."""
    squares = a.new_full((len(a), k), torch.inf, dtype=torch.float64)
    indices = torch.zeros(len(a), k, dtype=torch.int64, device=a.device)
    for rows, columns, block in _squared_distances(a, b):
        if exclude_self and rows == columns:
            block.fill_diagonal_(torch.inf)
        near = block.topk(min(k, block.shape[1]), dim=1, largest=False)
        best = torch.cat([squares[rows], near.values], 1).topk(k, dim=1, largest=False)
        squares[rows] = best.values
        found = torch.cat([indices[rows], near.indices + columns.start], 1)
        indices[rows] = found.gather(1, best.indices)
    return squares, indices


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the squared distances between rows of a and rows of b, block by block."""
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2 loses less where the origin is in the middle
    origin = b[:_BLOCK].double().mean(0)
    for rows, columns in _blocks(len(a), len(b)):
        x, y = a[rows].double() - origin, b[columns].double() - origin
        of_x, of_y = x.square().sum(1, keepdim=True), y.square().sum(1, keepdim=True)
        left = torch.cat([x.mul_(-2.0), of_x, torch.ones_like(of_x)], 1)
        right = torch.cat([y, torch.ones_like(of_y), of_y], 1)
        # what float64 cannot tell from 0, which equal images shall have
        least = 1e-13 * float(of_x.max() + of_y.max())
        yield rows, columns, torch.threshold_(left @ right.T, least, 0.0)


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            yield slice(i, min(i + _BLOCK, rows)), slice(j, min(j + _BLOCK, columns))


def _require(metric: str, features: Tensor, count: int, what: str) -> None:
    if len(features) < count:
        raise DataError(
            f"{metric}: {len(features)} {what} are too few; it needs at least {count:,}"
        )
    for part in features.split(_BLOCK):
        if not bool(part.isfinite().all()):
            raise DataError(f"{metric}: the features of the {what} are not all finite")


def _require_same_width(generated: Tensor, real: Tensor) -> None:
    if generated.shape[1] != real.shape[1]:
        raise DataError(
            f"features of width {generated.shape[1]} and {real.shape[1]} are of different"
            " networks; compare those of the same"
        )
