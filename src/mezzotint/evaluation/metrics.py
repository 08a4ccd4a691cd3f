"""Measures of pictures against pictures."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.models.features import FeatureNetwork

__all__ = ["image_features", "psnr", "retrieval", "shifted_psnr"]


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
