"""Tokenizers in folders as ``transformers`` lays them out.

What is written are the files that every version of it reads: ``vocab.json`` and ``merges.txt`` for
CLIP's byte pairs, ``vocab.txt`` for BERT's WordPiece, and how they are to be used beside them.
"""

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, normalizers

from mezzotint.checkpoints.folder import read_json, write_atomically, write_json
from mezzotint.conditioning.vocabularies import CLIP_END, CLIP_START, bert_tokenizer
from mezzotint.errors import CheckpointError

__all__ = ["read_bert_tokenizer", "tokenizer_files", "write_bert_tokenizer", "write_clip_tokenizer"]

_CONFIG, _SPECIAL, _WHOLE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
_FILES = (
    *(_WHOLE, "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", _SPECIAL, _CONFIG),
)
_LARGEST = 8 << 20  # bytes of a file; BERT's have 0.2 to 0.7 MB


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that a tokenizer may be read from."""
    return tuple(folder / name for name in _FILES if (folder / name).is_file())


def write_clip_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, pad_token_id: int | None = None, max_length: int = 77
) -> None:
    """Write a CLIP tokenizer so that the ``CLIPTokenizer`` of ``transformers`` reads it.

    Args:
        tokenizer: From `mezzotint.conditioning.vocabularies`.
        folder: Made if need be.
        pad_token_id: What is padded with; the token that ends a text if not given.
        max_length: Tokens that the text encoder reads at once.
    """
    model = cast(dict[str, Any], json.loads(tokenizer.to_str())["model"])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    padding = CLIP_END if pad_token_id is None else tokenizer.id_to_token(pad_token_id)
    assert padding is not None, "the configuration was checked against the vocabulary"
    special = {
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": padding,
    }
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *merges]
    write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    # words that were added to the vocabulary for good, with vectors among the encoder's own
    decoder = tokenizer.get_added_tokens_decoder()
    added = {t.content: n for n, t in decoder.items() if t.content not in special.values()}
    if added:
        write_json(folder / "added_tokens.json", added)
    _write_config(folder, "CLIPTokenizer", special, max_length)


def write_bert_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int = 77) -> None:
    """Write a WordPiece tokenizer so that the ``BertTokenizer`` of ``transformers`` reads it.

    Args:
        tokenizer: With BERT's special tokens.
        folder: Made if need be.
        max_length: Tokens that the text encoder reads at once.
    """
    data = json.loads(tokenizer.to_str())
    numbers = cast(dict[str, int], data["model"]["vocab"])
    words = sorted(numbers, key=lambda word: numbers[word])
    write_atomically(folder / "vocab.txt", ("\n".join(words) + "\n").encode())
    names = ("unk", "sep", "pad", "cls", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    lower = bool((data["normalizer"] or {}).get("lowercase", True))
    _write_config(folder, "BertTokenizer", special, max_length, lower)


def _write_config(
    folder: Path, name: str, special: dict[str, str], max_length: int, lower: bool = True
) -> None:
    write_json(folder / _SPECIAL, special)
    config = {
        "tokenizer_class": name,
        "do_lower_case": lower,
        "model_max_length": max_length,
        **special,
    }
    write_json(folder / _CONFIG, config)


def read_bert_tokenizer(folder: Path) -> Tokenizer:
    """Read a BERT tokenizer as ``transformers`` stores it.

    Args:
        folder: Holds ``vocab.txt`` or ``tokenizer.json``, and ``tokenizer_config.json`` where its
            texts are not lower-cased.

    Raises:
        CheckpointError: If a file is missing, or is not what it should be.
    """
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    tokenizer = bert_tokenizer(_words(folder))
    if not config.get("do_lower_case", True):
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return tokenizer


def _words(folder: Path) -> list[str]:
    """The vocabulary, in the order of its numbers."""
    whole, plain = folder / _WHOLE, folder / "vocab.txt"
    path = whole if whole.is_file() else plain
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise CheckpointError(f"{path}: {size:,} bytes are too many for a tokenizer")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{plain}: no such file; a tokenizer needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    # a vocabulary holds characters that splitlines would take for ends of lines
    lines = text.removesuffix("\n").split("\n")
    words = _words_of(text, path) if path == whole else lines
    if len(set(words)) != len(words):
        raise CheckpointError(f"{path}: a word stands there twice")
    return words


def _words_of(text: str, path: Path) -> list[str]:
    try:
        data = json.loads(text)
        numbers = cast(dict[str, int], data["model"]["vocab"])
        kind = data["model"].get("type", "WordPiece")
        words = sorted(numbers, key=lambda word: numbers[word])
        dense = [numbers[word] for word in words] == list(range(len(words)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: expected a model with vocab, as BERT's") from None
    if kind != "WordPiece" or not dense:
        raise CheckpointError(f"{path}: expected WordPiece with numbers from 0 on, as BERT's")
    return words
