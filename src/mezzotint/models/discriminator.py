"""The patch discriminator of the first stage and its losses (VQGAN, arXiv 2012.09841)."""

from collections.abc import Callable
from typing import Self, cast

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.config import Config
from mezzotint.device import widened

__all__ = [
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "adaptive_weight",
    "generator_loss",
    "hinge_discriminator_loss",
]

_GROUPS = 16


class PatchDiscriminatorConfig(Config):
    """Shape of a `PatchDiscriminator`.

    Attributes:
        in_channels: Channels of the image.
        channels: Channels after the first convolution, doubled by each layer up to eight times.
        layers: How often the resolution is halved. Three see patches of 70 x 70 pixels.
    """

    in_channels: int = pydantic.Field(default=3, ge=1)
    channels: int = pydantic.Field(default=64, ge=1)
    layers: int = pydantic.Field(default=3, ge=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (2 * self.channels) % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS // 2}, got {self.channels}")
        return self


class PatchDiscriminator(nn.Module):
    """Says of every patch whether it looks real (PatchGAN, Isola et al., arXiv 1611.07004).

    Normalisation is by group: batch statistics would couple the images of a batch, and differ
    between ranks and between real and generated batches.
    """

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        steps: list[nn.Module] = [
            nn.Conv2d(config.in_channels, width[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            steps += [
                nn.Conv2d(width[i - 1], width[i], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(_GROUPS, width[i]),
                nn.LeakyReLU(0.2),
            ]
        steps.append(nn.Conv2d(width[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*steps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # as pix2pix starts its networks

    def forward(self, x: Tensor) -> Tensor:
        """Judge images.

        Args:
            x: ``(B, C, H, W)`` in -1..1, H and W at least ``3 * 2^(layers - 1)``.

        Returns:
            Logits ``(B, 1, h, w)``, one per patch, large where it looks real.
        """
        return cast(Tensor, self.main(x))


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator, a scalar (Lim & Ye, arXiv 1705.02894).

    ``(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x_hat))]) / 2``, in float32 or wider.
    """
    real = F.relu(1.0 - widened(real_logits)).mean()
    fake = F.relu(1.0 + widened(fake_logits)).mean()
    return 0.5 * (real + fake)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the loss of the autoencoder against the discriminator, ``-E[D(x_hat)]``, a scalar."""
    return -widened(fake_logits).mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    max: float = 1e4,
    reduce: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Balance the adversarial against the reconstruction term (VQGAN, equation 7).

    Args:
        reconstruction_loss: Scalar, L1 plus perceptual.
        generator_loss: Scalar; both graphs are kept for the backward pass that follows.
        last_layer: Weight of the decoder's last convolution, where both gradients are measured.
        max: Upper bound of the result.
        reduce: Takes the mean of a gradient over the ranks of a run, so that all weigh alike.
        scale: What the losses are multiplied by while the gradients are measured, so that float16
            holds them; of the gradient scaler.

    Returns:
        ``|grad of the reconstruction| / (|grad of the generator loss| + 1e-4)``, a detached scalar.
    """
    (rec,) = torch.autograd.grad(scale * reconstruction_loss, last_layer, retain_graph=True)
    (gen,) = torch.autograd.grad(scale * generator_loss, last_layer, retain_graph=True)
    if reduce is not None:
        rec, gen = reduce(rec), reduce(gen)
    rec, gen = widened(rec) / scale, widened(gen) / scale
    ratio = rec.norm() / (gen.norm() + 1e-4)
    return ratio.clamp(0.0, max).detach()
