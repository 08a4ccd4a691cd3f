"""YAML files and dotted overrides to strict, frozen pydantic models; every mistake told at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from mezzotint.errors import ConfigError, nearest, short

__all__ = ["Config", "Count", "Depth", "Document", "Width", "apply_overrides", "parse", "read_yaml"]
__all__ += ["to_yaml"]

_MOST_MISTAKES = 20  # that one message tells

Width = Annotated[int, Field(gt=0, le=1 << 16)]
"""Channels of a layer or numbers of a token; the bounds keep what a file claims within reason."""
Depth = Annotated[int, Field(gt=0, le=64)]
"""Layers one after the other."""
Count = Annotated[int, Field(gt=0, le=1 << 24)]
"""Rows of a table: tokens of a vocabulary, codes, classes."""


class Config(BaseModel):
    """A frozen value whose unknown keys are errors; it stands above the class that it builds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "configuration") -> Self:
        """Build from plain values.

        Raises:
            ConfigError: Naming every wrong key and value of ``data`` at once.
        """
        return parse(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``from_dict`` takes back, fit for JSON and YAML."""
        return self.model_dump(mode="json")


class Document(Config):
    """A Config that is stored by itself, and so carries the version of its format."""

    FORMAT_VERSION: ClassVar[int] = 1
    format_version: int = 1

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Bring plain values of an older version up to this one; there is none yet."""
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "configuration") -> Self:
        """Build from plain values; see `Config.from_dict`."""
        version = data.get("format_version", cls.FORMAT_VERSION)
        if isinstance(version, int) and version > cls.FORMAT_VERSION:
            raise ConfigError(
                f"{source}: format_version {version} is newer than the {cls.FORMAT_VERSION} that"
                " this Mezzotint reads; upgrade Mezzotint"
            )
        return parse(cls, cls.migrate(dict(data)), source)


C = TypeVar("C", bound=BaseModel)


def parse(model: type[C], data: Mapping[str, Any], source: str) -> C:
    """Validate plain values against a model.

    Args:
        model: The pydantic model to build.
        data: Plain values, as read from YAML or JSON.
        source: What the error message calls the origin of ``data``, usually a path.

    Raises:
        ConfigError: One line per mistake: dotted key, value, what was expected, nearest key.
    """
    try:
        return model.model_validate(dict(data))
    except pydantic.ValidationError as error:
        found = cast(list[dict[str, Any]], error.errors())
        lines = [_describe(model, item) for item in found[:_MOST_MISTAKES]]
        if (more := len(found) - _MOST_MISTAKES) > 0:
            lines.append(f"and {more} more mistakes")
        joined = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
        raise ConfigError(f"{source}: {joined}") from None


def _describe(model: type[BaseModel], item: dict[str, Any]) -> str:
    location = tuple(item["loc"])
    key = ".".join(str(part) for part in location if not _is_tag(model, location, part))
    if item["type"] == "extra_forbidden":
        names = _keys_at(model, location[:-1])
        return f"unknown key {key!r}; {nearest(str(location[-1]), names)}"
    if item["type"] == "missing":
        return f"{key}: required, but missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {short(item['input'])}"


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model that stands in a type annotation, unions and containers included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_of(a)]


def _discriminates(info: FieldInfo, tag: Any) -> list[type[BaseModel]]:
    """The members of a discriminated union that carry a tag."""
    name = info.discriminator
    if not isinstance(name, str):
        return []
    return [
        m
        for m in _models_of(info.annotation)
        if tag in getattr(m.model_fields[name].annotation, "__args__", ())
    ]


def _walk(model: type[BaseModel], location: Sequence[Any]) -> tuple[list[type[BaseModel]], bool]:
    """The models that a location leads to, and whether its last part was a union's tag."""
    here, pending, was_tag = [model], cast("FieldInfo | None", None), False
    for part in location:
        tagged = _discriminates(pending, part) if pending is not None else []
        pending, was_tag = None, bool(tagged)
        if tagged:
            here = tagged
            continue
        following: list[type[BaseModel]] = []
        for candidate in here:
            info = candidate.model_fields.get(str(part))
            if info is not None:
                following += _models_of(info.annotation)
                pending = info if info.discriminator else None
        here = following or ([] if isinstance(part, str) else here)
    return here, was_tag


def _is_tag(model: type[BaseModel], location: tuple[Any, ...], part: Any) -> bool:
    index = location.index(part)
    return _walk(model, location[: index + 1])[1]


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    models, _ = _walk(model, location)
    return sorted({name for m in models for name in m.model_fields})


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: If there is no such file, or it is not a YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}")
    return cast(dict[str, Any], data)


def to_yaml(config: Config) -> str:
    """Write a configuration as YAML that `read_yaml` and ``from_dict`` take back."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys, as ``--set optimizer.learning_rate=2e-4`` does.

    Args:
        data: Plain values; left as they are.
        overrides: Each ``dotted.key=value``, the value read as YAML.

    Raises:
        ConfigError: If one has no ``=``, or leads through something that holds no keys.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(data)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: expected dotted.key=value")
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            following = target.setdefault(parent, {})
            if not isinstance(following, dict):
                raise ConfigError(f"override {override!r}: {parent!r} holds no keys")
            target = cast(dict[str, Any], following)
        target[last] = _scalar(text, override)
    return result


def _scalar(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    if not isinstance(value, str) or text.strip()[:1] in ("'", '"'):
        return value
    try:
        return float(text)  # YAML 1.1 reads 2e-4 as text because it has no point
    except ValueError:
        return text  # as it was typed: YAML would drop what follows " #"
