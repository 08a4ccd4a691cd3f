"""Captions put into sentences, with the right article."""

import re
import string
from collections.abc import Iterable

__all__ = ["DEFAULT_TEMPLATES", "check_template", "fill_template", "unsaid", "with_article"]

DEFAULT_TEMPLATES = (
    "{caption}",
    "a {caption}",
    "an emoji of a {caption}",
    "a picture of a {caption}",
    "a drawing of a {caption}",
    "a small icon of a {caption}",
)

_ARTICLE = re.compile(r"\b(?:a|an) \{caption\}")
# what follows the noun: "glass of milk", "umbrella with rain drops", "man: beard"
_AFTER_NOUN = re.compile(r":| (?:of|with|without|in|on|behind|over|at|from|showing|facing|done) ")
_UNCOUNTED = {
    "bacon", "bread", "broccoli", "butter", "clothing", "cooking", "curry", "dna",
    "fog", "garlic", "ginger", "ice", "lightning", "milk", "money", "oden", "people", "popcorn",
    "rain", "rice", "sake", "salt", "snow", "spaghetti", "sushi", "tennis", "wood",
}  # fmt: skip
_AN = re.compile(r"[aeio8]|u(?!ni[^mn]|se|ti|k)|hour|x-", re.IGNORECASE)
_YET_A = re.compile(r"eu|one\b|once", re.IGNORECASE)
_SPOKEN_AN = frozenset("AEFHILMNORSX")  # letters whose names begin with a vowel


def with_article(caption: str) -> str:
    """Put "a" or "an" before a caption, or nothing before what isn't counted.

    Example:
        >>> [with_article(c) for c in ("red apple", "unicorn", "octopus", "grapes", "x-ray")]
        ['a red apple', 'a unicorn', 'an octopus', 'grapes', 'an x-ray']
    """
    noun = _AFTER_NOUN.split(caption, maxsplit=1)[0].split()[-1:]
    if not noun:
        return caption
    last = noun[0].lower()
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "'s"))
    if plural or last in _UNCOUNTED:
        return caption
    first = caption.split()[0]
    if first.isupper() and first.isalpha() and len(first) <= 2 or first in ("ATM", "SOS"):
        vowel = first[0] in _SPOKEN_AN
    else:
        vowel = bool(_AN.match(first)) and not _YET_A.match(first)
    return f"{'an' if vowel else 'a'} {caption}"


def fill_template(template: str, caption: str) -> str:
    """Put a caption into a template; an article before it is chosen to fit.

    Args:
        template: Such as ``"a picture of a {caption}"``.
        caption: Such as ``"red apple"``.

    Example:
        >>> fill_template("a picture of a {caption}", "anchor")
        'a picture of an anchor'
    """
    template = _ARTICLE.sub("{counted}", template)
    return template.format(caption=caption, counted=with_article(caption))


def unsaid(tags: Iterable[str], caption: str) -> list[str]:
    """Return the tags that a caption doesn't hold.

    Example:
        >>> unsaid(["fruit", "red"], "Red apple")
        ['fruit']
    """
    return [tag for tag in tags if tag not in caption.lower()]


def check_template(template: str) -> None:
    """Raise ValueError unless a template holds ``{caption}`` and no other field."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}") from None
    if not fields or set(fields) != {"caption"}:
        raise ValueError(f"template {template!r}: expected text with {{caption}} in it")
    try:
        template.format(caption="apple")
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"template {template!r}: {error}") from None
