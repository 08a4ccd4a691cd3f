"""Networks that say what a picture shows: trained on real pictures, asked about drawn ones.

None of them has seen what the models that they judge are trained with, but for the pictures
themselves: the classifier reads MobileNetV2's features, the segmenter is trained from nothing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning.base import Box
from mezzotint.evaluation.metrics import image_features
from mezzotint.models.features import load_features

__all__ = [
    "Classifier",
    "Segmenter",
    "box_iou",
    "box_of_class",
    "crop_to_box",
    "mean_iou",
    "train_classifier",
    "train_segmenter",
]

Progress = Callable[[int, int], None]
_WIDTHS = (24, 48, 96)


class Classifier(nn.Module):
    """Linear on MobileNetV2's features.

    Args:
        width: Of the features.
        classes: How many.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Return the class ``(B,)`` of images ``(B, 3, H, W)`` in -1..1."""
        return self.of_features(image_features(load_features("mobilenet-v2"), images))

    @torch.inference_mode()
    def of_features(self, features: Tensor) -> Tensor:
        """Return the class ``(B,)`` of images by their features ``(B, d)``."""
        found: Tensor = self.head(features)
        return found.argmax(1)


def train_classifier(
    images: Tensor, labels: Tensor, classes: int, *, epochs: int = 60
) -> Classifier:
    """Train a classifier on real pictures.

    Args:
        images: ``(N, 3, H, W)`` in -1..1.
        labels: ``(N,)``.
        classes: How many.
        epochs: Times that each picture is seen.
    """
    x = image_features(load_features("mobilenet-v2"), images).clone()
    torch.manual_seed(0)
    classifier = Classifier(x.shape[1], classes)
    head = classifier.head
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.5)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(head(x[part]), labels[part], label_smoothing=0.1).backward()
            optimizer.step()
    return classifier.eval()


class Segmenter(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597): a class for every pixel.

    Args:
        classes: How many, the background included.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _block(below, width) for below, width in zip((3, *_WIDTHS), _WIDTHS, strict=False)
        )
        self.middle = _block(_WIDTHS[-1], _WIDTHS[-1])
        self.up = nn.ModuleList(
            _block(above + width, width)
            for above, width in zip((_WIDTHS[-1], *_WIDTHS[:0:-1]), _WIDTHS[::-1], strict=True)
        )
        self.out = nn.Conv2d(_WIDTHS[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes, H, W)`` of images ``(B, 3, H, W)`` in -1..1.

        Height and width are divisible by 8.
        """
        x, kept = images, list[Tensor]()
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], dim=1))
        return self.out(x)

    @torch.inference_mode()
    def classes_of(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Return the class ``(B, H, W)`` of every pixel."""
        return torch.cat([self(part).argmax(1) for part in images.split(batch_size)])


def _block(below: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (below, width):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def train_segmenter(
    images: Tensor,
    maps: Tensor,
    classes: int,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> Segmenter:
    """Train a segmenter on real pictures and their maps.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        maps: ``(N, H, W)`` uint8 classes, 0 the background.
        classes: How many, the background included.
        steps: Of the optimizer.
        batch_size: Pictures in a step.
        on_progress: Called with (steps done, steps in all).
    """
    torch.manual_seed(0)
    segmenter = Segmenter(classes).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        part = torch.randint(len(images), (batch_size,))
        pixels = images[part].float() / 127.5 - 1.0
        loss = F.cross_entropy(segmenter(pixels), maps[part].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_progress is not None:
            on_progress(step + 1, steps)
    return segmenter.eval()


def mean_iou(found: Tensor, asked: Tensor, classes: int) -> float:
    """Return the mean over classes of intersection over union, of all pictures together.

    Args:
        found: ``(N, H, W)`` classes.
        asked: ``(N, H, W)`` classes.
        classes: How many; those that are in neither are left out.
    """
    pairs = asked.flatten().long() * classes + found.flatten().long()
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes).double()
    both = confusion.diag()
    either = confusion.sum(0) + confusion.sum(1) - both
    there = either > 0
    return float((both[there] / either[there]).mean())


def box_of_class(found: Tensor, label: int) -> Box | None:
    """Return the box around the pixels of a class in a map ``(H, W)``; None if there are none.

    Args:
        found: A class for every pixel, 0 the background and 1 + label elsewhere.
        label: Of the class.
    """
    there = found == 1 + label
    rows, columns = there.any(1).nonzero(), there.any(0).nonzero()
    if not len(rows):
        return None
    height, width = found.shape
    return Box(
        label,
        float(columns[0]) / width,
        float(rows[0]) / height,
        (float(columns[-1]) + 1) / width,
        (float(rows[-1]) + 1) / height,
    )


def box_iou(a: Box | None, b: Box | None) -> float:
    """Return intersection over union of two boxes; 0 where there is none."""
    if a is None or b is None:
        return 0.0
    wide = min(a.right, b.right) - max(a.left, b.left)
    high = min(a.bottom, b.bottom) - max(a.top, b.top)
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (a, b)]
    return wide * high / (sum(areas) - wide * high)


def crop_to_box(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut a box out of an image.

    Args:
        image: ``(3, H, W)`` in any range.
        box: What to cut out; at least a pixel of it.
        size: Side of the result.

    Returns:
        ``(3, size, size)``; a box that is no square is stretched.
    """
    height, width = image.shape[-2:]
    left, top = int(box.left * width), int(box.top * height)
    right = max(left + 1, math.ceil(box.right * width))
    bottom = max(top + 1, math.ceil(box.bottom * height))
    cut = image[None, :, top:bottom, left:right]
    return F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
