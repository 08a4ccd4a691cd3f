"""What the calls of a UNet in one sampling have in common, and so need not compute again."""

import torch
from torch import Tensor

from mezzotint.nn.kept_context import KeptContext

__all__ = ["DeepFeatures", "SamplingMemory"]


class DeepFeatures:
    """The deep features of the last call that computed them (DeepCache, Ma et al. 2023).

    From step to step the features of the coarse levels change little, and they cost the most (arXiv
    2312.00858, section 3). The paper's skip branch m divides the network: blocks before it on the
    way down and after it on the way up are computed at every call, and what comes up to meet it is
    kept. Whoever holds this object says when to compute it anew, and sees to it that what is kept
    is of the same batch under the same conditions.

    Args:
        blocks: m: how many outputs on the way down are computed at every call; at least 1. On the
            way up it is one more, for there the first convolution's output comes in as well.

    Attributes:
        kept: ``(B, C, h, w)`` what goes into the first of these blocks on the way up; one tensor.
    """

    def __init__(self, blocks: int) -> None:
        assert blocks >= 1, "the request says so"
        self.blocks = blocks
        self.kept: Tensor | None = None

    def forget(self) -> None:
        """Let the next call compute the deep features."""
        self.kept = None


class SamplingMemory:
    """Passed to every call of a sampling; it ends with that.

    While gradients are wanted nothing of it is used. The network's weights, adapters among them,
    must not change within its life, nor tokens in place.

    Args:
        deep: Deep features to share between calls; by default every call computes its own. This is
            an approximation; all else is exact.
    """

    def __init__(self, deep: DeepFeatures | None = None) -> None:
        self._deep = deep
        self._context: KeptContext | None = None

    @property
    def deep(self) -> DeepFeatures | None:
        """The deep features, where a call may use them."""
        return None if torch.is_grad_enabled() else self._deep

    def context(self, tokens: Tensor | None) -> Tensor | KeptContext | None:
        """Return a context ``(B, M, d)`` with the keys and values that are known of it.

        The last one alone is kept.
        """
        if tokens is None or torch.is_grad_enabled():
            return tokens
        if self._context is None or self._context.tokens is not tokens:
            self._context = KeptContext(tokens)
        return self._context
