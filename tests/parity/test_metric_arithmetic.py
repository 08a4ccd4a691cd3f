"""Numbers from the same features as torchmetrics and torch-fidelity, in float64.

1e-6 is what the project promises; the two sides differ by rounding only.
"""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from mezzotint.evaluation.distributions import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)

if TYPE_CHECKING:
    from tests.parity.conftest import MetricReference

RELATIVE = 1e-6
# torchmetrics says that it keeps all features in memory, and that an extractor may have changed
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


class Flat(nn.Module):
    """Takes features for images ``(N, d, 1, 1)``, for a metric that wants to extract them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_fid(metric_reference: "MetricReference") -> None:
    generated, real = metric_reference.given["generated"], metric_reference.given["real"]
    ours = frechet_distance(FeatureStatistics.of(generated), FeatureStatistics.of(real))
    theirs = metric_reference.found["fid"]["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=RELATIVE)
    metric = FrechetInceptionDistance(Flat(32), input_img_size=(32, 1, 1)).set_dtype(torch.float64)
    metric.update(generated[..., None, None], real=False)
    metric.update(real[..., None, None], real=True)
    assert ours == pytest.approx(float(metric.compute()), rel=RELATIVE)


def test_kid(metric_reference: "MetricReference") -> None:
    """The same subsets from the same seed as torch-fidelity's, and all images at once."""
    generated, real = metric_reference.given["generated"], metric_reference.given["real"]
    ours = kid(generated, real, subsets=7, subset_size=60, seed=2020)
    theirs = metric_reference.found["kid"]["kernel_inception_distance_mean"]
    assert ours.value == pytest.approx(theirs, rel=RELATIVE)
    whole = kid(generated, real[:150])
    assert whole.value == pytest.approx(float(poly_mmd(real[:150], generated)), rel=RELATIVE)
    metric = KernelInceptionDistance(Flat(32), subsets=1, subset_size=150).set_dtype(torch.float64)
    metric.update(generated[..., None, None], real=False)
    metric.update(real[:150, :, None, None], real=True)
    assert whole.value == pytest.approx(float(metric.compute()[0]), rel=RELATIVE)


def test_inception_score(metric_reference: "MetricReference") -> None:
    logits = metric_reference.given["logits"]
    theirs = metric_reference.found["isc"]["inception_score_mean"]
    assert inception_score(logits).value == pytest.approx(theirs, rel=RELATIVE)
    metric = InceptionScore(Flat(12), splits=10).set_dtype(torch.float64)
    metric.update(logits[:130, :, None, None])
    torch.manual_seed(3)
    order = torch.randperm(130)
    torch.manual_seed(3)
    mean, deviation = metric.compute()
    ours = inception_score(logits[:130][order], shuffle_seed=None)
    assert ours.value == pytest.approx(float(mean), rel=RELATIVE)
    # from the deviation among ten parts the standard error is known to a third
    assert 0.4 < ours.standard_error * np.sqrt(10) / float(deviation) < 2.5


def test_precision_and_recall(metric_reference: "MetricReference") -> None:
    generated, real = metric_reference.given["generated"], metric_reference.given["real"]
    theirs = metric_reference.found["prc"]
    assert 0.1 < theirs["precision"] < 1.0
    assert theirs["precision"] != theirs["recall"]
    expected = theirs["precision"], theirs["recall"]
    assert precision_recall(generated, real) == pytest.approx(expected, rel=RELATIVE)
