"""How strongly a LoRA acts, where it is not said beside each layer but in a configuration."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mezzotint.checkpoints.folder import read_json
from mezzotint.errors import CheckpointError

__all__ = ["CONFIG", "Scales", "read_config", "read_metadata"]

CONFIG = "adapter_config.json"  # of PEFT
_METADATA = "lora_adapter_metadata"  # of diffusers, in the header of safetensors
_PREFIXES: Mapping[Literal["unet", "text"], str] = {"unet": "unet.", "text": "text_encoder."}


@dataclass(frozen=True)
class Scales:
    """The numbers alpha of a file.

    Attributes:
        alpha: Of all layers; None or 0 means the rank.
        patterns: Of those layers whose names end so, or are so after a ``^``.
        by_root: Divide alpha by the root of the rank (Kalajdzievski 2023, arXiv 2312.03732).
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict[str, float])
    by_root: bool = False

    def of(self, path: str, rank: int) -> float:
        """Return what the product of a layer's factors is multiplied by.

        Args:
            path: The layer's name, with dots.
            rank: r.
        """
        own = (value for name, value in self.patterns.items() if _stands_for(name, path))
        alpha = next(own, self.alpha)
        return (alpha or rank) / (math.sqrt(rank) if self.by_root else rank)


def read_config(path: Path) -> Scales:
    """Read PEFT's ``adapter_config.json``.

    Raises:
        CheckpointError: If it is damaged, or of another kind of adapter.
    """
    return _scales(str(path), read_json(path))


def read_metadata(
    path: Path, metadata: Mapping[str, str]
) -> dict[Literal["unet", "text"] | None, Scales]:
    """Read what diffusers writes into the header of its files.

    Args:
        path: The file, for messages.
        metadata: Of its header.

    Returns:
        For each network of which it speaks; under None where it speaks of one network alone.

    Raises:
        CheckpointError: If it is damaged, or of another kind of adapter.
    """
    if _METADATA not in metadata:
        return {}
    source = f"{path}: {_METADATA}"
    try:
        data = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{source}: expected keys and values, got {type(data).__name__}")
    keys = cast(dict[str, Any], data)
    found: dict[Literal["unet", "text"] | None, Scales] = {}
    for part, prefix in _PREFIXES.items():
        mine = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
        if mine:
            found[part] = _scales(source, mine)
    if "lora_alpha" in keys:
        found[None] = _scales(source, keys)
    return found


def _scales(source: str, keys: Mapping[str, Any]) -> Scales:
    kind = keys.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{source}: peft_type is {kind!r}, expected 'LORA'")
    for key, name in (("use_dora", "DoRA"), ("lora_bias", "LoRA with biases")):
        if keys.get(key):
            raise CheckpointError(f"{source}: {key} is on: is a {name}, expected a plain LoRA")
    patterns = keys.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{source}: alpha_pattern: expected names and numbers")
    return Scales(
        alpha=_number(source, "lora_alpha", keys.get("lora_alpha")),
        patterns={
            _plain(source, name): _number(source, f"alpha_pattern.{name}", value)
            for name, value in cast(dict[str, Any], patterns).items()
        },
        by_root=bool(keys.get("use_rslora")),
    )


def _number(source: str, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a number")
    return float(value)


def _plain(source: str, pattern: str) -> str:
    """A pattern that is no more than a name or its end; expressions of a file are not run."""
    name = pattern.removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"\^?[\w.-]+", name):
        raise CheckpointError(
            f"{source}: alpha_pattern: {pattern!r} is an expression, expected a layer's name"
        )
    return name


def _stands_for(pattern: str, path: str) -> bool:
    if pattern.startswith("^"):
        return pattern == f"^{path}"
    return f".{path}".endswith(f".{pattern}")
