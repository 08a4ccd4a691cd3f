"""The networks of the metrics against torch-fidelity's and lpips's, on shared random weights.

1e-4 is the relative error that float32 leaves after a hundred layers whose products are summed in
another order.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezzotint.evaluation.metrics import perceptual_metric
from mezzotint.models.features import load_features
from mezzotint.models.inception import FidInception

if TYPE_CHECKING:
    from tests.parity.conftest import MetricReference

TOLERANCE = 1e-4


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    # what all images have in common would hide a difference between them
    assert float(theirs.std(0).mean()) > 0.02 * float(theirs.abs().mean())
    assert float((ours - theirs).norm() / theirs.norm()) <= TOLERANCE
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE


def test_inception_equals_torch_fidelitys(metric_reference: "MetricReference") -> None:
    network = load_features(
        "inception-v3-fid", weights=str(metric_reference.folder / "inception.pth")
    )
    assert metric_reference.found["inception names"] == [
        name for name in FidInception().state_dict() if "num_batches" not in name
    ]
    pairs = [network.extract(images) for images in metric_reference.given["images"]]
    expected = metric_reference.found["inception"]
    for k in (0, 1):  # features, unbiased logits
        ours = torch.cat([p[k] for p in pairs])
        assert_close(ours, torch.cat([e[k] for e in expected]))


def test_vgg16_equals_torch_fidelitys(metric_reference: "MetricReference") -> None:
    network = load_features("vgg16", weights=str(metric_reference.folder / "vgg16.pth"))
    found = [network.extract(images) for images in metric_reference.given["images"]]
    assert all(logits is None for _, logits in found)
    ours = torch.cat([features for features, _ in found])
    assert_close(ours, torch.cat(metric_reference.found["vgg16"]))


def test_lpips_equals_lpipss(metric_reference: "MetricReference") -> None:
    """With the linear heads that lpips publishes, on a trunk of random weights."""
    folder = metric_reference.folder
    torch.save(metric_reference.found["lpips state"], folder / "heads.pth")
    metric = perceptual_metric(
        "lpips-vgg16", weights=str(folder / "vgg16.pth"), heads=str(folder / "heads.pth")
    )
    assert metric.name == "lpips_custom_vgg16"  # the trunk is not the published one
    x, y = metric_reference.given["pairs"]
    assert_close(metric(x, y), metric_reference.found["lpips"])
