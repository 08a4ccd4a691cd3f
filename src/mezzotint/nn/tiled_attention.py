"""Attention on a processor, a tile of queries at a time: products by the matrix library alone."""

from functools import cache

import torch
from torch import Tensor

from mezzotint.device import bf16_instructions

__all__ = ["attend_in_tiles", "suits_tiles"]

_ROWS = 512  # queries of a tile
_LEAST = 256  # keys and queries


def suits_tiles(q: Tensor, k: Tensor) -> bool:
    """Say whether tiles are worth their while.

    In bfloat16 they took 0.6 to 0.75 of the time of torch's kernel, for 256 to 4,096 tokens and
    heads of 40 to 160, on a processor with AVX512_BF16; in float32 1.1 to 1.3. With AMX the kernel
    multiplies as fast as the library does, and tiles took 1.6 to 2.1 of its time.

    Args:
        q: Queries ``(B, heads, N, d)``.
        k: Keys ``(B, heads, M, d)``.
    """
    return (
        q.device.type == "cpu"
        and q.dtype is k.dtype is torch.bfloat16
        and min(q.shape[2], k.shape[2]) >= _LEAST
        and not torch.is_grad_enabled()
        and not _multiplies_by_amx()
    )


@cache
def _multiplies_by_amx() -> bool:
    return "AMX" in bf16_instructions()


def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q kᵀ / √d) v, one head and 512 queries at a time.

    torch's own kernel goes through blocks of keys as well, and mends its sums at each; here a tile
    has its scores to all keys at once, in memory that the next tile uses again. In bfloat16 scores
    are rounded, as queries and keys were, and weights once more; sums are in float32. What a query
    has in common with all keys weighs none of them more, but would take the digits of their scores:
    the mean of the keys is subtracted.

    Args:
        q: Queries ``(B, heads, N, d)``.
        k: Keys ``(B, heads, M, d)``.
        v: Values ``(B, heads, M, d)``.

    Returns:
        ``(B, heads, N, d)``, laid out as ``(B, N, heads, d)``; without a gradient.
    """
    batch, heads, count, width = q.shape
    scale = width**-0.5
    k = k - k.mean(dim=2, keepdim=True)
    out = q.new_empty(batch, count, heads, width).transpose(1, 2)
    scores = q.new_empty(min(_ROWS, count), k.shape[2])
    rows = q.new_empty(count, width)
    for sample in range(batch):
        for head in range(heads):
            mine, keys = q[sample, head].contiguous(), k[sample, head].t()
            values = v[sample, head].contiguous()
            for tile, made in zip(mine.split(_ROWS), rows.split(_ROWS), strict=True):
                weights = scores[: len(tile)]
                torch.addmm(weights, tile, keys, beta=0, alpha=scale, out=weights)
                torch.softmax(weights, -1, out=weights)
                torch.mm(weights, values, out=made)
            out[sample, head] = rows
    return out
