import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import BertTokenizer, CLIPTokenizer

from mezzotint.checkpoints.tokenizer_files import (
    read_bert_tokenizer,
    tokenizer_files,
    write_bert_tokenizer,
    write_clip_tokenizer,
)
from mezzotint.conditioning.vocabularies import (
    bert_tokenizer,
    clip_tokenizer,
    read_clip_tokenizer,
)
from mezzotint.errors import CheckpointError

PROMPTS = [
    "A red apple, (on) the table: 100% 'n ready!",
    "",
    "ÉCLAIR naïve Ångström",
    "苹果 、apple 🍎🍏",
    "<|endoftext|> a<|startoftext|> [SEP] a[MASK]",
    "  spaces\tand\nlines \u2028 ",
    "x" * 40,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]


def their_ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]


@pytest.mark.parametrize("pad", [None, 0])
def test_transformers_reads_the_clip_tokenizer(tmp_path: Path, pad: int | None) -> None:
    write_clip_tokenizer(clip_tokenizer(), tmp_path, pad_token_id=pad, max_length=77)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    again, padding = read_clip_tokenizer(tmp_path)
    assert padding == theirs.pad_token_id == (49407 if pad is None else pad)
    assert theirs.model_max_length == 77
    assert ids(again) == their_ids(theirs)
    if pad is None:
        assert ids(again) == ids(clip_tokenizer())
    whole = theirs("a", padding="max_length").input_ids
    assert whole == [49406, 320, 49407, *[padding] * 74]


def test_words_that_were_added_for_good(tmp_path: Path) -> None:
    ours = clip_tokenizer()
    ours.add_tokens([AddedToken("<cat-toy>", normalized=True)])
    write_clip_tokenizer(ours, tmp_path)
    for text in ("a <cat-toy> here", "<cat-toy>"):
        expected = ours.encode(text, add_special_tokens=False).ids
        assert 49408 in expected
        theirs = CLIPTokenizer.from_pretrained(tmp_path)
        assert theirs(text, add_special_tokens=False).input_ids == expected
        again, _ = read_clip_tokenizer(tmp_path)
        assert again.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize("lower", [True, False])
def test_transformers_reads_the_bert_tokenizer(tmp_path: Path, lower: bool) -> None:
    ours = bert_tokenizer()
    ours.normalizer = normalizers.BertNormalizer(lowercase=lower)
    write_bert_tokenizer(ours, tmp_path / "ours", max_length=77)
    theirs = BertTokenizer.from_pretrained(tmp_path / "ours")
    assert their_ids(theirs) == ids(ours) == ids(read_bert_tokenizer(tmp_path / "ours"))
    whole = theirs("a", padding="max_length", truncation=True).input_ids
    assert whole == [101, 1037, 102, *[0] * 74]
    # as its own version stores it, which may be one file
    theirs.save_pretrained(tmp_path / "theirs")
    assert ids(read_bert_tokenizer(tmp_path / "theirs")) == ids(ours)


def test_a_vocabulary_alone_is_enough(tmp_path: Path) -> None:
    words = [*SPECIAL, "a", "\u2028", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    found = read_bert_tokenizer(tmp_path)
    assert found.get_vocab() == {word: number for number, word in enumerate(words)}
    assert tokenizer_files(tmp_path) == (tmp_path / "vocab.txt",)


MODEL = {"type": "WordPiece", "vocab": {word: n for n, word in enumerate(SPECIAL)}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "vocab.txt: no such file; a tokenizer needs it"),
        ("vocab.txt", "a\nb\na\n", "vocab.txt: a word stands there twice"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt: cannot be read"),
        ("vocab.txt", b"a" * (9 << 20), "vocab.txt: 9,437,184 bytes are too many"),
        ("tokenizer.json", "{", "tokenizer.json: expected a model with vocab"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: expected a model with vocab"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b", "c": 1}}}', "expected a model with"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 2}}}', "numbers from 0 on"),
        ("tokenizer.json", json.dumps({"model": MODEL | {"type": "BPE"}}), "expected WordPiece"),
    ],
)
def test_what_is_no_bert_tokenizer(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=message) as failed:
        read_bert_tokenizer(tmp_path)
    assert str(failed.value).startswith(str(tmp_path))
