"""The levels of a UNet: ResBlocks and attention on the way down, in the middle and on the way up.

All take features ``(B, C, H, W)``, the time embedding ``(B, time_embed_dim)``, and tokens ``(B, M,
cross_attention_dim)`` with their mask, ``(B, 1, 1, M)`` or of regions, where the network is told
any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mezzotint.nn.attention import AttentionBlock, SpatialTransformer
from mezzotint.nn.kept_context import KeptContext
from mezzotint.nn.regions import Regions
from mezzotint.nn.resnet import Downsample, ResnetBlock, Upsample

if TYPE_CHECKING:
    from mezzotint.models.unet import UNetConfig

__all__ = ["DownBlock", "MidBlock", "UpBlock"]


class DownBlock(nn.Module):
    """One level on the way down, or its beginning; also returns what the way up will need."""

    def __init__(
        self, config: UNetConfig, level: int, in_channels: int, *, downsample: bool
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for layer in range(config.layers_per_block):
            self.resnets.append(_resnet(config, channels if layer else in_channels, channels))
            if config.attention_levels[level]:
                self.attentions.append(_attention(config, channels))
        self.downsamplers = nn.ModuleList()
        if downsample:
            self.downsamplers.append(
                _resnet(config, channels, channels, "down")
                if config.resblock_updown
                else Downsample(channels, padding=config.downsample_padding)
            )

    def forward(
        self,
        h: Tensor,
        time: Tensor,
        context: Tensor | KeptContext | None,
        mask: Tensor | Regions | None,
        most: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last features, and those after each layer: all, or so many at most."""
        outputs: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            if layer == most:
                return h, outputs
            h = resnet(h, time)
            if self.attentions:
                h = self.attentions[layer](h, context, mask)
            outputs.append(h)
        for downsampler in self.downsamplers:
            if len(outputs) == most:
                return h, outputs
            h = downsampler(h, time)
            outputs.append(h)
        return h, outputs


class MidBlock(nn.Module):
    """The coarsest features: ResBlock, attention, ResBlock."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, channels)])

    def forward(
        self,
        h: Tensor,
        time: Tensor,
        context: Tensor | KeptContext | None,
        mask: Tensor | Regions | None,
    ) -> Tensor:
        """Map features to the same shape."""
        h = self.resnets[0](h, time)
        h = self.attentions[0](h, context, mask)
        return self.resnets[1](h, time)


class UpBlock(nn.Module):
    """One level on the way up; every ResBlock takes one of the way down's outputs beside.

    With ``first`` above 0, or fewer outputs than ResBlocks, it goes through a part of itself.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: int,
        skip_channels: list[int],
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for layer, skip in enumerate(skip_channels):
            self.resnets.append(
                _resnet(config, (channels if layer else in_channels) + skip, channels)
            )
            if config.attention_levels[level]:
                self.attentions.append(_attention(config, channels))
        self.upsamplers = nn.ModuleList()
        if upsample:
            self.upsamplers.append(
                _resnet(config, channels, channels, "up")
                if config.resblock_updown
                else Upsample(channels)
            )

    def forward(
        self,
        h: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor | KeptContext | None,
        mask: Tensor | Regions | None,
        size: torch.Size | None,
        first: int = 0,
    ) -> Tensor:
        """Map features to those of the level above, or to what the next of its ResBlocks takes.

        Args:
            h: Features.
            skips: Outputs of the way down; each ResBlock takes the last that is left.
            time: Embedding.
            context: Tokens.
            mask: Theirs.
            size: Height and width above, if there is a level above.
            first: The ResBlock to begin with.
        """
        for layer, skip in enumerate(reversed(skips), start=first):
            h = self.resnets[layer](torch.cat([h, skip], dim=1), time)
            if self.attentions:
                h = self.attentions[layer](h, context, mask)
        if first + len(skips) == len(self.resnets):
            for upsampler in self.upsamplers:
                h = upsampler(h, time, size)
        return h


def _resnet(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    resample: Literal["down", "up"] | None = None,
) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        time_dim=config.time_embed_dim,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
    )


def _attention(config: UNetConfig, channels: int) -> SpatialTransformer | AttentionBlock:
    heads, groups = config.heads(channels), config.norm_num_groups
    if config.cross_attention_dim is None:
        return AttentionBlock(channels, heads, groups=groups, eps=config.norm_eps)
    return SpatialTransformer(
        channels,
        heads,
        config.cross_attention_dim,
        layers=config.transformer_layers_per_block,
        groups=groups,
        linear=config.use_linear_projection,
    )
