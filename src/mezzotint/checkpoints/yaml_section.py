"""A mapping of a YAML file, read so that no key of it is overlooked and all mistakes are told."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from mezzotint.errors import ConfigError, nearest

__all__ = ["Section", "load_yaml", "short"]

_MOST_BYTES = 1 << 20  # a configuration has 5 kB
Kinds = type | tuple[type, ...]


def short(value: Any) -> str:
    """Return a value as messages show it; aliases may make one of a few lines endless."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict, shown.maxstring = 2, 3, 3, 80
    return shown.repr(value)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of plain values that holds one mapping.

    Raises:
        ConfigError: If there is no such file, it is too large, or it is not a YAML mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: has more than {_MOST_BYTES:,} bytes; no configuration does")
        data = yaml.safe_load(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}")
    return cast(dict[str, Any], data)


class Section:
    """One mapping of the file.

    Args:
        data: Its keys and values.
        key: The dotted key that leads to it; empty for the whole file.
        problems: What was found wrong in any section of the file; this adds to it.
    """

    def __init__(self, data: Mapping[str, Any], key: str, problems: list[str]) -> None:
        self.data, self.key, self.problems = data, key, problems
        self._known: set[str] = set()

    def take(self, name: str, default: Any, kinds: Kinds) -> Any:
        """Return a value, or the default if it is absent or of none of the kinds."""
        self._known.add(name)
        value = self.data.get(name, default)
        # in Python a truth value is a number
        wrong = isinstance(value, bool) and kinds is not bool
        if value is not default and (wrong or not isinstance(value, kinds)):
            named = " or ".join(
                k.__name__ for k in (kinds if isinstance(kinds, tuple) else [kinds])
            )
            self.problem(name, f"expected {named}, got {short(value)}")
            return default
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Return a number of things, at least one; without a default it must be given."""
        value = self.take(name, default, int)
        if value is None:
            if not any(told.startswith(f"{self.name(name)}: ") for told in self.problems):
                self.problem(name, "required, but missing")
            return 1
        if not 1 <= value < 1 << 31:
            self.problem(name, f"expected 1 or more, got {value}")
            return 1
        return value

    def same_count(self, name: str) -> int:
        """Return a number of things that may be given once for each level, if it is the same."""
        value = self.data.get(name)
        if isinstance(value, list) and value:
            self._known.add(name)
            one = {name: value[0]}
            if any(type(v) is not type(value[0]) or v != value[0] for v in value):
                self.problem(name, f"expected one number for all, got {short(value)}")
                return 1
            return Section(one, self.key, self.problems).count(name)
        return self.count(name)

    def numbers(self, name: str, default: Sequence[float] | None = None) -> list[float]:
        """Return a list of numbers; without a default it must be given."""
        value = self.take(name, default, (list, tuple))
        if value is None:
            self.problem(name, "expected a list of numbers")
            return []
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in value):
            self.problem(name, f"expected a list of numbers, got {short(value)}")
            return []
        return list(value)

    def choice(self, name: str, default: Any, choices: Mapping[str, Any]) -> Any:
        """Return what a text stands for in a closed table."""
        text = self.take(name, default, str)
        if text not in choices:
            told = "required, but missing" if text is None else f"unknown {short(text)}"
            self.problem(name, f"{told}; {nearest(str(text), choices)}")
            return choices[default] if default in choices else next(iter(choices.values()))
        return choices[text]

    def fixed(self, name: str, *values: Any) -> None:
        """Note a value at which what is here would be another network than ours."""
        self._known.add(name)
        value = self.data.get(name, values[0])
        if not any(type(value) is type(v) and value == v for v in values):
            told = " or ".join(repr(v) for v in values)
            self.problem(name, f"expected {told}, got {short(value)}")

    def section(self, name: str) -> "Section":
        """Return a mapping in this one; an empty one if it is absent."""
        value = self.take(name, {}, dict)
        return Section(value, self.name(name), self.problems)

    def name(self, name: str) -> str:
        """Return the dotted key of a value."""
        return f"{self.key}.{name}" if self.key else name

    def problem(self, name: str, told: str) -> None:
        """Note that a value is wrong."""
        self.problems.append(f"{self.name(name)}: {told}")

    def ignore(self, names: str) -> None:
        """Know keys that are of no use here, given in one text."""
        self._known |= set(names.split())

    def finish(self) -> None:
        """Note every key that nobody asked for."""
        for name in self.data:
            if name not in self._known:
                told = nearest(str(name), self._known)
                self.problems.append(f"unknown key {self.name(str(name))!r}; {told}")
