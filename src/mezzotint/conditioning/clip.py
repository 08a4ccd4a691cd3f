"""Captions through CLIP's text encoder (Radford et al. 2021), as Stable Diffusion reads them.

Prompts may be of any length and may weight their words. The transformer is that of the package
``transformers``; its parameters have their published names under ``text_model``.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from mezzotint.conditioning.base import (
    Conditioner,
    Conditioning,
    ConditionInputs,
    Emphasis,
    TextOptions,
)
from mezzotint.conditioning.prompts import Chunk, Fragment, chunk_tokens, parse_prompt
from mezzotint.config import Config, Count, Depth, Width
from mezzotint.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    RequestError,
    nearest,
)

__all__ = ["ClipConditioner", "ClipConditionerConfig", "check_vocabulary"]

_COMMA = ",</w>"
# far beyond any use, and not yet too much for half precision
_STRONGEST = 1000.0
# as a share of the values' size; float32 sums tens of thousands of them to about 1e-7 of it
_LEAST_MEAN = 1e-5


class ClipConditionerConfig(Config):
    """The shape of a CLIP text encoder; the defaults are those of ViT-L/14 in Stable Diffusion 1.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Width d of the tokens; the UNet's ``cross_attention_dim``.
        intermediate_size: Width inside the feed-forward networks.
        num_hidden_layers: Transformer blocks.
        num_attention_heads: Attention heads.
        max_position_embeddings: Tokens that are read at once, start and end included.
        hidden_act: ``quick_gelu`` is x · sigmoid(1.702 x), with which OpenAI trained its models.
        layer_norm_eps: Added to the variance by the layer norms.
        projection_dim: Width of the space that CLIP shares with images; no condition depends on it.
        bos_token_id: The token that a text starts with.
        eos_token_id: The token that it ends with.
        pad_token_id: The token that fills it up; 0 for OpenCLIP's models.
        output_layer: Which layer, counted from the last, is the model's own last: 2 for Stable
            Diffusion 2 where its file holds all 24.
    """

    kind: Literal["clip"] = "clip"
    vocab_size: Count = 49408
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    max_position_embeddings: int = Field(default=77, ge=3, le=1 << 16)
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    projection_dim: Width = 768
    bos_token_id: int = Field(default=49406, ge=0)
    eos_token_id: int = Field(default=49407, ge=0)
    pad_token_id: int = Field(default=49407, ge=0)
    output_layer: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "ClipConditionerConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads"
                f" {self.num_attention_heads}"
            )
        if self.output_layer > self.num_hidden_layers:
            raise ValueError(
                f"output_layer: expected 1 to num_hidden_layers, {self.num_hidden_layers},"
                f" got {self.output_layer}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name}: expected less than vocab_size, {self.vocab_size},"
                    f" got {getattr(self, name)}"
                )
        return self


def check_vocabulary(config: ClipConditionerConfig, tokenizer: Tokenizer) -> None:
    """Raise a ConfigError if a tokenizer has more tokens than a transformer knows."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"vocab_size is {config.vocab_size}, but the tokenizer has a token {largest}"
        )


class _TokenEmbedding(nn.Embedding):
    """The vocabulary's vectors, and those of added words, whose ids begin after its own."""

    added: Tensor | None = None  # (n, d) float32; no part of the weights

    def forward(self, input: Tensor) -> Tensor:
        if self.added is None:
            return super().forward(input)
        own = super().forward(input.clamp(max=self.num_embeddings - 1))
        more = self.added.to(own)[(input - self.num_embeddings).clamp(min=0)]
        return torch.where((input >= self.num_embeddings)[..., None], more, own)


class ClipConditioner(Conditioner):
    """Captions to ``(B, 77 n, d)`` tokens, n chunks of 77; the null is the empty caption.

    Args:
        config: The transformer's shape.
        tokenizer: From `mezzotint.conditioning.vocabularies`; a part of the model.

    Raises:
        ConfigError: If the tokenizer is not for this transformer.
        MissingExtraError: If ``transformers`` is not installed.
    """

    wants = "caption"
    description = "a prompt"

    def __init__(self, config: ClipConditionerConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        check_vocabulary(config, tokenizer)
        # a tokenizer from a file may bring lengths of its own; here the configuration says them
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.config = config
        self.tokenizer = tokenizer
        self.text_model = _text_model(config)
        self._words: dict[str, Tensor] = {}  # (n, d) float32 on the CPU, as they are looked for
        self._pattern: re.Pattern[str] | None = None
        self.register_load_state_dict_pre_hook(_without_position_ids)

    @property
    def words(self) -> tuple[str, ...]:
        """The words that were added."""
        return tuple(sorted(self._words))

    def settings(self) -> dict[str, Any]:
        """Return the configuration, and tokenizer and added words as their sha256."""
        tokenizer = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()
        settings = {**self.config.to_dict(), "tokenizer": tokenizer}
        if self._words:
            settings["words"] = {
                word: hashlib.sha256(self._words[word].numpy().tobytes()).hexdigest()
                for word in self.words
            }
        return settings

    def add_word(self, word: str, vectors: Tensor) -> None:
        """Let a word stand for vectors: textual inversion (Gal et al. 2022, arXiv 2208.01618).

        It is found in whatever case it is typed, where it is no part of a longer word.

        Args:
            word: One or more words, as they stand in prompts once brackets are read.
            vectors: ``(n, d)``, in place of what the vocabulary has for its tokens.

        Raises:
            RequestError: If it is blank, or was added before.
            CheckpointError: If the vectors are not for this text encoder.
        """
        key = _key(word)
        if not key:
            raise RequestError("the word that an embedding is called by is blank")
        for other in self._words:
            if _key(other) == key:
                raise RequestError(f"{word!r} already stands for an embedding, {other!r}")
        width = self.config.hidden_size
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise CheckpointError(
                f"embedding {word!r}: its shape is {tuple(vectors.shape)}, but the text encoder"
                f" takes vectors of width {width}"
            )
        kept = vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._know({**self._words, word: kept})

    def remove_word(self, word: str) -> None:
        """Let a word mean again what it did.

        Raises:
            RequestError: If it was not added; it names the nearest.
        """
        if word not in self._words:
            raise RequestError(f"no embedding is called {word!r}; {nearest(word, self._words)}")
        self._know({other: self._words[other] for other in self._words if other != word})

    @torch.no_grad()
    def vectors_of(self, text: str) -> Tensor:
        """Return the vocabulary's vectors of a text's tokens, ``(n, d)``."""
        vocabulary = cast(Any, self.text_model).embeddings.token_embedding
        ids = torch.tensor(self._plain_ids(text), dtype=torch.long)
        return vocabulary.weight[ids.to(vocabulary.weight.device)].clone()

    def train_word(self, word: str) -> nn.Parameter:
        """Make the vectors of an added word a parameter, and return it, ``(n, d)``.

        It is none of the module's own, and no other word may be added or removed as long as it is
        trained. What stands in `settings` stays what was added.

        Args:
            word: The only one that was added.
        """
        assert self.words == (word,), "one word at a time is trained"
        vocabulary = cast(Any, self.text_model).embeddings.token_embedding
        trained = nn.Parameter(vocabulary.added.to(vocabulary.weight, copy=True))
        # past the module, whose state is the published weights
        vocabulary.__dict__["added"] = trained
        return trained

    def _know(self, words: dict[str, Tensor]) -> None:
        """Find these words from now on, the longer ones first."""
        ordered = sorted(words, key=lambda word: (-len(_key(word)), word))
        self._words = {word: words[word] for word in ordered}
        vocabulary = cast(Any, self.text_model).embeddings.token_embedding
        if ordered:
            self._pattern = re.compile("|".join(map(_pattern, ordered)), re.IGNORECASE)
            vocabulary.added = torch.cat(list(self._words.values()))
        else:
            self._pattern = vocabulary.added = None

    def _tokenize(self, text: str) -> list[int | tuple[int, ...]]:
        """Token ids, those of an added word as one tuple."""
        if self._pattern is None:
            return [*self._plain_ids(text)]
        text = unicodedata.normalize("NFC", text)
        own = _word_ids(self._words.values(), self.config.vocab_size)
        found: list[int | tuple[int, ...]] = []
        place = 0
        for match in self._pattern.finditer(text):
            assert match.lastindex is not None, "each word is a group"
            found += [*self._plain_ids(text[place : match.start()]), own[match.lastindex - 1]]
            place = match.end()
        return [*found, *self._plain_ids(text[place:])]

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chunks(self, caption: str, emphasis: Emphasis = "original") -> list[Chunk]:
        """Read a caption.

        Args:
            caption: As the user typed it, without adapters.
            emphasis: How brackets act; where they are plain characters, so is ``BREAK``.

        Returns:
            What goes through the transformer together, without start, end and padding; 75 tokens
            at most where it reads 77. Ids from ``vocab_size`` on are those of added words.

        Raises:
            RequestError: If a weight is beyond any use.
        """
        parts = [[Fragment(caption)]] if emphasis == "none" else parse_prompt(caption)
        if emphasis == "ignore":
            parts = [[Fragment(fragment.text) for fragment in part] for part in parts]
        for fragment in (fragment for part in parts for fragment in part):
            if not abs(fragment.weight) <= _STRONGEST:
                raise RequestError(
                    f"prompt: {fragment.text.strip()!r} has the weight {fragment.weight:.4g};"
                    f" expected at most {_STRONGEST:g}"
                )
        comma = self.tokenizer.token_to_id(_COMMA)
        size = self.config.max_position_embeddings - 2
        return chunk_tokens(parts, self._tokenize, comma, size=size)

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.captions``; see `Conditioner.forward`."""
        captions = self.captions(inputs, drop)
        if inputs.tokens is not None:
            weight = cast(Any, self.text_model).final_layer_norm.weight
            return self.known(captions, inputs.tokens, weight)
        layer = self._layer(inputs.text.clip_skip)
        cut = [self.chunks(caption, inputs.text.emphasis) for caption in captions]
        tokens = self._encode([chunk for chunks in cut for chunk in chunks], inputs.text, layer)
        samples = tokens.split([len(chunks) for chunks in cut])  # each (n, 77, d)
        first, *others = (Conditioning(crossattn=rows.flatten(0, 1)[None]) for rows in samples)
        return first.cat(*others)

    def null(self, count: int) -> Conditioning:
        """Return the empty caption's tokens, ``count`` times."""
        return self(ConditionInputs(count=1, captions=[""])).repeat(count)

    def _layer(self, clip_skip: int) -> int:
        """The layer to read, counted from the last, which is 1."""
        most = self.config.num_hidden_layers - self.config.output_layer + 1
        if not 1 <= clip_skip <= most:
            raise RequestError(
                f"clip_skip: expected 1 to {most} for this text encoder, got {clip_skip}"
            )
        return self.config.output_layer + clip_skip - 1

    def _encode(self, chunks: Sequence[Chunk], text: TextOptions, layer: int) -> Tensor:
        """Chunks to tokens ``(n, 77, d)``."""
        model = cast(Any, self.text_model)
        device = model.final_layer_norm.weight.device
        config, length = self.config, self.config.max_position_embeddings
        rows = [[config.bos_token_id, *chunk.tokens, config.eos_token_id] for chunk in chunks]
        ids = torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])
        read = model(
            input_ids=ids.to(device),
            position_ids=torch.arange(length, device=device)[None],
            output_hidden_states=True,
        )
        tokens = model.final_layer_norm(read.hidden_states[-layer])
        weights = [
            [1.0, *chunk.weights, *[1.0] * (length - 1 - len(chunk.weights))] for chunk in chunks
        ]
        return _emphasise(tokens, torch.tensor(weights), keep_mean=text.emphasis == "original")


def _text_model(config: ClipConditionerConfig) -> nn.Module:
    """Build the transformer, with random weights or, on the meta device, with none."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        raise MissingExtraError("transformers", "clip", "a CLIP text encoder") from None
    shape = config.model_dump(exclude={"kind", "output_layer"})
    whole = CLIPTextModel(CLIPTextConfig(**shape))
    model = cast(Any, getattr(whole, "text_model", whole))  # transformers 5 has no inner one
    model.embeddings.token_embedding = _TokenEmbedding(config.vocab_size, config.hidden_size)
    nn.init.normal_(model.embeddings.token_embedding.weight, std=0.02)
    # positions are given with every call, so that there is no buffer to fill or to move
    model.embeddings.position_ids = None
    return model


def _without_position_ids(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Published weights may hold the positions, 0 to 76, among them."""
    state.pop(f"{prefix}text_model.embeddings.position_ids", None)


def _emphasise(tokens: Tensor, weights: Tensor, *, keep_mean: bool) -> Tensor:
    """Multiply tokens by their weights; a chunk of plain ones stays as it is, to the bit.

    Args:
        tokens: ``(n, M, d)``.
        weights: ``(n, M)``.
        keep_mean: Scale each weighted chunk so that the mean of its values is what it was. One
            whose mean is no more than an error of rounding, as while the last layer norm is not
            trained, is not scaled.
    """
    plain = (weights == 1.0).all(dim=1)
    if plain.all():
        return tokens
    plain, weights = plain.to(tokens.device), weights.to(tokens.device)
    wide = tokens.float()
    weighted = wide * weights[..., None]
    if keep_mean:
        before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (wide, weighted))
        least = _LEAST_MEAN * wide.square().mean(dim=(1, 2), keepdim=True).sqrt()
        known = torch.minimum(before.abs(), after.abs()) > least
        weighted = weighted * torch.where(known, before / after, 1.0)
    return torch.where(plain[:, None, None], tokens, weighted.to(tokens.dtype))


def _key(word: str) -> str:
    """What two words have in common that are found in the same places."""
    return " ".join(unicodedata.normalize("NFC", word).casefold().split())


def _pattern(word: str) -> str:
    """A group that finds a word as CLIP's tokenizer would: letters that touch are one token."""
    text = unicodedata.normalize("NFC", word).strip()
    before = r"(?<![^\W\d_])" if text[0].isalpha() else ""
    after = r"(?![^\W\d_])" if text[-1].isalpha() else ""
    body = r"\s+".join(re.escape(part) for part in text.split())
    return f"{before}({body}){after}"


def _word_ids(vectors: Iterable[Tensor], start: int) -> list[tuple[int, ...]]:
    """Number the vectors of words one after the other."""
    ids: list[tuple[int, ...]] = []
    for rows in vectors:
        ids.append(tuple(range(start, start + len(rows))))
        start += len(rows)
    return ids
