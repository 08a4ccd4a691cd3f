"""A context whose keys and values every cross-attention computes once, however often it is asked.

Through a sampling the context of a cross-attention stays the same, and so do ``to_k(context)`` and
``to_v(context)`` of every layer; only the queries change.
"""

from typing import Protocol

from torch import Tensor

__all__ = ["KeptContext", "Projects"]


class Projects(Protocol):
    """A layer that makes keys and values of a context: an `Attention`."""

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, heads, M, d)`` of a context ``(B, M, context_dim)``."""
        ...


class KeptContext:
    """Tokens to attend to, with what each layer made of them.

    It belongs to its tokens: another context, or another batch of the same, is another object. It
    holds while neither the tokens nor the layers' weights change, and no gradient is wanted. It
    takes keys and values of one batch for each layer that attends to it, and no more with time.

    Args:
        tokens: ``(B, M, d)``.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._made: dict[Projects, tuple[Tensor, Tensor]] = {}

    def keys_values(self, layer: Projects) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of the tokens, computed at its first call."""
        if layer not in self._made:
            self._made[layer] = layer.keys_values(self.tokens)
        return self._made[layer]
