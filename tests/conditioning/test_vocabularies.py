"""Shipped tokenizers by known ids, and those of folders as transformers reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from mezzotint.conditioning.vocabularies import (
    bert_tokenizer,
    clip_tokenizer,
    read_clip_tokenizer,
)
from mezzotint.errors import CheckpointError

START, END = "<|startoftext|>", "<|endoftext|>"

# a whole tokenizer in small: all letters, a few merges, and CLIP's special tokens
MERGES = [["c", "a"], ["ca", "t</w>"], ["d", "o"], ["do", "g</w>"]]
LETTERS = [chr(code) for code in range(0x21, 0x7F)]
TOKENS = [*LETTERS, *(f"{x}</w>" for x in LETTERS), *("".join(m) for m in MERGES), START, END]
VOCABULARY = {token: number for number, token in enumerate(TOKENS)}
TEXTS = ["a cat, a dog", "a cat! A DOG!!", f"cat{END}dog", "<|ENDOFTEXT|> cat", "<toy> <Toy>,", ""]

# how the files of the published models name their special tokens
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
FULL = {"__type": "AddedToken", **FLAGS}
PUBLISHED = {
    "bos_token": {"content": START, **FULL},
    "eos_token": {"content": END, **FULL},
    "unk_token": {"content": END, **FULL},
    "pad_token": END,
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def two_files(**more: Any) -> dict[str, Any]:
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    return {"vocab.json": VOCABULARY, "merges.txt": merges, **more}


def one_file(merges: Any = MERGES, **added: int) -> dict[str, Any]:
    told = [
        {"id": number, "content": text, **FLAGS, "normalized": False, "special": True}
        for text, number in ({START: VOCABULARY[START], END: VOCABULARY[END]} | added).items()
    ]
    model = {"type": "BPE", "vocab": VOCABULARY, "merges": merges, "end_of_word_suffix": "</w>"}
    model |= {"unk_token": END, "dropout": None, "continuing_subword_prefix": ""}
    return {"tokenizer.json": {"version": "1.0", "added_tokens": told, "model": model}}


SECOND = {**PUBLISHED, "pad_token": "!"}
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "the two files alone": (two_files(), END),
    "Stable Diffusion 1": (
        two_files(**{"tokenizer_config.json": PUBLISHED, "special_tokens_map.json": PUBLISHED}),
        END,
    ),
    # its configuration says one thing and its map of special tokens another: the map counts
    "Stable Diffusion 2": (
        two_files(**{"tokenizer_config.json": PUBLISHED, "special_tokens_map.json": SECOND}),
        "!",
    ),
    "an added token": (two_files(**{"added_tokens.json": {"<toy>": len(TOKENS)}}), END),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    files, padding = FOLDERS[name]
    folder = write(tmp_path / "tokenizer", files)
    theirs = CLIPTokenizer.from_pretrained(folder)
    check_against(theirs, folder, padding)
    # and as this version of it stores them
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    check_against(CLIPTokenizer.from_pretrained(again), again, padding)


def check_against(theirs: CLIPTokenizer, folder: Path, padding: str) -> None:
    ours, pad = read_clip_tokenizer(folder)
    assert pad == theirs.pad_token_id == VOCABULARY[padding]
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False).ids == expected, text


def test_merges_may_be_pairs_or_lines(tmp_path: Path) -> None:
    lines = [" ".join(merge) for merge in MERGES]
    read = [
        read_clip_tokenizer(write(tmp_path / name, one_file(merges)))[0].to_str()
        for name, merges in (("pairs", MERGES), ("lines", lines))
    ]
    assert read[0] == read[1]


def test_known_ids_of_clip() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.encode("a photo of a cat").ids == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("A  Photo\tof\na CAT ").ids == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("").ids == []
    assert (tokenizer.token_to_id(START), tokenizer.token_to_id(END)) == (49406, 49407)
    assert tokenizer.token_to_id(",</w>") == 267


def test_special_tokens_that_are_typed_are_tokens() -> None:
    """As in the software of these models; anywhere else than in these letters they are text."""
    tokenizer = clip_tokenizer()
    assert tokenizer.encode(f"a{END}b").ids == [320, 49407, 321]
    assert tokenizer.encode(START).ids == [49406]
    assert 49407 not in tokenizer.encode(f"{END.upper()} {END[:-1]}").ids
    assert bert_tokenizer().encode("a [MASK]b").ids == [1037, 103, 1038]


def test_known_ids_of_bert() -> None:
    tokenizer = bert_tokenizer()
    assert tokenizer.encode("A photo of a Zürich café").ids == [
        *(1037, 6302, 1997, 1037, 10204, 7668)
    ]
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        *(0, 100, 101, 102, 103)
    ]
    assert tokenizer.encode("𓀀").ids == [100]


def test_a_vocabulary_of_ones_own() -> None:
    tokenizer = bert_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "##s"])
    assert tokenizer.encode("Cats [SEP] dogs").ids == [4, 5, 3, 1]


def test_every_call_builds_its_own() -> None:
    """A tokenizer can be changed; another model's must not change with it."""
    for build in (clip_tokenizer, bert_tokenizer):
        first: Tokenizer = build()
        first.enable_truncation(2)
        assert len(build().encode("one two three four").ids) == 4


def broken(key: str) -> Callable[[dict[str, Any]], None]:
    """Ways in which a tokenizer.json can be wrong."""
    ways: dict[str, Callable[[dict[str, Any]], Any]] = {
        "model": lambda d: d.update(model=["BPE"]),
        "vocab": lambda d: d["model"].update(vocab={"a": "b"}),
        "merges": lambda d: d["model"].update(merges=["a"]),
        "a merge that is none": lambda d: d["model"].update(merges=[["q", "zz"]]),
        "ids": lambda d: d["added_tokens"].append({"id": -1, "content": "x"}),
        "no end": lambda d: d.update(
            added_tokens=[], model={"vocab": {"a": 0, START: 1}, "merges": []}
        ),
    }
    return ways[key]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model", "expected a model with vocab and merges"),
        ("vocab", "expected tokens and their numbers"),
        ("merges", "are pairs, not 'a'"),
        ("a merge that is none", "not a CLIP tokenizer"),
        ("ids", "expected tokens and their numbers"),
        ("no end", r"the vocabulary has no '<\|endoftext\|>'"),
    ],
)
def test_broken_tokenizers_are_refused(tmp_path: Path, key: str, message: str) -> None:
    files = json.loads(json.dumps(one_file()))
    broken(key)(files["tokenizer.json"])
    with pytest.raises(CheckpointError, match=message):
        read_clip_tokenizer(write(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"vocab\.json: no such file"),
        ({"vocab.json": VOCABULARY}, r"merges\.txt: no such file"),
        (two_files(**{"vocab.json": "{"}), r"vocab\.json: not valid JSON"),
        (two_files(**{"vocab.json": "[" * 100_000}), r"vocab\.json: not valid JSON"),
        (two_files(**{"vocab.json": [1]}), r"vocab\.json: expected keys and values, got list"),
        (two_files(**{"tokenizer_config.json": "3"}), r"config\.json: expected keys and values"),
        (two_files(**{"special_tokens_map.json": {"pad_token": "?!"}}), r"has no '\?!'"),
        (two_files(**{"merges.txt": " " * (9 << 20)}), r"bytes are too many for a tokenizer"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_clip_tokenizer(write(tmp_path, files))
