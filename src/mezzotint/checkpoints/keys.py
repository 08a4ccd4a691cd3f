"""The keys of a component's ``config.json``, read so that none is overlooked.

Whoever wrote the file may have put anything at any key. So a value is held against what the class
takes in its absence, here and once, before anything is computed with it.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

from mezzotint.errors import CheckpointError, short

__all__ = ["PASSED", "Keys", "fits", "levels", "like"]

# what a folder may also say, for whoever uses the component: precision, size, normalisation
PASSED = frozenset(
    {"force_upcast", "latents_mean", "latents_std", "sample_size", "scaling_factor"}
    | {"upcast_attention"}
)
_MOST_NAMED = 8  # of the keys that nothing is known of
_LARGEST = 1 << 53  # beyond it a number that JSON writes is not the one that is read
_LIKE: Mapping[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "keys and values",
}


def fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default; null stands for many and is left to others."""
    if default is None or value == default:
        return True
    if value is None:
        return not isinstance(default, list)
    if isinstance(default, int | float) and not isinstance(default, bool):
        # so written, that not a number is outside too
        return isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST
    return isinstance(value, type(default))


def like(default: Any) -> str:
    """Say what a value must be for `fits`."""
    return _LIKE[type(default)]


class Keys:
    """The keys of a ``config.json``, of which everything must be accounted for."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)
        self.problems: list[str] = []
        self._seen: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        """Return a value, or what the class takes in its absence, which tells its kind too."""
        self._seen.add(key)
        return self._checked(key, self.data.get(key, default), default)

    def one(self, key: str, default: Any) -> Any:
        """Return a value that may be given once for every level, if it is the same at all."""
        self._seen.add(key)
        value = self.data.get(key, default)
        if not isinstance(value, list):
            return self._checked(key, value, default)
        values = cast(list[Any], value)
        if not values or any(other != values[0] for other in values):
            self.problem(key, values, "one value for all levels")
            return default
        return self._checked(key, values[0], default)

    def counts(self, key: str, default: Sequence[int]) -> list[int]:
        """Return a list of numbers of things, each at least one."""
        values: list[Any] = self.take(key, list(default))
        if all(type(n) is int and 0 < n < _LARGEST for n in values):
            return values
        self.problem(key, values, "a list of numbers above 0")
        return list(default)

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers, empty if the key is absent or null."""
        if self.data.get(key) is None:
            return []
        values: list[Any] = self.take(key, list[float]())
        if all(n is not None and fits(n, 0.0) for n in values):
            return values
        self.problem(key, values, "a list of numbers")
        return []

    def section(self, key: str) -> dict[str, Any]:
        """Return the keys and values below a key; none if it is absent."""
        return self.take(key, dict[str, Any]()) or {}

    def problem(self, key: str, value: Any, expected: str) -> None:
        """Note that a value cannot be translated."""
        self.problems.append(f"{key} is {short(value)}, expected {expected}")

    def check_rest(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Note every other key that is not at a value where it changes nothing."""
        # a key that a later version brought is off where it is null or false
        others = [
            (key, value)
            for key, value in self.data.items()
            if not (key in self._seen or key in PASSED or key.startswith("_"))
            and value not in neutral.get(key, (None, False))
        ]
        for key, value in others[:_MOST_NAMED]:
            choices = " or ".join(repr(a) for a in neutral.get(key, (None, False)))
            self.problem(key[:80], value, f"{choices} (Mezzotint has no such option)")
        if (more := len(others) - _MOST_NAMED) > 0:
            self.problems.append(f"and {more} more keys that Mezzotint has no option for")

    def require(self, source: object) -> None:
        """Raise a CheckpointError that names every problem, if there is any."""
        if self.problems:
            raise CheckpointError(f"{source}: {'; '.join(self.problems)}")

    def _checked(self, key: str, value: Any, default: Any) -> Any:
        if fits(value, default):
            return value
        self.problem(key, value, like(default))
        return default


def levels(
    keys: Keys, key: str, default: Sequence[str], kinds: Mapping[str, Any], *, up: bool = False
) -> list[Any]:
    """What the block types say of each level, the finest first."""
    names: list[Any] = keys.take(key, list(default))
    known = [kinds.get(name) if isinstance(name, str) else None for name in names]
    unknown = (name for name, kind in zip(names, known, strict=True) if kind is None)
    for name in islice(unknown, 2):
        keys.problem(key, name, f"only {', '.join(kinds)}")
    return known[::-1] if up else known
