"""Captions through an unmasked transformer tau_theta (paper, section 3.3 and appendix E.2.1).

The paper's text-to-image model reads BERT's WordPiece tokens with a transformer that is trained
jointly with the UNet. Here the vocabulary is trained on the captions themselves.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from mezzotint.conditioning.base import Conditioner, Conditioning, ConditionInputs
from mezzotint.config import Config
from mezzotint.nn.attention import attend

__all__ = ["TextConditioner", "TextConditionerConfig", "train_tokenizer"]

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


class TextConditionerConfig(Config):
    """A WordPiece tokenizer and a transformer of full (unmasked) self-attention.

    Attributes:
        width: Width d of the tokens; the UNet's ``cross_attention_dim``.
        layers: Transformer blocks.
        heads: Attention heads; ``width`` is divisible by it.
        max_length: Tokens at most, start and end included; longer captions are cut.
        vocab_size: Tokens at most in the trained vocabulary.
        dropout: Dropout probability inside the blocks.
    """

    kind: Literal["text"] = "text"
    width: int = Field(default=512, ge=1)
    layers: int = Field(default=8, ge=0)
    heads: int = Field(default=8, ge=1)
    max_length: int = Field(default=77, ge=3)
    vocab_size: int = Field(default=4096, ge=64)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TextConditionerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer on captions; the same captions give the same one.

    The library's own WordPiece trainer breaks ties by chance. Its byte-pair trainer does not when
    it knows no word boundaries, so the pieces are learned by it, and each enters the vocabulary in
    the forms, at the start of a word or inside, in which it occurs.

    Args:
        captions: The texts; their order does not matter.
        vocab_size: Tokens at most, the four special ones and the single characters included, where
            the characters alone are not more.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    texts = sorted(captions)
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = splitter
    trainer = BpeTrainer(vocab_size=vocab_size, show_progress=False)
    pieces.train_from_iterator(sorted(words.elements()), trainer)
    forms: Counter[str] = Counter()
    for word, count in words.items():
        for place, piece in enumerate(pieces.encode(word).tokens):
            forms[piece if place == 0 else f"##{piece}"] += count
    characters = sorted({c for word in words for c in (word[0], *(f"##{x}" for x in word[1:]))})
    frequent = sorted(forms.keys() - set(characters), key=lambda form: (-forms[form], form))
    tokens = [PAD, UNKNOWN, START, END, *characters, *frequent]
    tokens = tokens[: max(vocab_size, 4 + len(characters))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return tokenizer


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, M, d / heads)
        attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.to_out(attended))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class TextConditioner(Conditioner):
    """Captions to ``(B, M, d)`` tokens; the null is the empty caption.

    Args:
        config: The transformer's shape.
        tokenizer: From `train_tokenizer`; a part of the model, stored with its weights.
    """

    wants = "caption"
    description = "a prompt"

    def __init__(self, config: TextConditionerConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._start = tokenizer.token_to_id(START)
        self._end = tokenizer.token_to_id(END)
        self._pad = tokenizer.token_to_id(PAD)
        width = config.width
        self.token_embedding = nn.Embedding(tokenizer.get_vocab_size(), width)
        self.position_embedding = nn.Embedding(config.max_length, width)
        self.blocks = nn.ModuleList(
            _Block(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def settings(self) -> dict[str, Any]:
        """Return configuration and tokenizer."""
        return {**self.config.to_dict(), "tokenizer": self.tokenizer.to_str()}

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, both ``(B, max_length)``.

        Every caption is padded to the same length, so that a sample's arithmetic does not depend
        on its neighbours.
        """
        encoded = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        room = self.config.max_length - 2
        rows = [[self._start, *item.ids[:room], self._end] for item in encoded]
        length = self.config.max_length
        ids = torch.tensor([row + [self._pad] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(length)[None] < lengths[:, None]

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.captions``; see `Conditioner.forward`."""
        captions = self.captions(inputs, drop)
        ids, mask = self.tokenize(captions)
        device = self.token_embedding.weight.device
        ids, mask = ids.to(device), mask.to(device)
        positions = torch.arange(ids.shape[1], device=device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x, mask[:, None, None])  # (B, 1, 1, M): padding is attended by nobody
        return Conditioning(crossattn=self.final_norm(x), crossattn_mask=mask)

    def null(self, count: int) -> Conditioning:
        """Return the empty caption's tokens, ``count`` times."""
        return self(ConditionInputs(count=1, captions=[""])).repeat(count)
