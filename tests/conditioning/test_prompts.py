"""The prompt grammar by hand; tests/parity holds it against an evaluation that shares no code."""

import time

import pytest

from mezzotint.conditioning.prompts import (
    AdapterRequest,
    Chunk,
    chunk_tokens,
    parse_prompt,
    split_adapters,
)
from mezzotint.errors import RequestError

BY_HAND: dict[str, list[list[tuple[str, float]]]] = {
    "": [[]],
    "a red apple": [[("a red apple", 1.0)]],
    "(a)": [[("a", 1.1)]],
    "[a]": [[("a", 1 / 1.1)]],
    "(a:1.3)": [[("a", 1.3)]],
    "(a: 1.3 )": [[("a", 1.3)]],
    "(a:-0.5)": [[("a", -0.5)]],
    "(a:+2)": [[("a", 2.0)]],
    "(a:.5)": [[("a", 0.5)]],
    "(a:0)": [[("a", 0.0)]],
    "((a))": [[("a", 1.1 * 1.1)]],
    "[[a]]": [[("a", 1 / 1.1 / 1.1)]],
    "[(a)]": [[("a", 1.0)]],
    "a (b (c:2) d:3) e": [[("a ", 1), ("b ", 3), ("c", 6), (" d", 3), (" e", 1)]],
    "(a": [[("a", 1.1)]],
    "[a (b": [[("a ", 1 / 1.1), ("b", 1.0)]],
    "a)": [[("a)", 1.0)]],
    "a]": [[("a]", 1.0)]],
    "([a)]": [[("a", 1.0)]],
    "[a:1.5]": [[("a:1.5", 1 / 1.1)]],
    "a:1.5)": [[("a:1.5)", 1.0)]],
    "(a:b)": [[("a:b", 1.1)]],
    "(a:1.2.3)": [[("a:1.2.3)", 1.1)]],
    "(a:.)": [[("a:.)", 1.1)]],
    "(:1.5)": [[]],
    "()": [[]],
    r"\(a\)": [[("(a)", 1.0)]],
    r"(\(a\):1.5)": [[("(a)", 1.5)]],
    r"\[a\]": [[("[a]", 1.0)]],
    r"\\(a)": [[("\\", 1.0), ("a", 1.1)]],
    r"C:\temp": [[("C:temp", 1.0)]],
    "a BREAK b": [[("a", 1.0)], [("b", 1.0)]],
    "aBREAK b": [[("aBREAK b", 1.0)]],
    "BREAKER": [[("BREAKER", 1.0)]],
    "break": [[("break", 1.0)]],
    "a\nBREAK\nb": [[("a", 1.0)], [("b", 1.0)]],
    "BREAK BREAK": [[], [], []],
    "(a BREAK b:1.5)": [[("a", 1.5)], [("b", 1.5)]],
    "a (BREAK) b": [[("a ", 1.0)], [(" b", 1.0)]],
    "一只(红色:1.4)的猫": [[("一只", 1.0), ("红色", 1.4), ("的猫", 1.0)]],
    "🍎 ((🚀))": [[("🍎 ", 1.0), ("🚀", 1.1 * 1.1)]],
    "ship, (sea, storm:1.2), [people]": [
        [("ship, ", 1.0), ("sea, storm", 1.2), (", ", 1.0), ("people", 1 / 1.1)]
    ],
}


@pytest.mark.parametrize("prompt", list(BY_HAND))
def test_prompts_by_hand(prompt: str) -> None:
    parts = parse_prompt(prompt)
    assert [[f.text for f in part] for part in parts] == [
        [text for text, _ in part] for part in BY_HAND[prompt]
    ]
    weights = [f.weight for part in parts for f in part]
    assert weights == pytest.approx([weight for part in BY_HAND[prompt] for _, weight in part])


def test_brackets_that_undo_one_another_leave_exactly_one() -> None:
    for depth in range(1, 20):
        prompt = "(" * depth + "[" * depth + "a" + "]" * depth + ")" * depth
        assert [[f.weight for f in part] for part in parse_prompt(prompt + " b")] == [[1.0]]


@pytest.mark.parametrize(
    "prompt",
    ["(a" * 50_000, "(a" * 50_000 + ":1.0001)" * 50_000, "([a" * 30_000 + ")]" * 30_000],
)
def test_deep_brackets_take_linear_time(prompt: str) -> None:
    began = time.perf_counter()
    parts = parse_prompt(prompt)
    # a tenth of this here; once for each bracket and each text inside it would be over a minute
    assert time.perf_counter() - began < 5
    assert sum(len(f.text) for part in parts for f in part) == prompt.count("a")


def code(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def chunk_lengths(prompt: str) -> list[int]:
    return [len(c.tokens) for c in chunk_tokens(parse_prompt(prompt), code, ord(","))]


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("a" * 75, [75]),
        ("a" * 76, [75, 1]),
        ("a" * 230, [75, 75, 75, 5]),
        # the words after a comma go together, if it is among the last twenty tokens
        ("a" * 60 + "," + "b" * 40, [61, 40]),
        ("a" * 55 + "," + "b" * 40, [56, 40]),
        ("a" * 54 + "," + "b" * 40, [75, 20]),
        ("a" * 74 + "," + "b" * 5, [75, 5]),
        ("a" * 75 + "," + "b" * 5, [75, 6]),
        # a comma that was already cut after is not used twice
        ("a" * 70 + "," + "b" * 100, [71, 75, 25]),
        ("a BREAK b", [1, 1]),
        ("a BREAK", [1]),
        ("BREAK a", [0, 1]),
        ("BREAK", [0]),
        ("a" * 75 + " BREAK " + "b", [75, 1]),
    ],
)
def test_chunks_of_75(prompt: str, lengths: list[int]) -> None:
    assert chunk_lengths(prompt) == lengths


def test_weights_stay_with_their_tokens() -> None:
    chunks = chunk_tokens(parse_prompt("ab(cd:1.5)e"), code, None, size=3)
    assert chunks == [
        Chunk(tuple(code("abc")), (1.0, 1.0, 1.5)),
        Chunk(tuple(code("de")), (1.5, 1.0)),
    ]


def test_words_of_several_tokens_stay_in_one_chunk() -> None:
    def tokens(text: str) -> list[int | tuple[int, ...]]:
        return [(7, 8, 9) if letter == "W" else ord(letter) for letter in text]

    def lengths(prompt: str, size: int = 75) -> list[int]:
        chunks = chunk_tokens(parse_prompt(prompt), tokens, ord(","), size=size)
        assert sum(7 in chunk.tokens and 9 not in chunk.tokens for chunk in chunks) == (size < 3)
        return [len(chunk.tokens) for chunk in chunks]

    assert lengths("a" * 72 + "W") == [75]
    assert lengths("a" * 73 + "W") == [73, 3]
    assert lengths("a" * 75 + "Wa") == [75, 4]
    # first the thought is moved, then there is room
    assert lengths("a" * 60 + "," + "b" * 14 + "W") == [61, 17]
    assert lengths("W", size=2) == [2, 1]


def test_adapters_are_taken_out() -> None:
    prompt, found = split_adapters("<lora:ink:0.8> a cat<lora:line art> <b>")
    assert prompt == " a cat <b>"
    assert found == [AdapterRequest("ink", 0.8), AdapterRequest("line art", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<hypernet:x:1>", "unknown kind of adapter 'hypernet'; Choose from: lora"),
        ("<lora:x:strong>", "expected <lora:NAME> or <lora:NAME:WEIGHT>"),
        ("<lora:>", "expected <lora:NAME>"),
    ],
)
def test_adapters_that_cannot_be(prompt: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        split_adapters(f"a cat {prompt}")
    assert message in str(caught.value)
