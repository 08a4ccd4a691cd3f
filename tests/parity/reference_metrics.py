"""What torch-fidelity and lpips make of the inputs in a folder; a process of its own.

    python reference_metrics.py REFERENCE_PACKAGES FOLDER

Both import torchvision, whose native part does not load beside the CPU build of torch that the
tests run on. The two operators that it asks for while it is imported are declared here first; none
is ever called. Other packages try to use a torchvision that they find, so this stays out of the
process of the tests.
"""

import sys
from pathlib import Path
from typing import Any

import torch

packages, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, packages)

# ruff: noqa: E402
try:
    import torchvision
except RuntimeError:  # operator torchvision::nms does not exist
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import lpips
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

assert torchvision.__file__.startswith(packages), torchvision.__file__
given: dict[str, Any] = torch.load(folder / "given.pt")
found: dict[str, Any] = {}
torch.set_grad_enabled(False)

inception = FeatureExtractorInceptionV3(
    "inception", ["2048", "logits_unbiased"], str(folder / "inception.pth")
)
found["inception"] = [inception(images) for images in given["images"]]
found["inception names"] = [n for n in inception.state_dict() if "num_batches" not in n]
vgg16 = FeatureExtractorVGG16("vgg16", ["fc2_relu"], str(folder / "vgg16.pth"))
found["vgg16"] = [vgg16(images)[0] for images in given["images"]]

distance = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
trunk = torch.load(folder / "vgg16.pth")
for part in (getattr(distance.net, f"slice{k}") for k in range(1, 6)):
    for index, layer in part.named_children():
        if f"features.{index}.weight" in trunk:
            layer.weight.copy_(trunk[f"features.{index}.weight"])
            layer.bias.copy_(trunk[f"features.{index}.bias"])
found["lpips state"] = {k: v for k, v in distance.state_dict().items() if k.startswith("lin")}
found["lpips"] = distance(*given["pairs"]).flatten()

generated, real, logits = given["generated"], given["real"], given["logits"]
found["fid"] = fid_statistics_to_metric(
    fid_features_to_statistics(generated), fid_features_to_statistics(real), False
)
found["kid"] = kid_features_to_metric(
    generated, real, kid_subsets=7, kid_subset_size=60, rng_seed=2020, verbose=False
)
found["isc"] = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
found["prc"] = prc_features_to_metric(
    generated, real, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=True, verbose=False
)
torch.save(found, folder / "found.pt")
