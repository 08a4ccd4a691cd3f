"""From features to the numbers of a protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mezzotint.evaluation.card import Number
from mezzotint.evaluation.distributions import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    nearest_neighbours,
    precision_recall,
)
from mezzotint.evaluation.metrics import retrieval_accuracy
from mezzotint.evaluation.pictures import evenly
from mezzotint.evaluation.protocol import EvaluationProtocol, Metric
from mezzotint.models.features import metric_name
from mezzotint.rng import keyed_generator

__all__ = ["Seen", "score"]

_BOOTSTRAP = 200  # resamples of a median


@dataclass(frozen=True, eq=False)
class Seen:
    """The features that a protocol's numbers are computed from, each ``(N, d)`` by network.

    Attributes:
        generated: Of the pictures that are judged.
        logits: Of the same, ``(N, K)``, for the networks that have them.
        real: Of the reference.
        training: Of the training pictures, which may be the same as the reference.
        checksums: SHA-256 of the weights by network, on which the names of the numbers depend.
        targets: ``(N,)``, by judged picture: which of the reference its caption is of.
    """

    generated: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]
    real: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    checksums: Mapping[str, str]
    targets: Tensor | None = None


def score(
    protocol: EvaluationProtocol, seen: Seen, metrics: Sequence[Metric] | None = None
) -> dict[str, Number]:
    """Compute metrics of a protocol, in its order.

    Args:
        protocol: What is computed, and how.
        seen: The features.
        metrics: Those of its metrics that can be computed here; by default all.

    Returns:
        By name; one metric may give several numbers.

    Raises:
        DataError: If there are too few pictures for one of them.
    """
    pairs: dict[str, Callable[[], tuple[Number, Number]]] = {
        "precision": partial(_precision_recall, protocol, seen),
        "density": partial(_density_coverage, protocol, seen),
    }
    both: dict[str, tuple[Number, Number]] = {}
    numbers: dict[str, Number] = {}
    for metric in protocol.metrics if metrics is None else metrics:
        network = protocol.network_of(metric)
        match metric:
            case "precision" | "recall" | "density" | "coverage":
                first = "precision" if metric in ("precision", "recall") else "density"
                if first not in both:  # the two of a pair share their distances
                    both[first] = pairs[first]()
                value = both[first][0 if metric == first else 1]
            case "kid":
                value = _kid(protocol, seen)
            case "fid":
                value = _fid(seen.generated[network], seen.real[network], protocol.resamples)
            case "inception_score":
                estimate = inception_score(
                    seen.logits[network],
                    splits=protocol.inception_splits,
                    shuffle_seed=protocol.inception_shuffle_seed,
                )
                value = Number(value=estimate.value, standard_error=estimate.standard_error)
            case "retrieval":
                value = _retrieval(protocol, seen)
            case "nearest_training":
                numbers |= _nearest(protocol, seen)
                continue
            case "rate" | "psnr" | "ssim" | "lpips" | "rkid" | "rfid":
                raise AssertionError("of first stages, which are measured elsewhere")
        numbers[metric_name(metric, network, seen.checksums[network])] = value
    return numbers


def _kid(protocol: EvaluationProtocol, seen: Seen) -> Number:
    estimate = kid(
        seen.generated[protocol.network],
        seen.real[protocol.network],
        subsets=protocol.kid_subsets,
        subset_size=protocol.kid_subset_size,
        seed=protocol.kid_seed,
    )
    return Number(value=estimate.value, standard_error=estimate.standard_error)


def _fid(generated: Tensor, real: Tensor, groups: int) -> Number:
    """FID, and its standard error by leaving out every ``groups``-th generated picture in turn.

    The delete-a-group jackknife: sqrt((g - 1) / g * sum (theta_i - mean)^2) over the g values that
    lack a group. It tells how much another set of drawn pictures would give, not FID's bias.
    """
    truth = FeatureStatistics.of(real)
    value = frechet_distance(FeatureStatistics.of(generated), truth)
    if not groups:
        return Number(value=value)
    parts = [FeatureStatistics.of(generated[k::groups]) for k in range(groups)]
    without: list[float] = []
    for k in range(groups):
        first, *others = parts[:k] + parts[k + 1 :]
        for other in others:
            first = first.merge(other)
        without.append(frechet_distance(first, truth))
    values = torch.tensor(without, dtype=torch.float64)
    error = ((groups - 1) * values.var(correction=0)).sqrt()
    return Number(value=value, standard_error=float(error))


def _precision_recall(protocol: EvaluationProtocol, seen: Seen) -> tuple[Number, Number]:
    network = protocol.network_of("precision")
    sides = seen.generated[network], _of_manifold(protocol, seen.real[network])
    if protocol.real_side == "evaluated":
        sides = sides[1], sides[0]
    precision, recall = precision_recall(*sides, k=protocol.manifold_k)
    return (
        _share(precision, len(sides[0]), protocol.resamples),
        _share(recall, len(sides[1]), protocol.resamples),
    )


def _density_coverage(protocol: EvaluationProtocol, seen: Seen) -> tuple[Number, Number]:
    network = protocol.network_of("density")
    generated, real = seen.generated[network], _of_manifold(protocol, seen.real[network])
    density, coverage = density_coverage(generated, real, k=protocol.density_k)
    return Number(value=density), _share(coverage, len(real), protocol.resamples)


def _of_manifold(protocol: EvaluationProtocol, real: Tensor) -> Tensor:
    most = protocol.manifold_reference_samples
    return real if most is None else real[evenly(most, len(real))]


def _retrieval(protocol: EvaluationProtocol, seen: Seen) -> Number:
    network = protocol.network
    assert seen.targets is not None, "left out where captions name no picture"
    found = retrieval_accuracy(seen.generated[network], seen.real[network], seen.targets)
    error = found.standard_error if protocol.resamples else None
    return Number(value=found.value, standard_error=error)


def _share(share: float, count: int, resamples: int) -> Number:
    """A share of pictures; sqrt(p (1 - p) / n) is what bootstrapping these would converge to."""
    error = (share * (1.0 - share) / count) ** 0.5 if resamples else None
    return Number(value=share, standard_error=error)


def _nearest(protocol: EvaluationProtocol, seen: Seen) -> dict[str, Number]:
    """How near to the training pictures the drawn ones are, as medians of distances.

    The ratio is to the median distance of a training picture to the nearest other one: about 1
    where drawn pictures are as new as these are to one another, far below 1 where they are copies.
    """
    network = protocol.network
    generated, training = seen.generated[network], seen.training[network]
    distances = nearest_neighbours(generated, training)[0].double()
    among = float(nearest_neighbours(training, training, exclude_self=True)[0].double().median())
    value, error = float(distances.median()), None
    if protocol.resamples:
        generator = keyed_generator(0, len(distances))
        shape = (_BOOTSTRAP, len(distances))
        rows = torch.randint(len(distances), shape, generator=generator)
        error = float(distances[rows].median(dim=1).values.std())
    result = {"nearest_training": Number(value=value, standard_error=error)}
    if among > 0:  # it is 0 where half of the training pictures are there twice
        ratio_error = None if error is None else error / among
        result["nearest_training_ratio"] = Number(value=value / among, standard_error=ratio_error)
    sha256 = seen.checksums[network]
    return {metric_name(name, network, sha256): number for name, number in result.items()}
