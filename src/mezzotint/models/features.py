"""Networks whose features the metrics are computed on, shipped with their weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Self, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import CheckpointError, ConfigError, nearest

__all__ = ["FEATURE_NETWORKS", "FeatureNetwork", "load_features"]


@dataclass(frozen=True)
class FeatureNetworkInfo:
    """What is known of a feature network before it is loaded.

    Attributes:
        asset: Its file in ``mezzotint/assets``.
        sha256: The checksum of that file.
        dim: Length of a feature vector.
        size: Side in pixels that images are resized to, the one it was trained at.
    """

    asset: str
    sha256: str
    dim: int
    size: int


FEATURE_NETWORKS: Mapping[str, FeatureNetworkInfo] = MappingProxyType(
    {
        "mobilenet-v2": FeatureNetworkInfo(
            asset="mobilenet_v2.safetensors",
            sha256="b25b7f7ab4250dc36cbbb9f5f26eeeeae67b87ef881b95dcbb57b190d22a5011",
            dim=1280,
            size=224,
        ),
    }
)


def load_features(name: str = "mobilenet-v2") -> "FeatureNetwork":
    """Load a feature network from the package.

    Raises:
        ConfigError: If there is none of that name.
        CheckpointError: If its file is missing or damaged.
    """
    if name not in FEATURE_NETWORKS:
        raise ConfigError(f"unknown feature network {name!r}; {nearest(name, FEATURE_NETWORKS)}")
    info = FEATURE_NETWORKS[name]
    file = resources.files("mezzotint") / "assets" / info.asset
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; reinstall mezzotint") from None
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise CheckpointError(f"{file}: damaged, its sha256 is wrong; reinstall mezzotint")
    trunk = MobileNetV2()
    trunk.load_state_dict(safetensors.torch.load(data))
    return FeatureNetwork(name, trunk, info)


class FeatureNetwork(nn.Module):
    """Maps images to feature vectors; frozen, in evaluation mode, always in float32.

    Attributes:
        name: Its name in `FEATURE_NETWORKS`.
        dim: Length of a feature vector.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, trunk: nn.Module, info: FeatureNetworkInfo) -> None:
        super().__init__()
        self.name, self.dim, self.size = name, info.dim, info.size
        self.trunk = trunk
        # of ImageNet's training images in 0..1, as the weights' authors normalised them
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a metric that learns measures nothing."""
        del mode
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Return the features of a batch.

        Args:
            x: ``(B, 3, H, W)`` in -1..1.
            size: Side in pixels to resize to, bicubic and antialiased; by default the one that the
                network was trained at. An image of that size is left alone.

        Returns:
            ``(B, dim)`` float32, averaged over positions.
        """
        side = size or self.size
        with torch.autocast(x.device.type, enabled=False):
            unit = (x.float() + 1.0) / 2.0
            if unit.shape[2:] != (side, side):
                unit = F.interpolate(
                    unit, (side, side), mode="bicubic", antialias=True, align_corners=False
                )
            # bicubic overshoots at edges; an 8-bit image would have been clipped there
            return cast(Tensor, self.trunk((unit.clamp(0.0, 1.0) - self.mean) / self.std))


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


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381) without its classifier, parameters named as torchvision's."""

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

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``(B, 3, H, W)`` to ``(B, 1280)``."""
        return cast(Tensor, self.features(x)).mean(dim=(2, 3))


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
