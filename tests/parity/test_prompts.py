"""A corpus of prompts: grammar and chunks against other code, token ids against transformers'."""

import json
import random
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from transformers import BertTokenizer, CLIPTokenizer

from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.prompts import parse_prompt
from mezzotint.conditioning.vocabularies import bert_tokenizer, clip_tokenizer

Letters = list[tuple[str, float]]  # each letter with its weight
Tokens = list[tuple[int, float]]  # each token with its weight


def written() -> list[str]:
    """The prompts of the file, one a line, with a sign for the ends of their own lines."""
    text = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8")
    return [line.replace("⏎", "\n") for line in text.removesuffix("\n").split("\n")]


def drawn() -> list[str]:
    """Others put together by chance from what the grammar knows."""
    words = ["cat,", "dog", "BREAK", "(", ")", "[", "]", "\\(", "\\]", "\\\\", "\\", ":", "1.3"]
    words += [":1.3)", ":0.5)", ":-1)", ":.)", "red", "猫", "🚀", "a.b", "é"]
    chance = random.Random(0)
    return sorted(
        {
            "".join(chance.choice(words) + chance.choice(["", " ", "  "]) for _ in range(length))
            for length in range(1, 40)
            for _ in range(20)
        }
    )


def read_letter_by_letter(prompt: str) -> list[Letters]:
    """Evaluate the grammar by hand and eye, one letter after the other."""
    letters: list[str] = []
    weights: list[float] = []
    runs: list[int] = []  # BREAK is a word within one run of plain letters
    rounds: list[int] = []
    squares: list[int] = []
    at = run = 0

    def say(text: str) -> None:
        letters.extend(text)
        weights.extend(1.0 for _ in text)
        runs.extend(run for _ in text)

    def scale(start: int, factor: float) -> None:
        for k in range(start, len(weights)):
            weights[k] *= factor

    while at < len(prompt):
        letter, rest = prompt[at], prompt[at + 1 :]
        at += 1
        if letter not in "\\()[]:":
            say(letter)
            continue
        run += 1
        told, closed, _ = rest.partition(")")
        digits = told.strip()
        digits = digits[1:] if digits[:1] in {"+", "-"} else digits
        number = bool(digits) and all(c == "." or c.isdecimal() for c in digits)
        if letter == "\\":
            if rest[:1] and rest[0] in "()[]\\":
                say(rest[0])
                at += 1
        elif letter == "(":
            rounds.append(len(letters))
        elif letter == "[":
            squares.append(len(letters))
        elif letter == ")" and rounds:
            scale(rounds.pop(), 1.1)
        elif letter == "]" and squares:
            scale(squares.pop(), 1 / 1.1)
        elif letter == ":" and rounds and closed and number:
            at += len(told) + 1
            if digits.strip(".") and digits.count(".") <= 1:
                scale(rounds.pop(), float(told))
            else:
                say(f":{told})")
        else:
            say(letter)
        run += 1
    for start in rounds:
        scale(start, 1.1)
    for start in squares:
        scale(start, 1 / 1.1)
    return cut_at_breaks(letters, weights, runs)


def cut_at_breaks(letters: list[str], weights: list[float], runs: list[int]) -> list[Letters]:
    parts: list[Letters] = [[]]
    for number in sorted(set(runs)):
        places = [k for k, other in enumerate(runs) if other == number]
        text = "".join(letters[k] for k in places)
        word = [c.isalnum() or c == "_" for c in text] + [False]
        k = 0
        while k < len(text):
            if text[k : k + 5] == "BREAK" and not (k and word[k - 1]) and not word[k + 5]:
                blanks = k - len(text[:k].rstrip())
                del parts[-1][len(parts[-1]) - min(blanks, len(parts[-1])) :]
                parts.append([])
                k += 5
                while k < len(text) and text[k].isspace():
                    k += 1
            else:
                parts[-1].append((text[k], weights[places[k]]))
                k += 1
    return parts


def tokens_of(part: Letters, tokenizer: CLIPTokenizer) -> Tokens:
    """Runs of letters of one weight through CLIP's tokenizer."""
    found: Tokens = []
    for _, run in groupby(part, key=lambda item: f"{item[1]:.9e}"):
        pieces = list(run)
        text = "".join(letter for letter, _ in pieces)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found += [(number, pieces[0][1]) for number in ids]
    return found


def in_chunks(parts: list[Tokens], comma: int) -> Iterator[Tokens]:
    """Take 75 at a time, or up to the last comma where it is among the last 20 of them."""
    empty = True
    for number, part in enumerate(parts):
        rest = part
        while len(rest) > 75:
            commas = [k for k in range(55, 75) if rest[k][0] == comma and rest[75][0] != comma]
            length = max(commas, default=74) + 1
            yield rest[:length]
            rest, empty = rest[length:], False
        if rest or number < len(parts) - 1 or empty:
            yield rest
            empty = False


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """CLIP's tokenizer in transformers, from its two files."""
    folder = tmp_path_factory.mktemp("clip")
    model = json.loads(clip_tokenizer().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def conditioner() -> ClipConditioner:
    config = ClipConditionerConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return ClipConditioner(config, clip_tokenizer())


def test_the_corpus_holds_what_it_should(reference: CLIPTokenizer) -> None:
    prompts = written()
    assert len(set(prompts)) == len(prompts) >= 220
    lengths = [len(reference(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
    kinds = {
        "empty": "" in prompts,
        "long": sum(length > 225 for length in lengths) >= 5,
        "weighted": sum(":1." in prompt for prompt in prompts) >= 30,
        "escaped": sum("\\" in prompt for prompt in prompts) >= 20,
        "broken": sum("BREAK" in prompt for prompt in prompts) >= 20,
        "unbalanced": sum(p.count("(") != p.count(")") for p in prompts) >= 20,
        "Chinese": sum("一" <= c <= "鿿" for p in prompts for c in p) >= 50,
        "emoji": sum("\U0001f300" <= c <= "\U0001faff" for p in prompts for c in p) >= 20,
        "combining": any(unicodedata.combining(c) for p in prompts for c in p),
    }
    assert all(kinds.values()), kinds


def test_the_grammar_against_an_independent_evaluation() -> None:
    chance = drawn()
    assert len(chance) >= 500 and sum("BREAK" in prompt for prompt in chance) >= 100
    for prompt in (*written(), *chance):
        expected = read_letter_by_letter(prompt)
        found = [[(c, f.weight) for f in part for c in f.text] for part in parse_prompt(prompt)]
        assert [[c for c, _ in part] for part in found] == [
            [c for c, _ in part] for part in expected
        ], prompt
        # the same products in another order
        assert [w for part in found for _, w in part] == pytest.approx(
            [w for part in expected for _, w in part], rel=1e-12
        ), prompt


def test_chunks_of_tokens_and_weights(
    conditioner: ClipConditioner, reference: CLIPTokenizer
) -> None:
    """From the prompt to what the transformer reads, by other code all the way."""
    comma = reference.convert_tokens_to_ids(",</w>")
    for prompt in (*written(), *drawn()[::5]):
        parts = [tokens_of(part, reference) for part in read_letter_by_letter(prompt)]
        expected = list(in_chunks(parts, comma))
        found = conditioner.chunks(prompt)
        assert [list(chunk.tokens) for chunk in found] == [
            [number for number, _ in chunk] for chunk in expected
        ], prompt
        for chunk, other in zip(found, expected, strict=True):
            assert list(chunk.weights) == pytest.approx([weight for _, weight in other]), prompt


def unicode_texts(count: int) -> list[str]:
    """Texts by chance from letters, marks, signs and blanks of all planes."""
    chance = random.Random(1)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530)]
    ranges += [(0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2070), (0x2100, 0x2C00)]
    ranges += [(0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0xFFFE)]
    ranges += [(0x1D400, 0x1D800), (0x1F300, 0x1FB00), (0x20000, 0x2A6E0), (0x00, 0x20)]
    return [
        "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randrange(30)))
        for _ in range(count)
    ]


def test_token_ids_of_clip(reference: CLIPTokenizer) -> None:
    tokenizer = clip_tokenizer()
    assert reference.vocab_size == tokenizer.get_vocab_size() == 49408
    for text in (*written(), *unicode_texts(800)):
        expected = reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text


def test_token_ids_of_bert(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    file = tmp_path / "vocab.txt"
    file.write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")
    theirs = BertTokenizer.from_pretrained(tmp_path)
    assert theirs.vocab_size == tokenizer.get_vocab_size() == 30522
    extra = ["[MASK] a[SEP]b", "[mask]", "[UNK] [PAD][CLS]"]
    for text in (*written(), *extra, *unicode_texts(800)):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
