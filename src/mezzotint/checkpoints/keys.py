"""The keys of a component's ``config.json``, read so that none is overlooked."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PASSED", "Keys", "levels"]

# what a folder may also say, for whoever uses the component: precision, size, normalisation
PASSED = frozenset(
    {"force_upcast", "latents_mean", "latents_std", "sample_size", "scaling_factor"}
    | {"upcast_attention"}
)


class Keys:
    """The keys of a ``config.json``, of which everything must be accounted for."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)
        self.problems: list[str] = []
        self._seen: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        """Return a value, or what the class takes in its absence."""
        self._seen.add(key)
        return self.data.get(key, default)

    def one(self, key: str, default: Any) -> Any:
        """Return a value that may be given once for every level, if it is the same at all."""
        value = self.take(key, default)
        if not isinstance(value, list):
            return value
        if len({repr(v) for v in value}) != 1:
            self.problem(key, value, "one value for all levels")
            return default
        return value[0]

    def problem(self, key: str, value: Any, expected: str) -> None:
        """Note that a value cannot be translated."""
        self.problems.append(f"{key} is {value!r}, expected {expected}")

    def check_rest(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Note every other key that is not at a value where it changes nothing."""
        for key, value in self.data.items():
            if key in self._seen or key in PASSED or key.startswith("_"):
                continue
            # a key that a later version brought is off where it is null or false
            allowed = neutral.get(key, (None, False))
            if value not in allowed:
                choices = " or ".join(repr(a) for a in allowed)
                self.problem(key, value, f"{choices} (Mezzotint has no such option)")


def levels(
    keys: Keys, key: str, default: Sequence[str], kinds: Mapping[str, Any], *, up: bool = False
) -> list[Any]:
    """What the block types say of each level, the finest first."""
    names: list[str] = list(keys.take(key, default))
    for name in names:
        if name not in kinds:
            keys.problem(key, name, f"only {', '.join(kinds)}")
    values = [kinds.get(name) for name in names]
    return values[::-1] if up else values
