"""The convolutional encoder and decoder that the first stages share (appendix G).

Parameters are named as in the public diffusers checkpoints.
"""

from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.config import Config, Depth, Width, parse
from mezzotint.device import give_back_freed_memory
from mezzotint.nn.attention import AttentionBlock
from mezzotint.nn.resnet import Downsample, ResnetBlock, Upsample

__all__ = ["ConvolutionalConfig", "Decoder", "Encoder", "make_room"]

_LARGE = 1 << 26  # bytes of features, as Stable Diffusion's of 512 x 512 pixels in bfloat16
EPS = 1e-6  # of every normalisation of the published autoencoders

# channels of each level over those of the first, as in the configurations published with the paper
MULTIPLIERS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (1, 2),
    4: (1, 2, 4),
    8: (1, 2, 4, 4),
    16: (1, 1, 2, 2, 4),
    32: (1, 1, 2, 2, 4, 4),
}


class ConvolutionalConfig(Config):
    """What both autoencoders' encoders and decoders share.

    Attributes:
        in_channels: Channels of an image.
        out_channels: Channels of a reconstruction.
        latent_channels: Channels of a latent.
        block_out_channels: Channels of each level; every level but the last halves the size, so
            f = 2 ** (levels - 1).
        layers_per_block: ResBlocks of a level of the encoder; the decoder has one more.
        attention_levels: Whether a level has attention, one flag each; null means none has.
        mid_attention: Whether the coarsest features pass through attention.
        norm_num_groups: Groups of every group normalisation.
        dropout: Dropout inside ResBlocks.
    """

    in_channels: Width = 3
    out_channels: Width = 3
    latent_channels: Width = 4
    block_out_channels: tuple[Width, ...] = Field((128, 256, 512, 512), min_length=1)
    layers_per_block: Depth = 2
    attention_levels: tuple[bool, ...] | None = None
    mid_attention: bool = True
    norm_num_groups: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _widths_of_factor(cls, data: Any) -> Any:
        """Let a recipe say ``factor`` and ``base_channels`` in place of ``block_out_channels``."""
        if not isinstance(data, dict) or "factor" not in data:
            return data
        fields = dict(cast(dict[str, Any], data))
        if fields.pop("block_out_channels", None) is not None:
            raise ValueError("factor and block_out_channels both say the levels; keep one")
        f, base = fields.pop("factor"), fields.pop("base_channels", 128)
        if f not in MULTIPLIERS:
            choices = ", ".join(str(choice) for choice in MULTIPLIERS)
            raise ValueError(
                f"factor: f must be a power of two up to 32, got {f}; choose from: {choices}"
            )
        return fields | {"block_out_channels": [base * m for m in MULTIPLIERS[f]]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.block_out_channels)
        if levels > 6:
            raise ValueError(
                f"block_out_channels has {levels} levels, which is f = {2 ** (levels - 1)};"
                " the most is 6, f = 32"
            )
        if self.attention_levels is not None and len(self.attention_levels) != levels:
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} flags, but block_out_channels"
                f" has {levels} levels; give one flag a level"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {width} channels"
                    " in block_out_channels"
                )
        return self

    @property
    def factor(self) -> int:
        """The factor f by which a latent is smaller than its image, in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return self.attention_levels is not None and self.attention_levels[level]

    @classmethod
    def for_factor(cls, f: int, *, base_channels: int = 128, **fields: Any) -> Self:
        """Build the configuration of an f with the paper's widths.

        Args:
            f: 1, 2, 4, 8, 16 or 32.
            base_channels: Channels of the first level.
            fields: Any other field.

        Raises:
            ConfigError: If ``f`` is none of these, or a field is wrong.
        """
        return parse(cls, {"factor": f, "base_channels": base_channels, **fields}, cls.__name__)


def _resnet(config: ConvolutionalConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, groups=config.norm_num_groups, eps=EPS, dropout=config.dropout
    )


def _attention(config: ConvolutionalConfig, channels: int) -> AttentionBlock:
    return AttentionBlock(channels, heads=1, groups=config.norm_num_groups, eps=EPS)


def make_room(features: Tensor) -> None:
    """Give freed memory back before the largest features, which fit nowhere in it, are made.

    Args:
        features: About as large as what will be made.
    """
    large = features.numel() * features.itemsize >= _LARGE
    if large and features.device.type == "cpu" and not torch.is_grad_enabled():
        give_back_freed_memory()


class _Level(nn.Module):
    """ResBlocks of one resolution, then a change of resolution."""

    def __init__(
        self,
        config: ConvolutionalConfig,
        level: int,
        in_channels: int,
        layers: int,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for layer in range(layers):
            self.resnets.append(_resnet(config, channels if layer else in_channels, channels))
            if config.attends(level):
                self.attentions.append(_attention(config, channels))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if resample == "down":
            self.downsamplers.append(Downsample(channels, padding=0))
        elif resample == "up":
            self.upsamplers.append(Upsample(channels))

    def forward(self, h: Tensor) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions:
                h = self.attentions[layer](h)
        for resampler in (*self.downsamplers, *self.upsamplers):
            h = resampler(h)
        return h


class _MidBlock(nn.Module):
    """The coarsest features: ResBlock, attention, ResBlock."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, channels)] * config.mid_attention)

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Encoder(nn.Module):
    """Images ``(B, C, H, W)`` to ``(B, out_channels, H/f, W/f)``."""

    def __init__(self, config: ConvolutionalConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                config,
                level,
                widths[max(level - 1, 0)],
                config.layers_per_block,
                "down" if level < len(widths) - 1 else None,
            )
            for level in range(len(widths))
        )
        self.mid_block = _MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``(B, C, H, W)``, H and W divisible by f."""
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        h = F.silu(self.conv_norm_out(h), inplace=not torch.is_grad_enabled())
        return self.conv_out(h)


class Decoder(nn.Module):
    """Latents ``(B, latent_channels, h, w)`` to images ``(B, out_channels, fh, fw)``."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(
            _Level(
                config,
                level,
                widths[min(level + 1, last)],
                config.layers_per_block + 1,
                "up" if level else None,
            )
            for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode ``(B, latent_channels, h, w)``."""
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            if block is self.up_blocks[-1]:
                make_room(h)
            h = block(h)
        h = F.silu(self.conv_norm_out(h), inplace=not torch.is_grad_enabled())
        return self.conv_out(h)
