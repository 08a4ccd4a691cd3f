"""Measures of pictures against pictures."""

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import ConfigError, DataError, MissingExtraError, nearest
from mezzotint.evaluation.distributions import Estimate
from mezzotint.models.features import FeatureNetwork, load_features, metric_name
from mezzotint.models.mobilenet import MobileNetV2, mobilenet_distance
from mezzotint.models.perceptual import PerceptualConfig, build_perceptual
from mezzotint.models.weights import locate_weights

__all__ = [
    "PerceptualDistance",
    "image_features",
    "perceptual_metric",
    "psnr",
    "retrieval",
    "retrieval_accuracy",
    "shifted_psnr",
    "ssim",
]

_SSIM_WINDOW = 11
# sha256 of torchvision's vgg16-397923af.pth, and of vgg.pth in the package lpips 0.1
_PUBLISHED_LPIPS = (
    "397923af",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1].
        reference: The same shape.

    Returns:
        ``(B,)`` in dB; infinite where the two are equal.
    """
    error = (images.double() - reference.double()).square().mean((1, 2, 3))
    return 10.0 * torch.log10(4.0 / error)


def shifted_psnr(images: Tensor, reference: Tensor, reach: int) -> Tensor:
    """The best `psnr` of each image over shifts of up to ``reach`` pixels each way.

    A picture that is right but one pixel aside is not a wrong picture. The image is shifted, and
    its edge repeated where nothing moved in.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1].
        reference: The same shape.
        reach: Largest shift in pixels, horizontally and vertically.

    Returns:
        ``(B,)`` in dB.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [reach] * 4, mode="replicate")
    shifts = [
        psnr(padded[..., y : y + height, x : x + width], reference)
        for y in range(2 * reach + 1)
        for x in range(2 * reach + 1)
    ]
    return torch.stack(shifts).amax(0)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), by torchmetrics.

    With the window of the paper, a Gaussian of 11 pixels and deviation 1.5, on every channel; the
    edges are reflected.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1].
        reference: The same shape.

    Returns:
        ``(B,)``, 1 where the two are equal.

    Raises:
        DataError: If the images are smaller than the window.
        MissingExtraError: If torchmetrics is not installed.
    """
    height, width = images.shape[-2:]
    if min(height, width) < _SSIM_WINDOW:
        raise DataError(
            f"SSIM: images of {height}x{width} pixels are smaller than its window; it needs at"
            f" least {_SSIM_WINDOW}x{_SSIM_WINDOW}"
        )
    try:
        functional = cast(Any, importlib.import_module("torchmetrics.functional.image"))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        raise MissingExtraError("torchmetrics", "train", "SSIM") from None
    # from black = 0: SSIM compares means by their ratio, and grey at 0 would have none
    x, y = images.float() + 1.0, reference.float() + 1.0
    measured: Tensor = functional.structural_similarity_index_measure(
        x, y, kernel_size=_SSIM_WINDOW, data_range=2.0, reduction="none"
    )
    return measured.reshape(len(images))


class PerceptualDistance(nn.Module):
    """A perceptual distance as a metric: it is computed without gradients.

    Attributes:
        name: What the metric is called, after its network unless that is the customary one.
    """

    def __init__(self, name: str, distance: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.distance = distance

    @torch.inference_mode()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(B,)`` of two batches ``(B, 3, H, W)`` in [-1, 1]."""
        return cast(Tensor, self.distance(x, y))


def perceptual_metric(
    name: str = "mobilenet-v2",
    *,
    weights: str | None = None,
    sha256: str | None = None,
    heads: str | None = None,
    heads_sha256: str | None = None,
) -> PerceptualDistance:
    """Build a perceptual distance (LPIPS, arXiv 1801.03924) that no first stage is trained on.

    Args:
        name: ``mobilenet-v2``, shipped, with all channels weighted alike, whose metric is called
            ``lpips_mobilenet_v2``; or ``lpips-vgg16``, the customary one, called ``lpips`` with
            torchvision's VGG16 and the heads of LPIPS 0.1 as they were published, and
            ``lpips_custom_vgg16`` with any other files.
        weights: Of ``lpips-vgg16``; see `mezzotint.models.perceptual.PerceptualConfig`.
        sha256: Checksum of ``weights``.
        heads: The linear heads, if ``weights`` has none.
        heads_sha256: Checksum of ``heads``.

    Raises:
        ConfigError: If there is none of that name, or weights are missing or out of place.
        CheckpointError: If the weights are missing, damaged or of another network.
    """
    given: Mapping[str, str | None] = {
        "weights": weights,
        "sha256": sha256,
        "heads": heads,
        "heads_sha256": heads_sha256,
    }
    match name:
        case "mobilenet-v2":
            if any(given.values()):
                raise ConfigError(f"perceptual metric {name!r} is shipped and takes no weights")
            trunk = load_features(name).trunk
            assert isinstance(trunk, MobileNetV2)
            return PerceptualDistance(metric_name("lpips", name), mobilenet_distance(trunk))
        case "lpips-vgg16":
            config = PerceptualConfig.from_dict({"network": name, **given}, "perceptual metric")
            distance = build_perceptual(config)
            suffix = "" if _is_published_lpips(config) else "_custom_vgg16"
            return PerceptualDistance(f"lpips{suffix}", distance)
        case _:
            choices = nearest(name, ("mobilenet-v2", "lpips-vgg16"))
            raise ConfigError(f"unknown perceptual metric {name!r}; {choices}")


def _is_published_lpips(config: PerceptualConfig) -> bool:
    files = ((config.weights, config.sha256), (config.heads, config.heads_sha256))
    for (location, known), published in zip(files, _PUBLISHED_LPIPS, strict=True):
        if location is None:
            return False
        with locate_weights(location, known).open("rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(published):
                return False
    return True


@torch.inference_mode()
def image_features(network: FeatureNetwork, images: Tensor, batch_size: int = 32) -> Tensor:
    """Return the features ``(B, d)`` of images ``(B, 3, H, W)`` in [-1, 1]."""
    return torch.cat([network(part) for part in images.split(batch_size)])


def retrieval(features: Tensor, candidates: Tensor) -> Tensor:
    """Return the index ``(B,)`` of the candidate nearest to each picture, by cosine similarity.

    Args:
        features: ``(B, d)``.
        candidates: ``(N, d)``.
    """
    return (F.normalize(features, dim=1) @ F.normalize(candidates, dim=1).T).argmax(1)


def retrieval_accuracy(features: Tensor, candidates: Tensor, targets: Tensor) -> Estimate:
    """Return the share of pictures whose nearest candidate is the one that their text names.

    Args:
        features: ``(B, d)``.
        candidates: ``(N, d)``.
        targets: ``(B,)``, the index of the named candidate of each picture.

    Returns:
        In 0..1; the standard error is that of a share.

    Raises:
        DataError: If there is no picture.
    """
    if not len(features):
        raise DataError("retrieval accuracy: 0 images are too few; it needs at least 1")
    right = retrieval(features, candidates) == targets.to(features.device)
    share = float(right.double().mean())
    return Estimate(share, (share * (1.0 - share) / len(features)) ** 0.5)
