"""Numbers of a protocol are those of the distances, under their names, with honest errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.evaluation.distributions import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.evaluation.scores import Seen, score


def gaussian(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def seen(generated: Tensor, real: Tensor, training: Tensor | None = None) -> Seen:
    return Seen(
        {"random": generated},
        {"random": generated},
        {"random": real},
        {"random": real if training is None else training},
        {"random": "0" * 64},
    )


def changed(protocol: EvaluationProtocol, **changes: Any) -> EvaluationProtocol:
    return EvaluationProtocol.from_dict(protocol.to_dict() | changes)


def test_every_number_stands_under_its_name_in_order(protocol: EvaluationProtocol) -> None:
    x, y = gaussian(60, 0, 0.3), gaussian(50, 1)
    told = changed(protocol, metrics=[*protocol.metrics, "inception_score", "retrieval"])
    numbers = score(told, replace(seen(x, y), targets=torch.arange(60) % 50))
    assert list(numbers) == [
        f"{name}_random"
        for name in (
            "kid",
            "fid",
            "precision",
            "recall",
            "density",
            "coverage",
            "nearest_training",
            "nearest_training_ratio",
            "inception_score",
            "retrieval",
        )
    ]
    assert list(score(told, seen(x, y), ("recall", "fid"))) == ["recall_random", "fid_random"]
    found = {name.removesuffix("_random"): n.value for name, n in numbers.items()}
    fid = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert found["kid"] == kid(x, y).value
    assert found["fid"] == fid
    assert (found["precision"], found["recall"]) == precision_recall(x, y, k=3)
    assert (found["density"], found["coverage"]) == density_coverage(x, y, k=5)
    assert found["inception_score"] == inception_score(x).value


def test_which_side_is_real_is_the_protocols(protocol: EvaluationProtocol) -> None:
    """A narrow sample inside a wide one: all precision and little recall."""
    narrow, wide = gaussian(60, 0) * 0.2, gaussian(60, 1)
    numbers = score(protocol, seen(narrow, wide))
    turned = score(changed(protocol, real_side="evaluated"), seen(narrow, wide))
    assert numbers["precision_random"].value > 0.9 > 0.5 > numbers["recall_random"].value
    assert turned["precision_random"].value == numbers["recall_random"].value
    assert turned["recall_random"].value == numbers["precision_random"].value


def test_standard_errors_tell_the_spread_over_samples(protocol: EvaluationProtocol) -> None:
    """Against one reference, the mean of the told errors is near the spread of the values."""
    real = gaussian(400, 99)
    many = [score(changed(protocol, resamples=10), seen(gaussian(200, k), real)) for k in range(30)]
    for name in ("fid_random", "precision_random", "nearest_training_random"):
        values = torch.tensor([numbers[name].value for numbers in many], dtype=torch.float64)
        errors = [numbers[name].standard_error for numbers in many]
        told = torch.tensor(errors, dtype=torch.float64).mean()
        assert 0.6 < float(told / values.std()) < 1.7, name


def test_copies_are_near_and_new_pictures_are_not(protocol: EvaluationProtocol) -> None:
    training, real = gaussian(200, 0), gaussian(100, 1)
    copied = score(protocol, seen(training[:60] + 1e-3, real, training))
    fresh = score(protocol, seen(gaussian(200, 2), real, training))
    assert copied["nearest_training_ratio_random"].value < 0.01
    assert 0.85 < fresh["nearest_training_ratio_random"].value < 1.15


def test_a_protocol_may_tell_no_errors(protocol: EvaluationProtocol) -> None:
    numbers = score(changed(protocol, resamples=0), seen(gaussian(40, 0), gaussian(40, 1)))
    told = {name for name, number in numbers.items() if number.standard_error is not None}
    assert told == {"kid_random"}


def test_the_manifold_may_have_a_network_of_its_own(protocol: EvaluationProtocol) -> None:
    x, y, u, v = (gaussian(40, seed) for seed in range(4))
    both = Seen(
        {"random": x, "mobilenet-v2": u},
        {},
        {"random": y, "mobilenet-v2": v},
        {"random": y},
        {"random": "0" * 64, "mobilenet-v2": "1" * 64},
    )
    numbers = score(changed(protocol, manifold_network="mobilenet-v2"), both)
    assert numbers["precision_mobilenet_v2"].value == precision_recall(u, v)[0]
    assert numbers["coverage_mobilenet_v2"].value == density_coverage(u, v)[1]
    assert numbers["kid_random"].value == pytest.approx(kid(x, y).value)


def test_the_manifold_may_see_fewer_of_the_reference(protocol: EvaluationProtocol) -> None:
    """Every third picture alone spans it; the others still count for KID."""
    x, y = gaussian(60, 0, 0.3), gaussian(60, 1)
    numbers = score(changed(protocol, manifold_reference_samples=20), seen(x, y))
    precision, recall = precision_recall(x, y[::3], k=3)
    density, coverage = density_coverage(x, y[::3], k=5)
    found = [numbers[f"{m}_random"] for m in ("precision", "recall", "density", "coverage")]
    assert [n.value for n in found] == [precision, recall, density, coverage]
    assert found[1].standard_error == pytest.approx((recall * (1 - recall) / 20) ** 0.5)
    assert numbers["kid_random"].value == kid(x, y).value


@pytest.mark.parametrize(("digest", "name"), [("6726825d", "fid"), ("0", "fid_custom_inception")])
def test_fid_is_the_canonical_networks_alone(
    protocol: EvaluationProtocol, digest: str, name: str
) -> None:
    x = {"inception-v3-fid": gaussian(20, 0)}
    inception = changed(protocol, network="inception-v3-fid", metrics=["fid"])
    assert list(score(inception, Seen(x, {}, x, x, {"inception-v3-fid": digest}))) == [name]


def test_retrieval_is_of_the_picture_that_the_caption_is_of(protocol: EvaluationProtocol) -> None:
    real = gaussian(40, 0)
    targets = torch.tensor([7, 3, 39, 0, 12, 12, 25, 31])
    drawn = 2.0 * real[targets] + 0.01 * gaussian(8, 1)
    drawn[:2] = drawn[[1, 0]]  # two are taken for one another
    asked = changed(protocol, metrics=["retrieval"], samples=8)
    numbers = score(asked, replace(seen(drawn, real), targets=targets))
    assert numbers["retrieval_random"].value == 0.75
    assert numbers["retrieval_random"].standard_error == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
