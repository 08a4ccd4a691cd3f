"""The prompt grammar, against an evaluation of it that shares no code."""

import random

import pytest

from mezzotint.conditioning.prompts import (
    AdapterRequest,
    Chunk,
    chunk_tokens,
    parse_prompt,
    split_adapters,
)
from mezzotint.errors import RequestError

Letters = list[tuple[str, float]]  # each letter with its weight

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


def corpus() -> list[str]:
    """Prompts by hand, and others put together by chance from what the grammar knows."""
    words = ["cat,", "dog", "BREAK", "(", ")", "[", "]", "\\(", "\\]", "\\\\", "\\", ":", "1.3"]
    words += [":1.3)", ":0.5)", ":-1)", ":.)", "red", "猫", "🚀", "a.b", "é"]
    chance = random.Random(0)
    drawn = {
        "".join(chance.choice(words) + chance.choice(["", " ", "  "]) for _ in range(length))
        for length in range(1, 40)
        for _ in range(20)
    }
    many = ["word " * 300, "(" * 50 + "deep" + ")" * 50, "a, " * 120]
    return [*BY_HAND, *many, *sorted(drawn)]


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
        digits = told.strip().removeprefix("-").removeprefix("+")
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
        elif letter == ":" and rounds and closed and digits and set(digits) <= set(".0123456789"):
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


@pytest.mark.parametrize("prompt", list(BY_HAND))
def test_prompts_by_hand(prompt: str) -> None:
    parts = parse_prompt(prompt)
    assert [[f.text for f in part] for part in parts] == [
        [text for text, _ in part] for part in BY_HAND[prompt]
    ]
    weights = [f.weight for part in parts for f in part]
    assert weights == pytest.approx([weight for part in BY_HAND[prompt] for _, weight in part])


def test_a_corpus_against_an_independent_evaluation() -> None:
    prompts = corpus()
    assert len(prompts) >= 200 and sum("BREAK" in prompt for prompt in prompts) >= 100
    for prompt in prompts:
        expected = read_letter_by_letter(prompt)
        found = [[(c, f.weight) for f in part for c in f.text] for part in parse_prompt(prompt)]
        assert [[c for c, _ in part] for part in found] == [
            [c for c, _ in part] for part in expected
        ], prompt
        assert [w for part in found for _, w in part] == pytest.approx(
            [w for part in expected for _, w in part]
        ), prompt


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
