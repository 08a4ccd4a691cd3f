"""What the reference pages show of docstrings: an extension of Griffe, which reads the source.

Names in single backquotes become links where a reference page has them, examples become code, and
the fields of configurations are listed with their defaults.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

__all__ = ["HouseDocstrings"]

REFERENCE = Path(__file__).parents[1] / "docs/reference"
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?!`)")
_CONFIG = "mezzotint.config.Config"
_FIELD = re.compile(r"^    (\w+)(?: \([^)]*\))?:", flags=re.MULTILINE)
_SECTION = re.compile(r"^Attributes:\n((?:(?:    .*)?(?:\n|\Z))+)", flags=re.MULTILINE)
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class HouseDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package after it was read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Rewrite every docstring of a package."""
        shown = set(_shown(pkg))
        for thing in _things(pkg):
            if isinstance(thing, griffe.Class) and _is_config(thing):
                _list_fields(thing)
            if thing.docstring is None:
                continue
            text = re.sub(r"^Example:$", "Examples:", thing.docstring.value, flags=re.MULTILINE)
            thing.docstring.value = _NAME.sub(lambda name, at=thing: _link(name, at, shown), text)


def _shown(pkg: griffe.Module) -> Iterator[str]:
    """The paths of all that the reference pages show."""
    for page in sorted(REFERENCE.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            thing = pkg[path.removeprefix(f"{pkg.path}.")]
            yield path
            yield thing.canonical_path
            for member in thing.members.values():
                if member.is_public and (member.is_class or member.has_docstring):
                    yield member.canonical_path
                    if member.is_class:
                        own = (inner for inner in member.members.values() if inner.is_public)
                        yield from (inner.canonical_path for inner in own if inner.has_docstring)


def _things(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _things(member)  # pyright: ignore[reportArgumentType]


def _link(name: re.Match[str], at: griffe.Object, shown: set[str]) -> str:
    """Link a name where it is shown: as a path, or as it is known where it stands."""
    words = name.group(1)
    paths = [words]
    first, _, rest = words.partition(".")
    scope: griffe.Object | None = at
    while scope is not None:
        if first in scope.members:
            found = scope.members[first]
            path = found.target_path if isinstance(found, griffe.Alias) else found.path
            paths.append(f"{path}.{rest}" if rest else path)
        scope = scope.parent
    for path in paths:
        if path in shown and path != at.path:
            return f"[{name.group()}][{path}]"
    return name.group()


def _is_config(thing: griffe.Class) -> bool:
    return thing.path != _CONFIG and any(base.path == _CONFIG for base in thing.mro())


def _list_fields(thing: griffe.Class) -> None:
    """Give every field of a configuration its line among the attributes, with its default."""
    if thing.docstring is None:
        return
    text = thing.docstring.value
    section = _SECTION.search(text)
    told: dict[str, str] = {}
    if section is not None:
        names = list(_FIELD.finditer(section.group(1)))
        ends = [name.start() for name in names[1:]] + [len(section.group(1))]
        for name, end in zip(names, ends, strict=True):
            told[name.group(1)] = section.group(1)[name.end() : end].strip()
    lines: list[str] = []
    for name, field in thing.members.items():
        if not isinstance(field, griffe.Attribute) or not field.is_public:
            continue
        if field.annotation is None or "ClassVar" in str(field.annotation):
            continue
        default, said = _default(field.value)
        words = [told.pop(name, "") or said, default]
        if words := [part for part in words if part]:
            lines.append(f"    {name}: " + " ".join(words))
    lines += [f"    {name}: {words}" for name, words in told.items()]
    before, after = text, ""
    if section is not None:
        before, after = text[: section.start()], text[section.end() :]
    if lines:
        text = f"{before.rstrip()}\n\nAttributes:\n" + "\n".join(lines) + f"\n\n{after.lstrip()}"
        thing.docstring.value = text.strip()


def _default(value: Any) -> tuple[str, str]:
    """What a field is where nothing is said, with its bounds; and what it says of itself."""
    if value is None:
        return "Required.", ""
    if not (isinstance(value, griffe.ExprCall) and str(value.function) == "Field"):
        return f"Default: ``{value}``.", ""
    given = {a.name: str(a.value) for a in value.arguments if isinstance(a, griffe.ExprKeyword)}
    default = given.get("default")
    text = "Required" if default is None else f"Default: ``{default}``"
    bounds = ", ".join(f"{_BOUNDS[n]} {bound}" for n, bound in given.items() if n in _BOUNDS)
    said = given.get("description", "").strip("'\"")
    return text + (f"; {bounds}." if bounds else "."), said
