"""Text encoders in diffusers' folders: CLIP's of ``transformers``, and the original LDM's.

Each stands in two sub-folders, one for the network and one for the tokenizer. What the network's
``config.json`` says of special tokens is not followed: that of Stable Diffusion 1 is known to be
wrong, and its own software takes the tokenizer's.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mezzotint.checkpoints.folder import (
    CONFIG,
    load_weights,
    read_component_config,
    save_weights,
    weight_files,
    write_json,
)
from mezzotint.checkpoints.keys import Keys
from mezzotint.checkpoints.tokenizer_files import (
    read_bert_tokenizer,
    write_bert_tokenizer,
    write_clip_tokenizer,
)
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.clip import (
    ClipConditioner,
    ClipConditionerConfig,
    check_vocabulary,
)
from mezzotint.conditioning.vocabularies import CLIP_END, CLIP_START, read_clip_tokenizer
from mezzotint.errors import CheckpointError, ConfigError, short

__all__ = [
    "BERT_CLASSES",
    "CLIP_CLASSES",
    "build_bert",
    "clip_name",
    "encoder_files",
    "encoder_weights",
    "read_clip_config",
    "read_bert",
    "read_clip",
    "write_bert",
    "write_clip",
]

CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
BERT_CLASSES = ("LDMBertModel",)
_WEIGHTS = "model.safetensors"
# the fields that both name alike, and what transformers takes where a file has no such key
_CLIP_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# ours, theirs
_BERT_NAMES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "head_dim": "head_dim",
    "ffn_dim": "encoder_ffn_dim",
    "max_length": "max_position_embeddings",
}


def encoder_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that a text encoder is read from."""
    return (folder / CONFIG, *weight_files(folder, _stem(folder)))


def _stem(folder: Path) -> str:
    """The name that weights go by; older folders have pickles alone, which have another."""
    return "model" if any(folder.glob("model*.safetensors*")) else "pytorch_model"


def encoder_weights(folder: Path) -> Path:
    """Return the file that a text encoder's weights are read from, or the index of its parts."""
    return weight_files(folder, _stem(folder))[0]


def read_clip(folder: Path, words: Path, dtype: torch.dtype | None) -> ClipConditioner:
    """Read a CLIP text encoder.

    Args:
        folder: Its network.
        words: Its tokenizer.
        dtype: Of the weights in memory; None keeps each as it is on the disk.

    Raises:
        CheckpointError: If a file is missing or damaged, or the network is another one.
        MissingExtraError: If ``transformers`` is not installed.
    """
    config, tokenizer = read_clip_config(folder, words)
    with torch.device("meta"):
        conditioner = ClipConditioner(config, tokenizer)
    load_weights(conditioner, encoder_weights(folder), dtype, clip_name)
    return conditioner.eval()


def read_clip_config(folder: Path, words: Path) -> tuple[ClipConditionerConfig, Tokenizer]:
    """Read what a CLIP text encoder is, and its tokenizer; see `read_clip`."""
    keys = Keys(read_component_config(folder))
    # a whole CLIP says both halves, and its text half as a part
    said = keys.section("text_config") or keys.data
    keys.require(folder / CONFIG)
    tokenizer, padding = read_clip_tokenizer(words)
    fields = {key: said.get(key, default) for key, default in _CLIP_DEFAULTS.items()}
    fields |= {
        "bos_token_id": tokenizer.token_to_id(CLIP_START),
        "eos_token_id": tokenizer.token_to_id(CLIP_END),
        "pad_token_id": padding,
    }
    with _mistakes_are_the_files():
        config = ClipConditionerConfig.from_dict(fields, str(folder / CONFIG))
    with _mistakes_are_the_files(f"{words}: "):
        check_vocabulary(config, tokenizer)
    return config, tokenizer


def clip_name(name: str) -> str | None:
    """The name of a weight among ours; versions of transformers differ by the prefix."""
    if name.startswith("text_projection.") or name.endswith("embeddings.position_ids"):
        return None
    return name if name.startswith("text_model.") else f"text_model.{name}"


def write_clip(
    conditioner: ClipConditioner, folder: Path, words: Path, dtype: torch.dtype | None
) -> list[str]:
    """Write a CLIP text encoder.

    Args:
        conditioner: The text encoder.
        folder: For its network.
        words: For its tokenizer.
        dtype: Of the weights on the disk; None keeps each as it is.

    Returns:
        Sentences on what the layout cannot hold.
    """
    config, lost = conditioner.config, list[str]()
    # diffusers reads the last layer there is
    kept = config.num_hidden_layers - config.output_layer + 1
    left_out = tuple(
        f"text_model.encoder.layers.{layer}." for layer in range(kept, config.num_hidden_layers)
    )
    if left_out:
        lost.append(
            f"text_encoder: the last {len(left_out)} of its {config.num_hidden_layers} layers are"
            " left out; no picture depends on them"
        )
    if conditioner.words:
        lost.append(f"text_encoder: the words {', '.join(conditioner.words)} are adapters")
    if config.pad_token_id not in conditioner.tokenizer.get_added_tokens_decoder():
        token = conditioner.tokenizer.id_to_token(config.pad_token_id)
        lost.append(
            f"tokenizer: texts are filled up with {token!r}, which is a token of its own from now"
            " on also where a prompt has it"
        )
    keys = {key: getattr(config, key) for key in _CLIP_DEFAULTS} | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "num_hidden_layers": kept,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    state = {
        name: value
        for name, value in conditioner.state_dict().items()
        if not name.startswith(left_out)
    }
    save_weights(state, folder / _WEIGHTS, dtype)
    write_json(folder / CONFIG, keys)
    write_clip_tokenizer(
        conditioner.tokenizer,
        words,
        pad_token_id=config.pad_token_id,
        max_length=config.max_position_embeddings,
    )
    return lost


def read_bert(folder: Path, words: Path, dtype: torch.dtype | None) -> BertTextConditioner:
    """Read the text encoder of the original text-to-image model, diffusers' ``LDMBertModel``.

    Args:
        folder: Its network.
        words: Its tokenizer.
        dtype: Of the weights in memory; None keeps each as it is on the disk.

    Raises:
        CheckpointError: If a file is missing or damaged, or the network is another one.
    """
    conditioner = build_bert(folder, words)
    load_weights(conditioner, encoder_weights(folder), dtype)
    return conditioner.eval()


def build_bert(folder: Path, words: Path) -> BertTextConditioner:
    """Build the original text encoder without weights, on the meta device; see `read_bert`."""
    data = read_component_config(folder)
    if (act := data.get("activation_function", "gelu")) != "gelu":
        raise CheckpointError(
            f"{folder / CONFIG}: activation_function is {short(act)}, expected 'gelu'"
        )
    fields = {ours: data[theirs] for ours, theirs in _BERT_NAMES.items() if theirs in data}
    with _mistakes_are_the_files():
        config = BertTextConditionerConfig.from_dict(fields, str(folder / CONFIG))
    tokenizer = read_bert_tokenizer(words)
    with _mistakes_are_the_files(f"{words}: "), torch.device("meta"):
        return BertTextConditioner(config, tokenizer)


def write_bert(
    conditioner: BertTextConditioner, folder: Path, words: Path, dtype: torch.dtype | None
) -> None:
    """Write the text encoder of the original text-to-image model; see `write_clip`."""
    config = conditioner.config
    keys = {theirs: getattr(config, ours) for ours, theirs in _BERT_NAMES.items()} | {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "activation_function": "gelu",
        "num_hidden_layers": config.layers,
        "pad_token_id": conditioner.tokenizer.token_to_id("[PAD]"),
    }
    save_weights(conditioner.state_dict(), folder / _WEIGHTS, dtype)
    write_json(folder / CONFIG, keys)
    write_bert_tokenizer(conditioner.tokenizer, words, max_length=config.max_length)


@contextmanager
def _mistakes_are_the_files(prefix: str = "") -> Generator[None]:
    """A configuration that comes from a folder is the folder's mistake, not the user's."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{prefix}{error}") from None
