"""Residual convolution blocks and the layers that change resolution.

Parameters are named as in the public diffusers checkpoints.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Downsample", "ResnetBlock", "Upsample"]


def _double(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """Nearest neighbours at twice the size, or at the size that a skip connection dictates."""
    return F.interpolate(x, size=list(size) if size else None, scale_factor=None if size else 2.0)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around an optional time embedding, with a residual connection.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where they differ, the residual is projected.
        time_dim: Width of the time embedding; absent, the block takes none.
        groups: Groups of the normalisations.
        eps: Epsilon of the normalisations.
        dropout: Probability with which a feature before the second convolution is dropped.
        scale_shift: Whether the embedding scales and shifts the second normalisation (Dhariwal
            and Nichol 2021, arXiv 2105.05233, section 3) or is added before it.
        resample: Halve or double the resolution inside the block (Song et al. 2021, BigGAN's
            blocks): average pooling or nearest neighbours on both branches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = (
            nn.Linear(time_dim, (2 if scale_shift else 1) * out_channels) if time_dim else None
        )
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(
        self, x: Tensor, time: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Map features ``(B, C, H, W)`` and a time embedding ``(B, time_dim)`` to features.

        Args:
            x: Features.
            time: The time embedding, where the block was built to take one.
            size: Height and width to double to, where they are not 2H and 2W.
        """
        reuse = not torch.is_grad_enabled()  # memory of what nothing else looks at
        h = F.silu(self.norm1(x), inplace=reuse)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = _double(h, size), _double(x, size)
        h = self.conv1(h)
        if self.time_emb_proj is None:
            h = self.norm2(h)
        else:
            assert time is not None, "the block takes a time embedding"
            embedding = self.time_emb_proj(F.silu(time))[:, :, None, None]
            if self.scale_shift:
                scale, shift = embedding.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + embedding)
        h = self.conv2(self.dropout(F.silu(h, inplace=reuse)))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h.add_(x) if reuse and h.dtype is x.dtype else h + x


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2.

    Args:
        channels: Channels C.
        padding: 1 pads every side by a pixel. 0 pads the right and the bottom only, as
            autoencoders and the first unconditional models do.
    """

    def __init__(self, channels: int, *, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map ``(B, C, H, W)`` to half the size; the time embedding is not used."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then convolve.

    Args:
        channels: Channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Tensor, time: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Map ``(B, C, H, W)`` to twice the size or to ``size``; the embedding is not used."""
        return self.conv(_double(x, size))
