"""The prompt grammar of the web UIs: emphasis, breaks, adapters, and prompts of any length.

``(x)`` attends to x 1.1 times as much, ``[x]`` 1 / 1.1 times, ``(x:1.3)`` 1.3 times; they nest and
multiply. A backslash makes the bracket after it a plain character. The word ``BREAK`` ends a chunk
of tokens. ``<lora:name:0.8>`` asks for an adapter and is not part of the text. What web UIs change
from step to step, ``[a:b:0.5]``, ``[a|b]`` and ``AND``, is not read.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

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
_STRONGER = 1.1
_POWER = {"(": 1, "[": -1}  # of it, that a bracket without a number multiplies by
_DEEPEST = 1000  # beyond this power a weight is beyond any use, and then beyond a float
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
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in _weighted_pieces(prompt):
        if text is None:
            parts.append([])
        elif text:
            parts[-1].append((text, weight))
    return [
        [
            Fragment("".join(text for text, _ in run), weight)
            for weight, run in groupby(part, key=itemgetter(1))
        ]
        for part in parts
    ]


class _Emphasis:
    """The brackets around texts that are said one after the other.

    A bracket's factor is known when it closes. So what each does is noted where its text begins and
    where it ends, and one pass at the end works the weights out, however deep brackets nest.
    """

    def __init__(self) -> None:
        self.texts: list[str | None] = []
        self.opened: dict[str, list[int]] = {"(": [], "[": []}  # where each one's text begins
        self.turns: defaultdict[int, int] = defaultdict(int)  # change of the power of 1.1
        self.scaled: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)  # end, factor

    def close(self, bracket: str, factor: float | None = None) -> None:
        """Close the bracket that was opened last; without a factor it has its own."""
        start, end = self.opened[bracket].pop(), len(self.texts)
        if factor is None:
            self.turns[start] += _POWER[bracket]
            self.turns[end] -= _POWER[bracket]
        elif start < end:
            self.scaled[start].append((end, factor))

    def weights(self) -> list[float]:
        """Return the weight of each text, once every bracket is closed."""
        weights: list[float] = []
        power = 0
        around = [(len(self.texts), 1.0)]  # where each explicit weight ends, and their product
        for place in range(len(self.texts)):
            while around[-1][0] <= place:
                around.pop()
            # of those that begin here the outer ones were closed last
            for end, factor in reversed(self.scaled[place]):
                around.append((end, around[-1][1] * factor))
            power += self.turns[place]
            bounded = max(-_DEEPEST, min(power, _DEEPEST))
            weights.append(_STRONGER**bounded * around[-1][1])
        return weights


def _weighted_pieces(prompt: str) -> list[tuple[str | None, float]]:
    """Texts with their weights, and None for a break."""
    said = _Emphasis()
    for lexeme in _LEXEME.finditer(prompt):
        kind = lexeme.lastgroup
        if kind == "escaped":
            said.texts.append(lexeme["escaped"])
        elif kind == "open":
            said.opened[lexeme["open"]].append(len(said.texts))
        elif (
            kind == "weight"
            and said.opened["("]
            and (factor := _number(lexeme["weight"])) is not None
        ):
            said.close("(", factor)
        elif kind == "close" and said.opened[_partner(lexeme["close"])]:
            said.close(_partner(lexeme["close"]))
        elif kind is not None:
            said.texts.extend(_cut_at_breaks(lexeme[0]))
    for bracket, starts in said.opened.items():
        while starts:
            said.close(bracket)
    return list(zip(said.texts, said.weights(), strict=True))


def _cut_at_breaks(text: str) -> Iterator[str | None]:
    """Plain text, with None for every word BREAK and the blanks around it."""
    cut = _BREAK.split(text)
    for number, part in enumerate(cut):
        if number:
            yield None
            part = part.lstrip()
        yield part if number == len(cut) - 1 else part.rstrip()


def _partner(closing: str) -> str:
    return "(" if closing == ")" else "["


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


class _Cutter:
    """Tokens one after the other, cut into chunks."""

    def __init__(self, size: int, comma: int | None) -> None:
        self.size = size
        self.comma = comma
        self.chunks: list[Chunk] = []
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.after_comma = 0  # where the text after the last comma begins; 0 if there is none

    def cut(self, place: int) -> None:
        self.chunks.append(Chunk(tuple(self.tokens[:place]), tuple(self.weights[:place])))
        self.tokens, self.weights = self.tokens[place:], self.weights[place:]
        self.after_comma = 0

    def make_room(self, token: int) -> None:
        """Cut a full chunk before this token."""
        if len(self.tokens) == self.size:
            near = self.after_comma and self.size - self.after_comma < _BACKTRACK
            self.cut(self.after_comma if near and token != self.comma else self.size)

    def add(self, token: int, weight: float) -> None:
        self.make_room(token)
        self.tokens.append(token)
        self.weights.append(weight)
        if token == self.comma:
            self.after_comma = len(self.tokens)

    def add_together(self, tokens: tuple[int, ...], weight: float) -> None:
        """Add tokens that go into one chunk, unless they are more than one holds."""
        self.make_room(tokens[0])
        if self.size - len(self.tokens) < len(tokens) <= self.size:
            self.cut(len(self.tokens))
        for token in tokens:
            self.add(token, weight)


def chunk_tokens(
    parts: Sequence[Sequence[Fragment]],
    tokenize: Callable[[str], Sequence[int | tuple[int, ...]]],
    comma: int | None,
    *,
    size: int = CHUNK,
) -> list[Chunk]:
    """Cut a prompt's tokens into chunks for the text encoder.

    A chunk that is full is cut after its last comma, if that stands among its last 20 tokens, so
    that the words of one thought stay together.

    Args:
        parts: From `parse_prompt`; each begins a chunk of its own.
        tokenize: From text to token ids, without start and end. A tuple is of ids that are not to
            be parted.
        comma: The id of the comma; None never looks for one.
        size: Tokens of a chunk.

    Returns:
        At least one chunk; an empty prompt has an empty one.
    """
    cutter = _Cutter(size, comma)
    for number, part in enumerate(parts):
        for fragment in part:
            for item in tokenize(fragment.text):
                if isinstance(item, tuple):
                    cutter.add_together(item, fragment.weight)
                else:
                    cutter.add(item, fragment.weight)
        if cutter.tokens or number < len(parts) - 1 or not cutter.chunks:
            cutter.cut(len(cutter.tokens))
    return cutter.chunks
