"""Sinusoidal embeddings of time and of place, and the MLP that follows them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TimestepEmbedding", "coordinates", "timestep_embedding"]


def coordinates(
    height: int, width: int, channels: int, device: torch.device | None = None
) -> Tensor:
    """Embed places between the edges as sines and cosines, of a map of any size.

    Args:
        height: Of the map.
        width: Of the map.
        channels: A multiple of 4: sines and cosines of both axes, whose wavelengths are 4, 2, 1, …
            times the side.
        device: Where to.

    Returns:
        ``(1, channels, height, width)`` float32 in -1..1.

    Example:
        >>> coordinates(2, 4, 4)[0, 0]  # the sine of the height
        tensor([[0.3827, 0.3827, 0.3827, 0.3827],
                [0.9239, 0.9239, 0.9239, 0.9239]])
    """
    waves = math.pi / 2 * 2.0 ** torch.arange(channels // 4, device=device)[:, None, None]
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    angles = [waves * part.expand(height, width) for part in (y[:, None], x)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())])[None]


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Tensor:
    """Embed times as sines and cosines of geometrically spaced frequencies.

    Args:
        t: ``(B,)`` times, whole or fractional.
        dim: Width d of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: Cosines first, as latent diffusion has it; otherwise sines first.
        freq_shift: The lowest frequency is ``max_period ** -((d/2 - 1) / (d/2 - freq_shift))``:
            1 makes it ``1 / max_period`` exactly (Ho et al. 2020), 0 is latent diffusion's.
        max_period: Longest period, over 2 pi.

    Returns:
        ``(B, dim)`` float32 in -1..1.

    The source is Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.

    Example:
        >>> timestep_embedding(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, d/2)
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them.

    Args:
        in_dim: Width of what is embedded.
        dim: Width of the result.
        condition_dim: Width of a second embedding that is projected and added to the first before
            the layers: the guidance scale of a distilled model (Meng et al. 2023, arXiv
            2210.03142).
    """

    def __init__(self, in_dim: int, dim: int, *, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = nn.Linear(condition_dim, in_dim, bias=False) if condition_dim else None
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(B, in_dim)``, and a condition ``(B, condition_dim)``, to ``(B, dim)``."""
        if condition is not None:
            assert self.cond_proj is not None, "built without condition_dim"
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))
