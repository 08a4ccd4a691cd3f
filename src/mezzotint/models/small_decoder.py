"""A small decoder that stands in for that of an autoencoder: faster, and not quite the same."""

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.config import Config, Width

__all__ = ["SmallDecoder", "SmallDecoderConfig"]

_LIMIT = 3.0  # latents beyond it are nearly all noise


class SmallDecoderConfig(Config):
    """The shape of a `SmallDecoder`; the defaults are those of TAESD.

    Attributes:
        latent_channels: Channels of a latent.
        out_channels: Channels of an image.
        width: Channels of every layer between.
        blocks: Residual blocks of each level, from the coarsest; f = 2 ** (levels - 1).
    """

    latent_channels: Width = 4
    out_channels: Width = 3
    width: Width = 64
    blocks: tuple[Annotated[int, Field(ge=0, le=64)], ...] = Field(
        (3, 3, 3, 1), min_length=1, max_length=8
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(self.blocks):
            raise ValueError("blocks: at least one level must have one")
        return self

    @property
    def factor(self) -> int:
        """How many times larger an image is than its latent, f."""
        return 2 ** (len(self.blocks) - 1)


class _Block(nn.Module):
    """Three convolutions and a way around them, without normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class SmallDecoder(nn.Module):
    """Normalised latents to images, by convolutions of size 3 and nearest-neighbour doubling alone.

    The form, and the names of the parameters, are those of the decoder in diffusers'
    ``AutoencoderTiny``, as which public ones are stored (TAESD). It takes latents as a diffusion
    model has them, of unit variance, and squashes them smoothly to -3..3.

    Args:
        config: The shape.

    Example:
        >>> SmallDecoder(SmallDecoderConfig(width=8, blocks=(1, 1)))(torch.zeros(2, 4, 5, 6)).shape
        torch.Size([2, 3, 10, 12])
    """

    def __init__(self, config: SmallDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            nn.ReLU(),
        ]
        for level, count in enumerate(config.blocks):
            layers += [_Block(width) for _ in range(count)]
            if level < len(config.blocks) - 1:
                layers += [
                    nn.Upsample(scale_factor=2, mode="nearest"),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                ]
        last = nn.Conv2d(width, config.out_channels, 3, padding=1)
        # an untrained network gives grey, from which it begins, and not black
        assert last.bias is not None
        nn.init.constant_(last.bias, 0.5)
        layers.append(last)
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: ``(B, C, h, w)`` normalised.

        Returns:
            ``(B, 3, f h, f w)``, about [-1, 1].
        """
        return self.layers(torch.tanh(latents / _LIMIT) * _LIMIT) * 2.0 - 1.0

    @property
    def last_layer(self) -> Tensor:
        """The last weight, whose gradients balance the adversarial loss."""
        weight = self.layers[-1].weight
        assert isinstance(weight, Tensor)
        return weight
