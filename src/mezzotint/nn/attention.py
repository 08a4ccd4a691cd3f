"""Attention: the product, the transformer of cross-attention models and the plain block.

Parameters are named as in the public diffusers checkpoints.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.nn.kept_context import KeptContext
from mezzotint.nn.regions import Regions
from mezzotint.nn.tiled_attention import attend_in_tiles, suits_tiles
from mezzotint.nn.token_merging import TokenMerging

__all__ = [
    "GEGLU",
    "Attention",
    "AttentionBlock",
    "SpatialTransformer",
    "TransformerBlock",
    "attend",
]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ / √d) v (Vaswani et al. 2017, equation 1).

    Args:
        q: Queries ``(B, heads, N, d)``.
        k: Keys ``(B, heads, M, d)``.
        v: Values ``(B, heads, M, d)``.
        mask: Bool, true where a key counts, broadcast to ``(B, heads, N, M)``. A query that may
            look at nothing gets zeros.

    Returns:
        ``(B, heads, N, d)``.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
        >>> keep = torch.tensor([[True, True, False, False]])
        >>> torch.allclose(attend(q, k, v, keep), attend(q, k[:, :, :2], v[:, :, :2]), atol=1e-6)
        True
    """
    blind = None
    if mask is not None:
        blind = ~mask.any(dim=-1, keepdim=True)
        mask = mask | blind  # a softmax over nothing is NaN, and so is its gradient
    # on a CPU the fused kernel's backward in half precision costs five times the product's
    if q.device.type == "cpu" and q.dtype != torch.float32 and torch.is_grad_enabled():
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.matmul(scores.softmax(dim=-1), v)
    elif mask is None and suits_tiles(q, k):
        out = attend_in_tiles(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if blind is None else out.masked_fill(blind, 0.0)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context.

    Args:
        dim: Width of the tokens.
        heads: Number of heads.
        context_dim: Width of the context; absent, the tokens attend to themselves.
        bias: Whether queries, keys and values have a bias; the output always has one.
    """

    def __init__(
        self, dim: int, heads: int, *, context_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self, x: Tensor, context: Tensor | KeptContext | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, dim)``.
            context: ``(B, M, context_dim)``; absent, ``x`` itself.
            mask: Bool, broadcast to ``(B, heads, N, M)``.

        Returns:
            ``(B, N, dim)``.
        """
        if isinstance(context, KeptContext):
            k, v = context.keys_values(self)
        else:
            k, v = self.keys_values(x if context is None else context)
        q = self._split(self.to_q(x))
        return self.to_out(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, heads, M, d)`` of a context ``(B, M, context_dim)``."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, d)


class AttentionBlock(Attention):
    """Plain self-attention over the positions of a feature map, with a residual connection.

    It is an `Attention` rather than having one because the checkpoints name the projections beside
    ``group_norm``.

    Args:
        channels: Channels C.
        heads: Number of heads.
        groups: Groups of the normalisation.
        eps: Epsilon of the normalisation.

    Attributes:
        merging: While set, attention is by merged tokens.
    """

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.merging: TokenMerging | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeptContext | None = None,
        mask: Tensor | Regions | None = None,
    ) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape; it takes no context."""
        assert context is None and not isinstance(mask, Regions), "plain attention has no context"
        tokens = _map_to_tokens(self.group_norm(x))
        if self.merging is None:
            attended = super().forward(tokens, None, mask)
        else:
            assert mask is None, "merged tokens have no mask"
            attended = self.merging(super().forward, tokens, x.shape[2:])
        return x + _tokens_to_map(attended, x.shape)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, arXiv 2002.05202).

    Args:
        dim: Width of the input.
        out_dim: Width of the output.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, dim)`` to ``(…, out_dim)``."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer's position-wise MLP, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # the checkpoints count a dropout between the two layers
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


SelfAttention = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""``merge(attend, tokens (B, N, C)) -> (B, N, C)``"""


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a GEGLU MLP, each on normalised tokens with a residual.

    Args:
        dim: Width of the tokens.
        heads: Number of heads.
        context_dim: Width of the context.
    """

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeptContext,
        mask: Tensor | None = None,
        merge: SelfAttention | None = None,
    ) -> Tensor:
        """Map ``(B, N, dim)`` and a context ``(B, M, context_dim)`` to ``(B, N, dim)``.

        Args:
            x: Tokens.
            context: What they attend to, after themselves.
            mask: See `Attention`.
            merge: How to let tokens attend to themselves; by default, as they are.
        """
        tokens = self.norm1(x)
        x = x + (self.attn1(tokens) if merge is None else merge(self.attn1, tokens))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, appendix E.2.1).

    Args:
        channels: Channels C.
        heads: Number of heads.
        context_dim: Width of the context.
        layers: Number of transformer blocks.
        groups: Groups of the normalisation.
        linear: Whether the projections in and out are stored as linear layers (Stable Diffusion
            2) or as convolutions of size 1.

    Attributes:
        merging: While set, self-attention is by merged tokens.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int,
        *,
        layers: int = 1,
        groups: int = 32,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.merging: TokenMerging | None = None
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(layers)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        )

    def forward(
        self, x: Tensor, context: Tensor | KeptContext, mask: Tensor | Regions | None = None
    ) -> Tensor:
        """Map ``(B, C, H, W)`` and a context ``(B, M, d)`` to ``(B, C, H, W)``.

        Args:
            x: Features.
            context: Tokens to attend to.
            mask: Bool, broadcast to ``(B, heads, HW, M)``, true where a token counts; or where each
                does.
        """
        if isinstance(mask, Regions):
            mask = mask.at(*x.shape[2:])
        h = self.norm(x).contiguous(memory_format=torch.channels_last)
        h = self.proj_in(_map_to_tokens(h)) if self.linear else _map_to_tokens(self.proj_in(h))
        merge = None if self.merging is None else partial(self.merging, size=x.shape[2:])
        for block in self.transformer_blocks:
            h = block(h, context, mask, merge)
        if self.linear:
            return x + _tokens_to_map(self.proj_out(h), x.shape)
        return x + self.proj_out(_tokens_to_map(h, x.shape))


def _map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, HW, C); no copy if channels lie last, as they then do in tokens too."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _tokens_to_map(tokens: Tensor, shape: torch.Size) -> Tensor:
    """(B, HW, C) to (B, C, H, W) without a copy: the same memory, channels last."""
    return tokens.transpose(1, 2).unflatten(2, shape[2:])
