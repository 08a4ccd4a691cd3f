"""Tokenizers of the published text encoders, from vocabularies that are shipped or lie in a folder.

CLIP reads byte pairs (Radford et al. 2021, after Sennrich et al. 2016), BERT reads WordPiece
(Devlin et al. 2018). The files in ``assets/vocabularies`` are made by
``tools/build_vocabularies.py``.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from mezzotint.errors import CheckpointError

__all__ = ["bert_tokenizer", "clip_tokenizer", "read_clip_tokenizer"]

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# a word of letters, one digit, or a run of anything else; English endings are words
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
_ASSETS = {
    "clip_merges": "5f6c91a3727038ae46523c18c13e3275d6713eea9fd2ccfeb5139351419ee21f",
    "bert_uncased": "74100ea43c760b082d6dd19a07f78b259c38a2eabfa52ca52df0e4c4c0a018de",
}
_LARGEST = 8 << 20  # bytes of a file; those of CLIP's tokenizer have 0.5 to 4 MB

Merges = Sequence[tuple[str, str]]


def clip_tokenizer() -> Tokenizer:
    """Build CLIP's own tokenizer, of 49,408 tokens.

    Text is lower-cased, its blanks are collapsed and its characters composed (NFC). As in
    ``transformers``, ``<|startoftext|>`` and ``<|endoftext|>`` stand for their tokens wherever they
    are typed in exactly these letters.

    Returns:
        A tokenizer that adds no start, end or padding by itself.

    Example:
        >>> clip_tokenizer().encode("A red apple").ids
        [320, 736, 3055]
    """
    merges = [_pair(line, Path("clip_merges")) for line in _read_asset("clip_merges")]
    letters = _byte_letters()
    tokens = [
        *letters,
        *(letter + _WORD_END for letter in letters),
        *(first + second for first, second in merges),
        CLIP_START,
        CLIP_END,
    ]
    return _clip({token: number for number, token in enumerate(tokens)}, merges)


def bert_tokenizer(words: Iterable[str] | None = None) -> Tokenizer:
    """Build the tokenizer of BERT's uncased models.

    As in ``transformers``, ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]`` and ``[MASK]`` stand for
    their tokens wherever they are typed.

    Args:
        words: A vocabulary, in the order of its numbers; None takes BERT's own 30,522.

    Returns:
        A tokenizer that adds no start, end or padding by itself.

    Example:
        >>> bert_tokenizer().encode("A red apple").ids
        [1037, 2417, 6207]
    """
    listed = _read_asset("bert_uncased") if words is None else words
    vocabulary = {word: number for number, word in enumerate(listed)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([token for token in _BERT_SPECIAL if token in vocabulary])
    return tokenizer


def read_clip_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """Read a CLIP tokenizer as ``transformers`` stores it.

    The files are followed to the letter: where they name ``!`` as what is padded with, as those of
    Stable Diffusion 2 do, a ``!`` in a prompt is that token too, number 0.

    Args:
        folder: Holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; and where it has
            them ``added_tokens.json``, ``special_tokens_map.json`` and ``tokenizer_config.json``.

    Returns:
        The tokenizer, and the number of the token that is padded with.

    Raises:
        CheckpointError: If a file is missing, or is not what it should be.
    """
    vocabulary, merges, added = _read_pairs(folder)
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    special = {**config, **_read_json(folder / "special_tokens_map.json", optional=True)}
    roles = {name: _added(special.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    added = [*(token for token in roles.values() if token is not None), *added]
    padding = CLIP_END if roles["pad_token"] is None else roles["pad_token"].content
    for text in (CLIP_START, CLIP_END, padding):
        if text not in vocabulary:
            raise CheckpointError(f"{folder}: the vocabulary has no {text!r}; it is not CLIP's")
    try:
        return _clip(vocabulary, merges, added), vocabulary[padding]
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder}: not a CLIP tokenizer: {error}") from None


def _clip(
    vocabulary: Mapping[str, int], merges: Merges, added: Sequence[AddedToken] = ()
) -> Tokenizer:
    """Put CLIP's cleaning and splitting in front of byte pairs."""
    model = BPE(dict(vocabulary), list(merges), end_of_word_suffix=_WORD_END, unk_token=CLIP_END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # these are found as a whole, before the rest is cut; of two that are equal the last one counts
    whole = {token.content: token for token in (_plain(CLIP_START), _plain(CLIP_END), *added)}
    found = [token for text, token in whole.items() if text in vocabulary]
    tokenizer.add_special_tokens(sorted(found, key=lambda token: vocabulary[token.content]))
    return tokenizer


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of their tokens: first those that are one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(0x100, 0x100 + others))]


def _read_pairs(folder: Path) -> tuple[dict[str, int], Merges, list[AddedToken]]:
    """Vocabulary, merges and added tokens, from one file or from several."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return _read_whole(whole)
    vocabulary = _numbers(_read_json(folder / "vocab.json"), folder / "vocab.json")
    extra = folder / "added_tokens.json"
    more = _numbers(_read_json(extra, optional=True), extra)
    file = folder / "merges.txt"
    lines = [line for line in _read_text(file).split("\n") if line.strip()]
    merges = [_pair(line, file) for line in lines if not line.startswith("#version")]
    return vocabulary | more, merges, [AddedToken(text, normalized=True) for text in more]


def _read_whole(path: Path) -> tuple[dict[str, int], Merges, list[AddedToken]]:
    data = _read_json(path)
    match data.get("model"), data.get("added_tokens", []):
        case {"vocab": vocab, "merges": list(merges)}, list(listed):
            vocabulary = _numbers(vocab, path)
        case _:
            raise CheckpointError(f"{path}: expected a model with vocab and merges, as CLIP's")
    for item in listed:
        if (token := _added(item)) is not None:
            vocabulary |= _numbers({token.content: item.get("id")}, path)
    tokens = [token for item in listed if (token := _added(item)) is not None]
    return vocabulary, [_pair(item, path) for item in merges], tokens


def _added(value: Any) -> AddedToken | None:
    """A special token as configurations name it: its text, or its text and how it is found."""
    match value:
        case str(text):
            return _plain(text)
        case {"content": str(text)}:
            ways = ("single_word", "lstrip", "rstrip", "normalized")
            return AddedToken(text, special=True, **{way: bool(value.get(way)) for way in ways})
        case _:
            return None


def _plain(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _pair(item: Any, path: Path) -> tuple[str, str]:
    """A merge, written ``"a b"`` or ``["a", "b"]``."""
    match item.split() if isinstance(item, str) else item:
        case [str(first), str(second)]:
            return first, second
        case _:
            raise CheckpointError(f"{path}: the merges of a tokenizer are pairs, not {item!r}")


def _numbers(data: Any, path: Path) -> dict[str, int]:
    if not isinstance(data, dict) or not all(
        isinstance(n, int) and 0 <= n < 1 << 31 for n in data.values()
    ):
        raise CheckpointError(f"{path}: expected tokens and their numbers")
    return cast(dict[str, int], data)


def _read_text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise CheckpointError(f"{path}: {size:,} bytes are too many for a tokenizer")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a tokenizer needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected keys and values, got {type(data).__name__}")
    return cast(dict[str, Any], data)


def _read_asset(name: str) -> list[str]:
    file = resources.files("mezzotint") / "assets" / "vocabularies" / f"{name}.txt.gz"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; reinstall mezzotint") from None
    if hashlib.sha256(data).hexdigest() != _ASSETS[name]:
        raise CheckpointError(f"{file}: damaged, its sha256 is wrong; reinstall mezzotint")
    # a vocabulary holds characters that splitlines would take for ends of lines
    return gzip.decompress(data).decode("utf-8").removesuffix("\n").split("\n")
