"""Captions through the transformer of the paper's text-to-image model (appendix E.2.1).

It reads BERT's WordPiece tokens, but is no BERT: its layers normalise first and are trained jointly
with the UNet. Parameters are named as in the public checkpoint for diffusers (``LDMBertModel``).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning.base import Conditioner, Conditioning, ConditionInputs
from mezzotint.config import Config, Width
from mezzotint.errors import ConfigError
from mezzotint.nn.attention import attend

__all__ = [
    "BertLayer",
    "BertTextConditioner",
    "BertTextConditionerConfig",
    "BertTransformer",
    "TransformerShape",
    "unread_logits",
]

_PAD, _START, _END = "[PAD]", "[CLS]", "[SEP]"


class TransformerShape(Config):
    """The shape of a `BertTransformer`; the defaults are those of the text-to-image model.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        width: Width d of the tokens; the UNet's ``cross_attention_dim``.
        layers: Transformer blocks.
        heads: Attention heads.
        head_dim: Width of a head; all heads together may be narrower or wider than ``width``.
        ffn_dim: Width inside the feed-forward networks.
        max_length: Tokens at most, all that are not words included.
    """

    vocab_size: int = Field(default=30522, ge=4, le=1 << 24)
    width: Width = 1280
    layers: int = Field(default=32, ge=0, le=64)
    heads: Width = 8
    head_dim: Width = 64
    ffn_dim: Width = 5120
    max_length: int = Field(default=77, ge=3, le=1 << 16)


class _SelfAttention(nn.Module):
    """Every token looks at every token, padding included."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        inner = shape.heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, inner, bias=False)
        self.k_proj = nn.Linear(shape.width, inner, bias=False)
        self.v_proj = nn.Linear(shape.width, inner, bias=False)
        self.out_proj = nn.Linear(inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, head_dim)
            for tokens in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class BertLayer(nn.Module):
    """A pre-norm transformer block; ``final_layer_norm`` is what its second half begins with."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(shape.width)
        self.self_attn = _SelfAttention(shape)
        self.final_layer_norm = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, shape.ffn_dim)
        self.fc2 = nn.Linear(shape.ffn_dim, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, M, width)`` to the same shape."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class BertTransformer(nn.Module):
    """An unmasked pre-norm transformer with learned positions (paper, appendix E.2.1).

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.embed_positions = nn.Embedding(shape.max_length, shape.width)
        self.layers = nn.ModuleList(BertLayer(shape) for _ in range(shape.layers))
        self.layer_norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.embed_positions.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids ``(B, M)``, with M at most ``max_length``, to tokens ``(B, M, d)``."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids) + self.embed_positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


def unread_logits(shape: TransformerShape) -> nn.Linear:
    """Build the output layer that the published weights have; no condition depends on it."""
    return nn.Linear(shape.width, shape.vocab_size).requires_grad_(False)


class BertTextConditionerConfig(TransformerShape):
    """The text encoder of the paper's text-to-image model; see `TransformerShape`."""

    kind: Literal["bert"] = "bert"


class BertTextConditioner(Conditioner):
    """Captions to ``(B, max_length, d)`` tokens; the null is the empty caption.

    Brackets are plain characters to it.

    Args:
        config: The transformer's shape.
        tokenizer: WordPiece with BERT's special tokens; a part of the model.

    Raises:
        ConfigError: If the tokenizer is not for this transformer.
    """

    wants = "caption"
    description = "a prompt"

    def __init__(self, config: BertTextConditionerConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise ConfigError(
                f"vocab_size is {config.vocab_size}, but the tokenizer has"
                f" {tokenizer.get_vocab_size()} tokens"
            )
        # a tokenizer from a file may bring lengths of its own; here the configuration says them
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.config = config
        self.tokenizer = tokenizer
        self._pad, self._start, self._end = (_id(tokenizer, t) for t in (_PAD, _START, _END))
        self.model = BertTransformer(config)
        self.to_logits = unread_logits(config)

    def settings(self) -> dict[str, Any]:
        """Return configuration and tokenizer."""
        return {**self.config.to_dict(), "tokenizer": self.tokenizer.to_str()}

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids ``(B, max_length)``: start, at most ``max_length - 2``, end, padding."""
        length = self.config.max_length
        encoded = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [[self._start, *item.ids[: length - 2], self._end] for item in encoded]
        return torch.tensor([row + [self._pad] * (length - len(row)) for row in rows])

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.captions``; see `Conditioner.forward`."""
        captions = self.captions(inputs, drop)
        if inputs.tokens is not None:
            return self.known(captions, inputs.tokens, self.model.embed_tokens.weight)
        ids = self.tokenize(captions).to(self.model.embed_tokens.weight.device)
        return Conditioning(crossattn=self.model(ids))

    def null(self, count: int) -> Conditioning:
        """Return the empty caption's tokens, ``count`` times."""
        return self(ConditionInputs(count=1, captions=[""])).repeat(count)


def _id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(f"the tokenizer has no {token}: the model reads BERT's vocabulary")
    return number
