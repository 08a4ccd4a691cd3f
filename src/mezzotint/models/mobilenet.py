"""MobileNetV2: the features of the shipped metrics, and a perceptual distance on its stages."""

from typing import cast

import torch
from torch import Tensor, nn

from mezzotint.models.perceptual import FeatureDistance

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "MobileNetV2", "mobilenet_distance"]

# of ImageNet's training images in 0..1, as torchvision's weights were trained
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# expansion, channels, repeats, stride: table 2 of MobileNetV2
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_TAPS = (1, 3, 6, 13, 17)  # the last block at each of the strides 2, 4, 8, 16 and 32


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381), parameters named as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, stride=2)]
        channels = 32
        for expand, width, repeats, stride in _STAGES:
            for i in range(repeats):
                layers.append(_InvertedResidual(channels, width, stride if i == 0 else 1, expand))
                channels = width
        layers.append(_conv(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``(B, 1280)`` and logits ``(B, 1000)`` of images ``(B, 3, H, W)``."""
        features = cast(Tensor, self.features(x)).mean(dim=(2, 3))
        return features, self.classifier(features)


class _Stages(nn.Module):
    """The features of MobileNetV2 at strides 2, 4, 8, 16 and 32."""

    def __init__(self, network: MobileNetV2) -> None:
        super().__init__()
        self.layers = cast(nn.Sequential, network.features[: _TAPS[-1] + 1])

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in _TAPS:
                found.append(x)
        return found


def mobilenet_distance(network: MobileNetV2) -> FeatureDistance:
    """Build a perceptual distance on a trained network, all levels and channels weighted alike."""
    # of images in -1..1
    shift = 2.0 * torch.tensor(IMAGENET_MEAN) - 1.0
    return FeatureDistance(_Stages(network), shift, 2.0 * torch.tensor(IMAGENET_STD), heads=None)


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expand: int) -> None:
        super().__init__()
        width = in_channels * expand
        steps: list[nn.Module] = [] if expand == 1 else [_conv(in_channels, width, 1)]
        steps += [
            _conv(width, width, 3, stride=stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*steps)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = cast(Tensor, self.conv(x))
        return x + h if self.residual else h
