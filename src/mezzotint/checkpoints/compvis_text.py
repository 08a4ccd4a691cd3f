"""The conditioners of the original code: their tensors' names, and what their shapes tell.

CLIP's text encoder has the names of ``transformers`` in Stable Diffusion 1 and those of
``open_clip`` in Stable Diffusion 2; the transformer of captions and of layouts is that of
``x_transformers``. Nothing here builds a network.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from mezzotint.checkpoints.compvis import Rule, TensorMap
from mezzotint.conditioning.bert import BertTextConditionerConfig, TransformerShape
from mezzotint.conditioning.classes import ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    InpaintingConditionerConfig,
    LowResConditionerConfig,
    SemanticMapConditionerConfig,
)
from mezzotint.config import Config
from mezzotint.errors import CheckpointError

__all__ = ["CONFIGS", "ConditionerKind", "conditioner_map", "guess_conditioner", "kind_of_tensors"]

ConditionerKind = Literal[
    "clip", "open_clip", "bert", "layout", "class", "semantic_map", "low_res", "inpainting"
]
"""What a file conditions on; the first five are attended to, the others are concatenated."""

Shapes = Mapping[str, tuple[int, ...]]

CONFIGS: Mapping[str, type[Config]] = {
    "clip": ClipConditionerConfig,
    "bert": BertTextConditionerConfig,
    "layout": LayoutConditionerConfig,
    "class": ClassConditionerConfig,
    "semantic_map": SemanticMapConditionerConfig,
    "low_res": LowResConditionerConfig,
    "inpainting": InpaintingConditionerConfig,
}
"""The configuration of a conditioner by its own field ``kind``."""

# a tensor that each kind has and no other kind has
_MARKS: Mapping[str, ConditionerKind] = {
    "transformer.text_model.embeddings.token_embedding.weight": "clip",
    "transformer.embeddings.token_embedding.weight": "clip",
    "model.token_embedding.weight": "open_clip",
    "transformer.token_emb.weight": "bert",
    "embedding.weight": "class",
    "channel_mapper.weight": "semantic_map",
}
_BERT_WORDS = 30522  # a transformer of fewer tokens reads layouts
_MOST_CLASSES = 1 << 17
_CLIP_HEAD = 64  # width of a head in every published CLIP
_BERT_HEADS = 8
_HALVED = 23  # layers of Stable Diffusion 2's text encoder where the last, unused, is left out
_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def kind_of_tensors(shapes: Shapes) -> ConditionerKind | None:
    """Return what the tensors of ``cond_stage_model`` are, or None if they are none of these.

    Args:
        shapes: By name, without that prefix.
    """
    kinds: Iterator[ConditionerKind] = (kind for name, kind in _MARKS.items() if name in shapes)
    kind = next(kinds, None)
    if kind == "bert" and shapes["transformer.token_emb.weight"][0] < _BERT_WORDS:
        return "layout"
    return kind


def guess_conditioner(kind: ConditionerKind, shapes: Shapes, latents: int) -> dict[str, Any]:
    """Return the fields of a conditioner's configuration that its tensors tell.

    Args:
        kind: What it is.
        shapes: Of its tensors, by name without ``cond_stage_model.``; of one that lacks some, the
            fields that they tell are left out.
        latents: Channels of the latents, for conditioners without tensors.

    Raises:
        CheckpointError: If it is of more classes than there can be; it does not name the file.
    """
    match kind:
        case "clip":
            return {"kind": "clip", **_guess_clip(_named_in_full(shapes))}
        case "open_clip":
            return {"kind": "clip", **_guess_open_clip(shapes)}
        case "bert" | "layout":
            return {"kind": kind, **_guess_transformer(shapes)}
        case "class":
            rows, width = shapes.get("embedding.weight", (1001, 512))
            if rows > _MOST_CLASSES:
                raise CheckpointError(
                    f"cond_stage_model.embedding.weight is of {rows:,} classes, expected at most"
                    f" {_MOST_CLASSES:,}"
                )
            return {"kind": "class", "width": width, "class_names": _numbers(rows - 1)}
        case "semantic_map":
            out, classes = shapes.get("channel_mapper.weight", (3, 182))[:2]
            return {"kind": "semantic_map", "classes": classes, "out_channels": out}
        case "low_res":
            return {"kind": "low_res"}
        case "inpainting":
            return {"kind": "inpainting", "latent_channels": latents}


def conditioner_map(
    kind: ConditionerKind, config: Config, shapes: Shapes | None = None
) -> TensorMap:
    """Derive the map of a conditioner to the tensors below ``cond_stage_model.``.

    Args:
        kind: What it is.
        config: Of ours.
        shapes: Those of a file that is to be read, which may name CLIP's tensors in either of two
            ways.
    """
    rules: Iterable[Rule] = ()
    if isinstance(config, ClipConditionerConfig):
        full = not any(name.startswith("transformer.embeddings.") for name in shapes or ())
        prefix = "transformer.text_model." if full else "transformer."
        rules = _open_clip_rules(config) if kind == "open_clip" else _clip_rules(config, prefix)
    elif isinstance(config, TransformerShape):
        rules = _transformer_rules(config)
    elif isinstance(config, ClassConditionerConfig):
        size = (len(config.class_names) + 1, config.width)
        rules = [_same("embedding.weight", "embedding.weight", *size)]
    elif isinstance(config, SemanticMapConditionerConfig):
        size = (config.out_channels, config.classes, 1, 1)
        rules = [_same("channel_mapper.weight", "channel_mapper.weight", *size)]
    return TensorMap(rules, ())


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many layers there are, numbered right after a prefix."""
    numbers = {n.removeprefix(prefix).split(".")[0] for n in shapes if n.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _named_in_full(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names below ``text_model``, which some files leave out."""
    names = {name: name.removeprefix("transformer.").removeprefix("text_model.") for name in shapes}
    return {short: shapes[name] for name, short in names.items()}


def _guess_clip(shapes: Shapes) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_hidden_layers": _count(shapes, "encoder.layers.") or 12}
    if words := shapes.get("embeddings.token_embedding.weight"):
        fields |= _words(words)
    if places := shapes.get("embeddings.position_embedding.weight"):
        fields["max_position_embeddings"] = places[0]
    if inner := shapes.get("encoder.layers.0.mlp.fc1.weight"):
        fields["intermediate_size"] = inner[0]
    return fields


def _guess_open_clip(shapes: Shapes) -> dict[str, Any]:
    layers = _count(shapes, "model.transformer.resblocks.") or _HALVED
    fields: dict[str, Any] = {
        "num_hidden_layers": layers,
        "output_layer": 1 if layers in (1, _HALVED) else 2,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    if words := shapes.get("model.token_embedding.weight"):
        fields |= _words(words)
    if places := shapes.get("model.positional_embedding"):
        fields["max_position_embeddings"] = places[0]
    if inner := shapes.get("model.transformer.resblocks.0.mlp.c_fc.weight"):
        fields["intermediate_size"] = inner[0]
    if projection := shapes.get("model.text_projection"):
        fields["projection_dim"] = projection[-1]
    return fields


def _words(shape: tuple[int, ...]) -> dict[str, Any]:
    words, width = shape
    heads = width // _CLIP_HEAD if width % _CLIP_HEAD == 0 else 1
    return {"vocab_size": words, "hidden_size": width, "num_attention_heads": heads}


def _guess_transformer(shapes: Shapes) -> dict[str, Any]:
    layers = "transformer.attn_layers.layers."
    fields: dict[str, Any] = {"layers": _count(shapes, layers) // 2, "heads": _BERT_HEADS}
    if words := shapes.get("transformer.token_emb.weight"):
        fields |= {"vocab_size": words[0], "width": words[1]}
    if places := shapes.get("transformer.pos_emb.emb.weight"):
        fields["max_length"] = places[0]
    if queries := shapes.get(f"{layers}0.1.to_q.weight"):
        fields["head_dim"] = max(queries[0] // _BERT_HEADS, 1)
    if inner := shapes.get(f"{layers}1.1.net.0.0.weight"):
        fields["ffn_dim"] = inner[0]
    return fields


def _same(ours: str, theirs: str, *shape: int) -> Rule:
    return Rule((ours,), theirs, torch.Size(shape), torch.Size(shape))


def _layer(ours: str, theirs: str, *shape: int, bias: bool = True) -> Iterator[Rule]:
    """A weight and the bias as long as its first side."""
    yield _same(f"{ours}.weight", f"{theirs}.weight", *shape)
    if bias:
        yield _same(f"{ours}.bias", f"{theirs}.bias", shape[0])


def _clip_rules(config: ClipConditionerConfig, prefix: str) -> Iterator[Rule]:
    d, inner = config.hidden_size, config.intermediate_size
    places = (config.max_position_embeddings, d)

    def rules(name: str, *shape: int, bias: bool = True) -> Iterator[Rule]:
        yield from _layer(f"text_model.{name}", f"{prefix}{name}", *shape, bias=bias)

    yield from rules("embeddings.token_embedding", config.vocab_size, d, bias=False)
    yield from rules("embeddings.position_embedding", *places, bias=False)
    for layer in range(config.num_hidden_layers):
        at = f"encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from rules(f"{at}.self_attn.{name}", d, d)
        yield from rules(f"{at}.layer_norm1", d)
        yield from rules(f"{at}.mlp.fc1", inner, d)
        yield from rules(f"{at}.mlp.fc2", d, inner)
        yield from rules(f"{at}.layer_norm2", d)
    yield from rules("final_layer_norm", d)


def _open_clip_rules(config: ClipConditionerConfig) -> Iterator[Rule]:
    d, inner = config.hidden_size, config.intermediate_size
    words, places = (config.vocab_size, d), (config.max_position_embeddings, d)
    ours = "text_model.embeddings"
    yield _same(f"{ours}.token_embedding.weight", "model.token_embedding.weight", *words)
    yield _same(f"{ours}.position_embedding.weight", "model.positional_embedding", *places)
    for layer in range(config.num_hidden_layers):
        mine, theirs = f"text_model.encoder.layers.{layer}", f"model.transformer.resblocks.{layer}"
        for leaf, shape in (("weight", (d, d)), ("bias", (d,))):
            yield Rule(
                tuple(f"{mine}.self_attn.{name}_proj.{leaf}" for name in "qkv"),
                f"{theirs}.attn.in_proj_{leaf}",
                torch.Size(shape),
                torch.Size((3 * d, *shape[1:])),
            )
        sizes = {"mlp.fc1": (inner, d), "mlp.fc2": (d, inner), "self_attn.out_proj": (d, d)}
        for name, renamed in _CLIP_LAYER.items():
            yield from _layer(f"{mine}.{name}", f"{theirs}.{renamed}", *sizes.get(name, (d,)))
    yield from _layer("text_model.final_layer_norm", "model.ln_final", d)


def _transformer_rules(config: TransformerShape) -> Iterator[Rule]:
    d, inner, attended = config.width, config.ffn_dim, config.heads * config.head_dim

    def rules(ours: str, theirs: str, *shape: int, bias: bool = True) -> Iterator[Rule]:
        yield from _layer(ours, f"transformer.{theirs}", *shape, bias=bias)

    yield from rules("model.embed_tokens", "token_emb", config.vocab_size, d, bias=False)
    yield from rules("model.embed_positions", "pos_emb.emb", config.max_length, d, bias=False)
    for layer in range(config.layers):
        mine, at = f"model.layers.{layer}", "attn_layers.layers"
        # theirs counts attention and feed-forward network as layers of their own
        attention, network = f"{at}.{2 * layer}", f"{at}.{2 * layer + 1}"
        yield from rules(f"{mine}.self_attn_layer_norm", f"{attention}.0", d)
        for name in "qkv":
            ours = f"{mine}.self_attn.{name}_proj"
            yield from rules(ours, f"{attention}.1.to_{name}", attended, d, bias=False)
        yield from rules(f"{mine}.self_attn.out_proj", f"{attention}.1.to_out", d, attended)
        yield from rules(f"{mine}.final_layer_norm", f"{network}.0", d)
        yield from rules(f"{mine}.fc1", f"{network}.1.net.0.0", inner, d)
        yield from rules(f"{mine}.fc2", f"{network}.1.net.2", d, inner)
    yield from rules("model.layer_norm", "norm", d)
    yield from rules("to_logits", "to_logits", config.vocab_size, d)
