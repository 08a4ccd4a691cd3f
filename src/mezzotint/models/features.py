"""Networks whose features the metrics are computed on: a closed registry, and how to load one."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mezzotint.errors import CheckpointError, ConfigError, nearest
from mezzotint.models.inception import FidInception
from mezzotint.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD, MobileNetV2
from mezzotint.models.perceptual import Vgg16
from mezzotint.models.resize import Resize, resize_images
from mezzotint.models.weights import (
    cache_directory,
    is_url,
    load_tensors,
    locate_weights,
)
from mezzotint.rng import keyed_generator
from mezzotint.storage.tensors import open_tensors

__all__ = [
    "FEATURE_NETWORKS",
    "FeatureNetwork",
    "FeatureNetworkInfo",
    "PublishedWeights",
    "Resize",
    "ShippedWeights",
    "load_features",
    "metric_name",
]


@dataclass(frozen=True)
class ShippedWeights:
    """Weights in ``mezzotint/assets``.

    Attributes:
        files: Names of the files and their checksums.
    """

    files: Mapping[str, str]


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that others publish and that the user has to get.

    Attributes:
        files: Names under which the same file is published, the usual one first.
        sha256: What the names tell of its checksum.
        origin: Where it is found, in words.
        custom: What names of metrics end in if the weights are others than these.
        unused: Beginnings of the names of tensors that the network has no use for.
    """

    files: tuple[str, ...]
    sha256: str
    origin: str
    custom: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureNetworkInfo:
    """What is known of a feature network before it is loaded.

    Attributes:
        build: Makes the network; it maps normalised images to features and, if it has them, logits.
        weights: Where its weights come from; None if they are drawn.
        dim: Length of a feature vector.
        size: Side in pixels that images are resized to, the one it was trained at.
        suffix: What names of metrics end in; empty for the network that the bare names mean, with
            its published weights.
        resize: How images are brought to that size unless a protocol says otherwise.
        mean: Per channel, subtracted from pixels in 0..255.
        std: Per channel, divided by after that.
        has_logits: Whether it classifies, as the Inception Score needs.
    """

    build: Callable[[], nn.Module]
    weights: ShippedWeights | PublishedWeights | None
    dim: int
    size: int
    suffix: str
    resize: Resize
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    has_logits: bool = False


class Vgg16Fc2(nn.Module):
    """VGG16 up to the ReLU after its second linear layer, parameters named as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Vgg16().features
        self.classifier = nn.ModuleDict({"0": nn.Linear(25088, 4096), "3": nn.Linear(4096, 4096)})

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map normalised images ``(B, 3, 224, 224)`` to features ``(B, 4096)``."""
        h = F.adaptive_avg_pool2d(F.max_pool2d(self.features(x), 2), 7).flatten(1)
        return F.relu(self.classifier["3"](F.relu(self.classifier["0"](h)))), None


class RandomNetwork(nn.Module):
    """A small convolutional network with weights drawn from a fixed seed, for tests."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, 10)
        for k, parameter in enumerate(self.parameters()):
            noise = torch.randn(parameter.shape, generator=keyed_generator(0, k))
            parameter.data = noise * (2.0 / parameter[0].numel()) ** 0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to features ``(B, 64)`` and logits ``(B, 10)``."""
        features = cast(Tensor, self.convolutions(x)).mean(dim=(2, 3))
        return features, self.classifier(features)


_IMAGENET: Mapping[str, Any] = {
    "mean": tuple(255.0 * m for m in IMAGENET_MEAN),
    "std": tuple(255.0 * s for s in IMAGENET_STD),
}

FEATURE_NETWORKS: Mapping[str, FeatureNetworkInfo] = MappingProxyType(
    {
        "mobilenet-v2": FeatureNetworkInfo(
            build=MobileNetV2,
            weights=ShippedWeights(
                {
                    "mobilenet_v2.safetensors": (
                        "b25b7f7ab4250dc36cbbb9f5f26eeeeae67b87ef881b95dcbb57b190d22a5011"
                    ),
                    "mobilenet_v2_classifier.safetensors": (
                        "2624a60840c261ff1822aea63f22a9bc7a7c782596df4fc1b0da6d1f75a17bcb"
                    ),
                }
            ),
            dim=1280,
            size=224,
            suffix="mobilenet_v2",
            resize="bicubic-antialias",
            **_IMAGENET,
            has_logits=True,
        ),
        "inception-v3-fid": FeatureNetworkInfo(
            build=FidInception,
            weights=PublishedWeights(
                (
                    "weights-inception-2015-12-05-6726825d.pth",
                    "pt_inception-2015-12-05-6726825d.pth",
                ),
                "6726825d",
                "release v0.2.0 of torch-fidelity on GitHub, or the weights of pytorch-fid",
                "custom_inception",
            ),
            dim=2048,
            size=299,
            suffix="",
            resize="tf1-bilinear",
            mean=(128.0, 128.0, 128.0),
            std=(128.0, 128.0, 128.0),
            has_logits=True,
        ),
        "vgg16": FeatureNetworkInfo(
            build=Vgg16Fc2,
            weights=PublishedWeights(
                ("vgg16-397923af.pth",),
                "397923af",
                "torchvision's weights of VGG16 on ImageNet",
                "custom_vgg16",
                unused=("classifier.6.",),
            ),
            dim=4096,
            size=224,
            suffix="vgg16",
            resize="tf1-bilinear",
            **_IMAGENET,
        ),
        "random": FeatureNetworkInfo(
            build=RandomNetwork,
            weights=None,
            dim=64,
            size=32,
            suffix="random",
            resize="bicubic-antialias",
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
            has_logits=True,
        ),
    }
)


def metric_name(metric: str, network: str, weights_sha256: str | None = None) -> str:
    """Return what a metric is called on a network.

    Args:
        metric: Its own name.
        network: Of `FEATURE_NETWORKS`.
        weights_sha256: Checksum of the weights in use. A network whose published weights they are
            not is another network; so is one whose file was converted. None means the published.

    Raises:
        ConfigError: If there is no such network.

    Example:
        >>> metric_name("fid", "mobilenet-v2"), metric_name("fid", "inception-v3-fid")
        ('fid_mobilenet_v2', 'fid')
        >>> metric_name("fid", "inception-v3-fid", "0" * 64)
        'fid_custom_inception'
    """
    suffix = _suffix(_info(network), weights_sha256)
    return f"{metric}_{suffix}" if suffix else metric


def _suffix(info: FeatureNetworkInfo, weights_sha256: str | None) -> str:
    published = info.weights
    if not isinstance(published, PublishedWeights) or weights_sha256 is None:
        return info.suffix
    return info.suffix if weights_sha256.startswith(published.sha256) else published.custom


def _info(name: str) -> FeatureNetworkInfo:
    if name not in FEATURE_NETWORKS:
        raise ConfigError(f"unknown feature network {name!r}; {nearest(name, FEATURE_NETWORKS)}")
    return FEATURE_NETWORKS[name]


def load_features(
    name: str = "mobilenet-v2", *, weights: str | None = None, sha256: str | None = None
) -> "FeatureNetwork":
    """Load a feature network.

    Args:
        name: Of `FEATURE_NETWORKS`.
        weights: Path or URL, for networks whose weights are not shipped; by default the published
            file is looked for in ``weights`` under `cache_directory`.
        sha256: Checksum of ``weights``, or its first 8 digits and more. A file under its published
            name is held to what that tells.

    Raises:
        ConfigError: If there is none of that name, or it takes no weights.
        CheckpointError: If the weights are missing, damaged or of another network.
    """
    info = _info(name)
    match info.weights:
        case None:
            _refuse_weights(name, weights, "are drawn from a seed")
            trunk = info.build()
            content = safetensors.torch.save(trunk.state_dict())
            digest = hashlib.sha256(content).hexdigest()
        case ShippedWeights() as shipped:
            _refuse_weights(name, weights, "are shipped")
            data = [_read_asset(*entry) for entry in shipped.files.items()]
            trunk = info.build()
            load_tensors(trunk, _dequantized(data), f"the shipped {name}")
            digest = hashlib.sha256(b"".join(data)).hexdigest()
        case PublishedWeights() as published:
            path = _find(name, published, weights, sha256)
            trunk = info.build()
            load_tensors(trunk, open_tensors(path).read(), str(path), unused=published.unused)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FeatureNetwork(name, trunk, info, digest)


def _refuse_weights(name: str, weights: str | None, why: str) -> None:
    if weights is not None:
        raise ConfigError(f"feature network {name!r}: its weights {why}; leave out {weights!r}")


def _read_asset(name: str, sha256: str) -> bytes:
    file = resources.files("mezzotint") / "assets" / name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; reinstall mezzotint") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{file}: damaged, its sha256 is wrong; reinstall mezzotint")
    return data


def _dequantized(files: Sequence[bytes]) -> dict[str, Tensor]:
    """The tensors of files; ``name_scale`` holds what each row of integers in ``name`` counts."""
    tensors: dict[str, Tensor] = {}
    for data in files:
        tensors |= safetensors.torch.load(data)
    for name in [n for n in tensors if f"{n}_scale" in tensors]:
        tensors[name] = tensors[name] * tensors.pop(f"{name}_scale")[:, None]
    return tensors


def _find(name: str, published: PublishedWeights, weights: str | None, sha256: str | None) -> Path:
    """Find published weights where the user says, or where they are kept."""
    if weights is None:
        folder = cache_directory() / "weights"
        kept = [path for file in published.files if (path := folder / file).is_file()]
        if not kept:
            raise CheckpointError(
                f"the feature network {name!r} needs weights that are not here: get"
                f" {published.files[0]} ({published.origin}) and put it under this name into"
                f" {folder}, or say where it is with --weights, in Python weights=: a path, or a"
                " URL and its sha256"
            )
        weights = str(kept[0])
    file = weights.rsplit("/", 1)[-1] if is_url(weights) else Path(weights).name
    if sha256 is None and file in published.files:
        sha256 = published.sha256
    return locate_weights(weights, sha256)


class FeatureNetwork(nn.Module):
    """Maps images to feature vectors; frozen, in evaluation mode, always in float32.

    Attributes:
        name: Its name in `FEATURE_NETWORKS`.
        dim: Length of a feature vector.
        size: Side in pixels that images are resized to.
        suffix: What names of metrics end in.
        has_logits: Whether it classifies.
        weights_sha256: Checksum of its weights, in hexadecimal.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, trunk: nn.Module, info: FeatureNetworkInfo, weights_sha256: str
    ) -> None:
        super().__init__()
        self.name, self.dim, self.size = name, info.dim, info.size
        self.suffix = _suffix(info, weights_sha256)
        self.has_logits, self.weights_sha256 = info.has_logits, weights_sha256
        self._resize: Resize = info.resize
        self.trunk = trunk.eval()
        _fuse_normalisations(trunk)
        # with the fusion 2.6 times as fast on a CPU
        cast(Any, trunk).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(info.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a metric that learns measures nothing."""
        del mode
        return self

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Return the features of a batch.

        Args:
            x: ``(B, 3, H, W)`` in -1..1.
            size: Side in pixels to resize to; by default the one that the network was trained at.
                An image of that size is left alone.

        Returns:
            ``(B, dim)`` float32, averaged over positions.
        """
        pixels = ((x.float() + 1.0) * 127.5).clamp(0.0, 255.0)
        return self._see(pixels, size or self.size, self._resize)[0]

    def extract(self, images: Tensor, resize: Resize | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the metrics of a protocol are computed from.

        Args:
            images: ``(B, 3, H, W)`` uint8.
            resize: How they are brought to the network's size; by default the customary way.

        Returns:
            Features ``(B, dim)`` float32, and logits ``(B, K)`` float32 or None. They depend on no
            other image of the batch, up to rounding.
        """
        assert images.dtype is torch.uint8
        return self._see(images.float(), self.size, resize or self._resize)

    @torch.no_grad()
    def _see(self, pixels: Tensor, size: int, resize: Resize) -> tuple[Tensor, Tensor | None]:
        """Features and logits of pixels in 0..255."""
        with torch.autocast(pixels.device.type, enabled=False):
            resized = resize_images(pixels, size, resize)
            return cast(tuple[Tensor, Tensor | None], self.trunk((resized - self.mean) / self.std))


def _fuse_normalisations(network: nn.Module) -> None:
    """Fold each batch normalisation into the convolution that it follows."""
    for module in network.modules():
        children = list(module.named_children())
        for (name, child), (following, norm) in zip(children, children[1:], strict=False):
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, following, nn.Identity())
