"""What can go wrong, as one tree.

::

    MezzotintError                 everything that a user can mend; exit code 2 on the command line
    ├── ConfigError                a recipe, an override or a setting is wrong
    ├── RequestError               a generation request asks for what cannot be given
    ├── DataError                  a data set, an image or a caption is wrong
    ├── CheckpointError            a file of weights or state is damaged, or not what it should be
    ├── TrainingError              a training run cannot start or go on
    └── MissingExtraError          an optional dependency is not installed

Anything else that escapes is a fault of Mezzotint's own.
"""

import difflib
import reprlib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MezzotintError",
    "MissingExtraError",
    "RequestError",
    "TrainingError",
    "nearest",
    "printable",
    "short",
]


class MezzotintError(Exception):
    """Root of every error that a user can mend. The message says what, where and what to do."""


class ConfigError(MezzotintError):
    """A recipe, an override or a setting is wrong."""


class RequestError(MezzotintError):
    """A generation request asks for what this model or sampler cannot give."""


class DataError(MezzotintError):
    """A data set, an image or a caption is wrong."""


class CheckpointError(MezzotintError):
    """A file of weights or of training state is damaged, or is not what it should be."""


class TrainingError(MezzotintError):
    """A training run cannot start or cannot go on."""


class MissingExtraError(MezzotintError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: install it with"
            f" pip install 'mezzotint[{extra}]'"
        )


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a clause that names the valid name nearest to a wrong one, and the choices.

    Args:
        name: What the user wrote.
        names: What would have been right.

    Returns:
        For example ``"did you mean 'ddim'? Choose from: ddim, ddpm"``.
    """
    choices = sorted(names)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Choose from: {', '.join(choices)}"


def printable(text: str) -> str:
    """Return text of a stranger's file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _whole(x: int, level: int) -> str:
    # Python refuses to write out a number of thousands of digits
    return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length():,} bits"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 6, 6, 3
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.repr_int = _whole


def short(value: object) -> str:
    """Return a value as messages show it, on one line whatever it is.

    Example:
        >>> short("x" * 5000)[:20], short(10**5000)
        ("'xxxxxxxxxxxxxxxxxxx", 'a number of 16,610 bits')
    """
    return _SHORT.repr(value)
