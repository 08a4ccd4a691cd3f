"""Conditioners in Mezzotint's own folders: configuration, weights, tokenizer where there is one.

A conditioner of two parts has a sub-folder for each.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from mezzotint.checkpoints.folder import (
    CONFIG,
    load_weights,
    read_component_config,
    save_weights,
    write_atomically,
    write_json,
)
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig
from mezzotint.config import Config
from mezzotint.errors import CheckpointError, ConfigError, nearest

__all__ = ["load_conditioner", "save_conditioner"]

_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_READS_TEXT = (TextConditioner, ClipConditioner, BertTextConditioner)
# what is built of a configuration, and of a tokenizer if it reads text
_CONFIGURED: Mapping[type[Conditioner], type[Config]] = {
    TextConditioner: TextConditionerConfig,
    ClipConditioner: ClipConditionerConfig,
    BertTextConditioner: BertTextConditionerConfig,
    ClassConditioner: ClassConditionerConfig,
    LayoutConditioner: LayoutConditionerConfig,
    SemanticMapConditioner: SemanticMapConditionerConfig,
    LowResConditioner: LowResConditionerConfig,
    InpaintingConditioner: InpaintingConditionerConfig,
}
_KINDS = {kind.__name__: kind for kind in (*_CONFIGURED, Unconditional, HybridConditioner)}


def save_conditioner(
    conditioner: Conditioner, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a conditioner.

    Args:
        conditioner: Of a kind that this module knows.
        folder: Made if need be.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
    """
    assert type(conditioner) in _KINDS.values(), type(conditioner)
    keys: dict[str, Any] = {"_class_name": type(conditioner).__name__}
    if isinstance(conditioner, HybridConditioner):
        save_conditioner(conditioner.main, folder / "main", dtype)
        save_conditioner(conditioner.spatial, folder / "spatial", dtype)
    elif type(conditioner) in _CONFIGURED:
        keys |= cast(Config, conditioner.config).to_dict()
        if state := conditioner.state_dict():
            save_weights(state, folder / _WEIGHTS, dtype)
    if isinstance(conditioner, _READS_TEXT):
        write_atomically(folder / _TOKENIZER, conditioner.tokenizer.to_str().encode())
    write_json(folder / CONFIG, keys)


def load_conditioner(folder: Path, dtype: torch.dtype | None = torch.float32) -> Conditioner:
    """Read a conditioner that `save_conditioner` wrote.

    Args:
        folder: Of the conditioner.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.

    Raises:
        CheckpointError: If a file is missing or damaged, or the kind is unknown.
        MissingExtraError: If it needs ``transformers``, which is not installed.
    """
    keys = read_component_config(folder)
    name = str(keys.pop("_class_name", None))
    if name not in _KINDS:
        raise CheckpointError(f"{folder}: unknown conditioner {name!r}; {nearest(name, _KINDS)}")
    kind = _KINDS[name]
    if kind is Unconditional:
        return Unconditional()
    if kind is HybridConditioner:
        parts = (load_conditioner(folder / part, dtype) for part in ("main", "spatial"))
        return HybridConditioner(*parts)
    build = cast(Callable[..., Conditioner], kind)
    try:
        config = _CONFIGURED[kind].from_dict(keys, str(folder / CONFIG))
        parts = (_tokenizer(folder / _TOKENIZER),) if kind in _READS_TEXT else ()
        with torch.device("meta"):
            conditioner = build(config, *parts)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if conditioner.state_dict():
        load_weights(conditioner, folder / _WEIGHTS, dtype)
    return conditioner


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    # tokenizers raises a bare Exception for missing and damaged files alike
    except Exception as error:
        raise CheckpointError(f"{path}: {error}") from None
