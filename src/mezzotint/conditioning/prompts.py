"""The prompt grammar of the web UIs: emphasis, breaks, adapters, and prompts of any length.

``(x)`` attends to x 1.1 times as much, ``[x]`` 1 / 1.1 times, ``(x:1.3)`` 1.3 times; they nest and
multiply. A backslash makes the bracket after it a plain character. The word ``BREAK`` ends a chunk
of tokens. ``<lora:name:0.8>`` asks for an adapter and is not part of the text. What web UIs change
from step to step, ``[a:b:0.5]``, ``[a|b]`` and ``AND``, is not read.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mezzotint.errors import RequestError

__all__ = [
    "CHUNK",
    "AdapterRequest",
    "Chunk",
    "Fragment",
    "chunk_tokens",
    "parse_prompt",
    "split_adapters",
]

CHUNK = 75  # tokens between the start and the end token of CLIP
_STRONGER, _WEAKER = 1.1, 1 / 1.1
# how far before a chunk's end a comma may stand for the words after it to go into the next one
_BACKTRACK = 20

_LEXEME = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])           # a bracket, or a backslash, that means itself
  | \\                                  # a backslash before anything else is dropped
  | (?P<open>[(\[])
  | :\s*(?P<weight>[+-]?[.\d]+)\s*\)    # the end of (x:1.3)
  | (?P<close>[)\]])
  | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
_ADAPTER = re.compile(r"<(?P<kind>\w+):(?P<rest>[^<>]*)>")


@dataclass(frozen=True)
class Fragment:
    """Words of one weight.

    Attributes:
        text: The words, with the blanks around them.
        weight: What their embeddings are multiplied by; 1 is plain.
    """

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter that a prompt asks for, ``<lora:name:0.8>``.

    Attributes:
        name: Of the adapter's file, without its suffix.
        weight: How strongly it acts.
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through the text encoder together.

    Attributes:
        tokens: At most `CHUNK` ids, without start, end and padding.
        weights: One for each.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def parse_prompt(prompt: str) -> list[list[Fragment]]:
    """Parse emphasis and breaks.

    Brackets that are never closed act up to the prompt's end, ones that were never opened are plain
    characters, and so is ``:1.3)`` outside of round brackets.

    Args:
        prompt: As the user typed it, without adapters.

    Returns:
        The parts between the words ``BREAK``, each as its fragments in order; neighbours of equal
        weight are one. An empty part has no fragments.

    Example:
        >>> parse_prompt("a (red:1.5) [apple] BREAK [(pear)]")[0]
        [Fragment(text='a ', weight=1.0), Fragment(text='red', weight=1.5), \
Fragment(text=' ', weight=1.0), Fragment(text='apple', weight=0.9090909090909091)]
    """
    pieces = _weighted_pieces(prompt)
    parts: list[list[Fragment]] = [[]]
    for text, weight in pieces:
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == weight:
            parts[-1][-1] = Fragment(parts[-1][-1].text + text, weight)
        elif text:
            parts[-1].append(Fragment(text, weight))
    return parts


def _weighted_pieces(prompt: str) -> list[tuple[str | None, float]]:
    """Texts with their weights, and None for a break."""
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's text begins

    def say(text: str | None) -> None:
        texts.append(text)
        weights.append(1.0)

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for lexeme in _LEXEME.finditer(prompt):
        kind = lexeme.lastgroup
        if kind == "escaped":
            say(lexeme["escaped"])
        elif kind == "open":
            opened[lexeme["open"]].append(len(texts))
        elif kind == "weight" and opened["("] and (weight := _number(lexeme["weight"])) is not None:
            multiply(opened["("].pop(), weight)
        elif kind == "close" and opened[_partner(lexeme["close"])]:
            bracket = _partner(lexeme["close"])
            multiply(opened[bracket].pop(), _factor(bracket))
        elif kind is not None:
            cut = _BREAK.split(lexeme[0])
            for number, part in enumerate(cut):
                if number:
                    say(None)
                    part = part.lstrip()
                say(part if number == len(cut) - 1 else part.rstrip())
    for bracket, starts in opened.items():
        for start in starts:
            multiply(start, _factor(bracket))
    return list(zip(texts, weights, strict=True))


def _partner(closing: str) -> str:
    return "(" if closing == ")" else "["


def _factor(bracket: str) -> float:
    return _STRONGER if bracket == "(" else _WEAKER


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:  # such as 1.2.3
        return None
    return number if math.isfinite(number) else None


def split_adapters(prompt: str) -> tuple[str, list[AdapterRequest]]:
    """Take the adapters out of a prompt.

    Args:
        prompt: As the user typed it.

    Returns:
        The prompt without them, and them in order.

    Raises:
        RequestError: If one asks for another kind of adapter than ``lora``, or its weight is no
            number.

    Example:
        >>> split_adapters("a cat <lora:ink:0.8>")
        ('a cat ', [AdapterRequest(name='ink', weight=0.8)])
    """
    found: list[AdapterRequest] = []

    def take(match: re.Match[str]) -> str:
        kind, rest = match["kind"], match["rest"]
        if kind.lower() != "lora":
            raise RequestError(f"{match[0]}: unknown kind of adapter {kind!r}; Choose from: lora")
        name, _, weight = rest.partition(":")
        number = _number(weight) if weight else 1.0
        if number is None or not name:
            raise RequestError(f"{match[0]}: expected <lora:NAME> or <lora:NAME:WEIGHT>")
        found.append(AdapterRequest(name, number))
        return ""

    return _ADAPTER.sub(take, prompt), found


def chunk_tokens(
    parts: Sequence[Sequence[Fragment]],
    tokenize: Callable[[str], Sequence[int]],
    comma: int | None,
    *,
    size: int = CHUNK,
) -> list[Chunk]:
    """Cut a prompt's tokens into chunks for the text encoder.

    A chunk that is full is cut after its last comma, if that stands among its last 20 tokens, so
    that the words of one thought stay together.

    Args:
        parts: From `parse_prompt`; each begins a chunk of its own.
        tokenize: From text to token ids, without start and end.
        comma: The id of the comma; None never looks for one.
        size: Tokens of a chunk.

    Returns:
        At least one chunk; an empty prompt has an empty one.
    """
    chunks: list[Chunk] = []
    for number, part in enumerate(parts):
        tokens: list[int] = []
        weights: list[float] = []
        after_comma = 0  # where the text after the last comma begins; 0 if there is none
        for fragment in part:
            for token in tokenize(fragment.text):
                if len(tokens) == size:
                    near = after_comma and token != comma and size - after_comma < _BACKTRACK
                    cut = after_comma if near else size
                    chunks.append(Chunk(tuple(tokens[:cut]), tuple(weights[:cut])))
                    tokens, weights, after_comma = tokens[cut:], weights[cut:], 0
                elif token == comma:
                    after_comma = len(tokens) + 1
                tokens.append(token)
                weights.append(fragment.weight)
        if tokens or number < len(parts) - 1 or not chunks:
            chunks.append(Chunk(tuple(tokens), tuple(weights)))
    return chunks
