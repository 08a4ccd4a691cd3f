"""What is measured of each condition: on drawn pictures, on those without it, and on real ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.data.base import Example
from mezzotint.data.degradation import bicubic_down
from mezzotint.evaluation.judges import (
    box_iou,
    box_of_class,
    crop_to_box,
    mean_iou,
)
from mezzotint.evaluation.metrics import image_features, perceptual_metric, psnr, retrieval
from mezzotint.models.features import load_features
from mezzotint.studies.conditions.judging import Judges
from mezzotint.training.conditions import Told

__all__ = ["MEASURES", "Asked", "Measure", "diffusion_fill", "further_numbers"]

Part = Literal["main", "spatial"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What was asked for.

    Attributes:
        examples: Held-out examples.
        told: What the model was told of each.
    """

    examples: Sequence[Example]
    told: Sequence[Told]

    @property
    def labels(self) -> Tensor:
        """``(N,)`` classes."""
        return torch.tensor([example.label for example in self.examples])

    @property
    def images(self) -> Tensor:
        """``(N, 3, H, W)`` in -1..1."""
        return torch.stack([e.image for e in self.examples]).float() / 127.5 - 1.0

    @property
    def maps(self) -> Tensor:
        """``(N, H, W)`` classes."""
        return torch.stack([e.map for e in self.examples if e.map is not None])


@dataclass(frozen=True)
class Measure:
    """A measure of pictures ``(N, 3, H, W)`` in -1..1.

    Attributes:
        name: What it is called.
        of: Gives it.
        null: Which part of the condition is taken away for comparison.
        hides: Whether the object is hidden in the picture that is told: what is told in words must
            not be seen.
    """

    name: str
    of: Callable[[Tensor, Asked, Judges], float]
    null: Part = "main"
    hides: bool = False


def _class_accuracy(images: Tensor, asked: Asked, judges: Judges) -> float:
    return float((judges.whole(images) == asked.labels).float().mean())


def _retrieval(images: Tensor, asked: Asked, judges: Judges) -> float:
    features = image_features(load_features("mobilenet-v2"), images)
    return float((retrieval(features, judges.prototypes) == asked.labels).float().mean())


def _class_in_boxes(images: Tensor, asked: Asked, judges: Judges) -> float:
    side = images.shape[-1]
    cut: list[Tensor] = []
    labels: list[int] = []
    for image, example in zip(images, asked.examples, strict=True):
        for box in example.boxes or ():
            cut.append(crop_to_box(image, box, side))
            labels.append(box.label)
    return float((judges.part(torch.stack(cut)) == torch.tensor(labels)).float().mean())


def _iou_of_boxes(images: Tensor, asked: Asked, judges: Judges) -> float:
    found = judges.segmenter.classes_of(images)
    shares = [
        box_iou(box_of_class(classes, box.label), box)
        for classes, example in zip(found, asked.examples, strict=True)
        for box in example.boxes or ()
    ]
    return sum(shares) / len(shares)


def _iou_of_classes(images: Tensor, asked: Asked, judges: Judges) -> float:
    found = judges.segmenter.classes_of(images)
    return mean_iou(found, asked.maps, judges.segmenter.out.out_channels)


def _distance(images: Tensor, asked: Asked, judges: Judges | None = None) -> float:
    distance = perceptual_metric()
    parts = zip(images.split(32), asked.images.split(32), strict=True)
    return float(torch.cat([distance(ours, real) for ours, real in parts]).mean())


MEASURES: Mapping[str, tuple[Measure, ...]] = {
    "class": (Measure("class accuracy", _class_accuracy),),
    "text": (Measure("retrieval among 32", _retrieval),),
    "layout": (
        Measure("class accuracy in the boxes", _class_in_boxes),
        Measure("IoU of the boxes", _iou_of_boxes),
    ),
    "semantic": (Measure("mean IoU", _iou_of_classes, "spatial"),),
    "super-resolution": (Measure("perceptual distance", _distance, "spatial"),),
    "inpainting": (Measure("perceptual distance", _distance, "spatial"),),
    "hybrid": (
        Measure("text: class accuracy", _class_accuracy, "main", hides=True),
        Measure("picture: perceptual distance", _distance, "spatial"),
    ),
}


def further_numbers(
    condition: str, images: Tensor, plain: Tensor, asked: Asked
) -> dict[str, float]:
    """Return what else is asked of a condition, by what it is.

    Args:
        condition: A key of `MEASURES`.
        images: ``(N, 3, H, W)`` in -1..1, drawn.
        plain: The same before they were brought into agreement with the condition.
        asked: What was asked for.
    """
    height, width = images.shape[-2:]
    if condition == "super-resolution":
        small = torch.stack([t.low_res for t in asked.told if t.low_res is not None])
        small = small.float() / 127.5 - 1.0
        factor = height // small.shape[-2]
        down, before = (bicubic_down(x, factor).clamp(-1, 1) for x in (images, plain))
        enlarged = F.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)
        return {
            "perceptual distance of bicubic enlargement": _distance(enlarged, asked),
            "PSNR of the shrunk picture to the small one (dB)": float(psnr(down, small).mean()),
            "the same without back-projection (dB)": float(psnr(before, small).mean()),
            "perceptual distance without back-projection": _distance(plain, asked),
            "PSNR (dB)": float(psnr(images, asked.images).mean()),
            "PSNR of bicubic enlargement (dB)": float(psnr(enlarged, asked.images).mean()),
        }
    if condition in ("inpainting", "hybrid"):
        masks = torch.stack([t.mask for t in asked.told if t.mask is not None]) >= 0.5
        filled = diffusion_fill(asked.images, masks)
        changed = (images - asked.images).abs().masked_fill(masks, 0.0).max()
        return {
            "perceptual distance": _distance(images, asked),
            "perceptual distance without blending": _distance(plain, asked),
            "perceptual distance of diffusion fill": _distance(filled, asked),
            "largest change outside the mask (of 255)": round(float(changed) * 127.5, 3),
        }
    return {}


def diffusion_fill(images: Tensor, masks: Tensor, steps: int = 2000) -> Tensor:
    """Fill what masks cover by the heat equation, which draws the surroundings smoothly in.

    Args:
        images: ``(N, 3, H, W)``.
        masks: ``(N, 1, H, W)`` bool, true where to fill.
        steps: Of Jacobi's iteration.
    """
    known = (~masks).float()
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    x = torch.where(masks, mean, images)
    for _ in range(steps):
        p = F.pad(x, (1, 1, 1, 1), mode="replicate")
        around = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
        x = torch.where(masks, around / 4, images)
    return x
