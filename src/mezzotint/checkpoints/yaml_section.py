"""A mapping of a YAML file, read so that no key of it is overlooked and all mistakes are told."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from mezzotint.errors import ConfigError, nearest, short

if TYPE_CHECKING:
    from yaml import SafeLoader
else:  # ten times faster where libyaml is there, as in every wheel
    SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

__all__ = ["Section", "load_yaml"]

_MOST_BYTES = 1 << 20  # a configuration has 5 kB
_MOST_NESTED = 64
_MOST_VALUES = 1 << 17  # a file that names its classes may have tens of thousands
_MOST_NAMED = 8  # of the keys that nothing is known of
_MOST_NUMBERS = 64  # of a list that has one for each level
_WIDEST = 1 << 16  # of a level over the first
_NEAR = 0.75  # of how alike two keys are
_LARGEST = 1 << 53  # no float counts further one by one
_MERGE = "tag:yaml.org,2002:merge"
Kinds = type | tuple[type, ...]


class _Loader(SafeLoader):
    """Plain values, with numbers as OmegaConf reads them: 1e-4 needs no point, no date is one."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in pairs if not tag.endswith(":timestamp")]
        for first, pairs in SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


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
        data = _construct(content.decode(), path)
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


@dataclass
class _Opened:
    """A list or mapping of a file while it is gone through.

    Attributes:
        anchor: What aliases of it are called.
        values: Values before it; once it is at its end, those in it.
        deepest: How deep it is nested.
    """

    anchor: str | None
    values: int
    deepest: int = 0


def _construct(text: str, path: Path) -> Any:
    """Make the values of a file, if they are few enough with every alias written out.

    A line that stands for others may be repeated by others again, so that a few of them would take
    all memory.
    """
    opened: list[_Opened] = [_Opened(None, 0)]
    closed: dict[str, _Opened] = {}
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        what, depth = None, len(opened)
        if isinstance(event, yaml.CollectionEndEvent):
            last = opened.pop()
            opened[-1].deepest = max(opened[-1].deepest, last.deepest + 1)
            if last.anchor is not None:
                closed[last.anchor] = replace(last, values=count - last.values)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Opened(event.anchor, count))
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                closed[event.anchor] = _Opened(event.anchor, 1)
            if event.tag == _MERGE or (event.implicit[0] and event.value == "<<"):
                what = "<< merges other lines; write them out"
        elif isinstance(event, yaml.AliasEvent):
            told = closed.get(event.anchor)
            if told is None:  # of what is not yet at its end, or of nothing
                what = f"the alias *{event.anchor[:80]} stands for no lines above it"
            else:
                count += told.values
                depth += told.deepest
                opened[-1].deepest = max(opened[-1].deepest, told.deepest + 1)
        if depth > _MOST_NESTED:
            what = f"nested more than {_MOST_NESTED} deep"
        elif count > _MOST_VALUES:
            what = f"more than {_MOST_VALUES:,} values"
        if what is not None:
            where = f"{path}, line {event.start_mark.line + 1}"
            raise ConfigError(f"{where}: refused: {what}")
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


class Section:
    """One mapping of the file.

    Args:
        data: Its keys and values.
        key: The dotted key that leads to it; empty for the whole file.
        problems: What was found wrong in any section of the file; this adds to it.
        left_out: Dotted keys of any section that are of no use here, and of which users are told.
    """

    def __init__(
        self,
        data: Mapping[Any, Any],
        key: str,
        problems: list[str],
        left_out: list[str] | None = None,
    ) -> None:
        self.data, self.key, self.problems = data, key, problems
        self.left_out: list[str] = [] if left_out is None else left_out
        self._known: set[Any] = set()

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
        if isinstance(value, int | float) and not _is_number(value):
            self.problem(name, f"expected a number that is finite, got {short(value)}")
            return default
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number, whole or not."""
        return float(self.take(name, default, (int, float)))

    def count(self, name: str, default: int | None = None) -> int:
        """Return a number of things, at least one; without a default it must be given."""
        value = self.take(name, default, int)
        if value is None:
            if not any(told.startswith(f"{self.name(name)}: ") for told in self.problems):
                self.problem(name, "required, but missing")
            return 1
        if not 1 <= value < 1 << 31:
            self.problem(name, f"expected 1 or more, got {short(value)}")
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
        if not all(type(n) is not bool and _is_number(n) for n in value):
            self.problem(name, f"expected a list of numbers, got {short(value)}")
            return []
        if len(value) > _MOST_NUMBERS:
            self.problem(name, f"expected {_MOST_NUMBERS} numbers at most, got {len(value):,}")
            return []
        return list(value)

    def multiples(self, name: str) -> list[float]:
        """Return by how much each level is wider than the first."""
        values = self.numbers(name, (1, 2, 4, 8))
        if not all(0 < n <= _WIDEST for n in values):
            self.problem(name, f"expected numbers above 0 up to {_WIDEST:,}, got {short(values)}")
            return []
        return values

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
        return Section(value, self.name(name), self.problems, self.left_out)

    def name(self, name: str) -> str:
        """Return the dotted key of a value."""
        return f"{self.key}.{name}" if self.key else name

    def problem(self, name: str, told: str) -> None:
        """Note that a value is wrong."""
        self.problems.append(f"{self.name(name)}: {told}")

    def ignore(self, names: str) -> None:
        """Know keys that are of no use here, given in one text."""
        self._known |= set(names.split())

    def leave_out(self, wanted: Callable[[Any, Any], bool]) -> None:
        """Leave out keys that nobody asked for, if they and their values are wanted to be."""
        for name in self._others():
            if wanted(name, self.data[name]):
                self._known.add(name)
                self.left_out.append(self.name(_named(name)))

    def is_near(self, name: Any) -> bool:
        """Whether a key that nobody asked for may be a known one, wrongly written."""
        return bool(get_close_matches(_named(name), map(str, self._known), 1, _NEAR))

    def finish(self) -> None:
        """Note every key that nobody asked for."""
        unknown = [_named(name) for name in self._others()]
        for name in unknown[:_MOST_NAMED]:
            told = nearest(name, self._known)
            self.problems.append(f"unknown key {self.name(name)!r}; {told}")
        if (more := len(unknown) - _MOST_NAMED) > 0:
            self.problems.append(f"and {more} more unknown keys in {self.key or 'the file'}")

    def _others(self) -> list[Any]:
        return [name for name in self.data if name not in self._known]


def _named(name: Any) -> str:
    return short(name) if isinstance(name, int) else str(name)[:80]


def _is_number(value: Any) -> bool:
    # so written, that not a number is none
    return isinstance(value, int | float) and abs(value) < _LARGEST
