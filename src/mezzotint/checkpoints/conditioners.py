"""Conditioners in Mezzotint's own folders: configuration, weights, tokenizer where there is one.

A conditioner of two parts has a sub-folder for each.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mezzotint.checkpoints.compvis_text import conditioner_map
from mezzotint.checkpoints.folder import (
    CONFIG,
    load_weights,
    read_component_config,
    save_weights,
    write_atomically,
    write_json,
)
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.build import CONFIGURATIONS, READ_TEXT, build_conditioner
from mezzotint.conditioning.classes import ClassConditionerConfig
from mezzotint.conditioning.clip import (
    ClipConditionerConfig,
    check_vocabulary,
)
from mezzotint.conditioning.spatial import (
    HybridConditioner,
)
from mezzotint.config import Config
from mezzotint.errors import CheckpointError, ConfigError, nearest, short
from mezzotint.storage.tensors import TensorInfo, refuse_pointer

__all__ = [
    "PARTS",
    "ExpectedWeights",
    "clip_weights",
    "read_concat_channels",
    "read_token_width",
    "expected_weights",
    "load_conditioner",
    "save_conditioner",
]

_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
PARTS = ("main", "spatial")
_KINDS = {kind.__name__: kind for kind in (*CONFIGURATIONS, Unconditional, HybridConditioner)}


def save_conditioner(
    conditioner: Conditioner,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    with_main: bool = True,
) -> None:
    """Write a conditioner.

    Args:
        conditioner: Of a kind that this module knows.
        folder: Made if need be.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
        with_main: Whether the main part of a conditioner of two is written, or lies elsewhere.
    """
    assert type(conditioner) in _KINDS.values(), type(conditioner)
    keys: dict[str, Any] = {"_class_name": type(conditioner).__name__}
    if isinstance(conditioner, HybridConditioner):
        for name in PARTS if with_main else PARTS[1:]:
            save_conditioner(getattr(conditioner, name), folder / name, dtype)
    elif type(conditioner) in CONFIGURATIONS:
        keys |= cast(Config, conditioner.config).to_dict()
        if state := conditioner.state_dict():
            save_weights(state, folder / _WEIGHTS, dtype)
    if isinstance(tokenizer := getattr(conditioner, "tokenizer", None), Tokenizer):
        write_atomically(folder / _TOKENIZER, tokenizer.to_str().encode())
    write_json(folder / CONFIG, keys)


def load_conditioner(
    folder: Path, dtype: torch.dtype | None = torch.float32, *, main: Path | None = None
) -> Conditioner:
    """Read a conditioner that `save_conditioner` wrote.

    Args:
        folder: Of the conditioner.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.
        main: Where the main part lies of a conditioner of two, if not in it.

    Raises:
        CheckpointError: If a file is missing or damaged, or the kind is unknown.
        MissingExtraError: If it needs ``transformers``, which is not installed.
    """
    kind, config, tokenizer = _read(folder)
    if kind is HybridConditioner:
        return HybridConditioner(*(load_conditioner(part, dtype) for part in _parts(folder, main)))
    if config is None:
        return Unconditional()
    conditioner = _build(folder, config, tokenizer)
    if conditioner.state_dict():
        load_weights(conditioner, folder / _WEIGHTS, dtype)
    return conditioner


@dataclass(frozen=True)
class ExpectedWeights:
    """What a file of a conditioner is to hold.

    Attributes:
        kind: The conditioner's class.
        path: The file.
        tensors: By name, without values.
    """

    kind: str
    path: Path
    tensors: Mapping[str, Tensor | TensorInfo]


def expected_weights(folder: Path, *, main: Path | None = None) -> tuple[ExpectedWeights, ...]:
    """Return what the weights of a conditioner must be; ``transformers`` is not needed for it.

    Args:
        folder: From `save_conditioner`; its weights are not looked at.
        main: See `load_conditioner`.

    Raises:
        CheckpointError: If a configuration or a tokenizer is missing or damaged.
    """
    kind, config, tokenizer = _read(folder)
    if kind is HybridConditioner:
        return tuple(told for part in _parts(folder, main) for told in expected_weights(part))
    if config is None:
        return ()
    path = folder / _WEIGHTS
    tensors: Mapping[str, Tensor | TensorInfo]
    if isinstance(config, ClipConditionerConfig):
        assert tokenizer is not None, "it reads text"
        with _mistakes_are_the_files(folder):
            check_vocabulary(config, tokenizer)
        tensors = clip_weights(config, path)
    else:
        tensors = _build(folder, config, tokenizer).state_dict()
    return (ExpectedWeights(kind.__name__, path, tensors),) if tensors else ()


def read_token_width(folder: Path, *, main: Path | None = None) -> int | None:
    """Return the width of the tokens that a conditioner gives; None if it gives none.

    Args:
        folder: From `save_conditioner`.
        main: See `load_conditioner`.

    Raises:
        CheckpointError: If a configuration or a tokenizer is missing or damaged.
    """
    kind, config, _ = _read(folder)
    if kind is HybridConditioner:
        return read_token_width(_parts(folder, main)[0])
    if isinstance(config, ClipConditionerConfig):
        return config.hidden_size
    return getattr(config, "width", None)


def read_concat_channels(folder: Path) -> int:
    """Return how many channels a conditioner concatenates to the noisy latent.

    Args:
        folder: From `save_conditioner`.

    Raises:
        CheckpointError: If a configuration or a tokenizer is missing or damaged.
    """
    kind, config, tokenizer = _read(folder)
    if kind is HybridConditioner:
        return read_concat_channels(_parts(folder, None)[1])
    if config is None or kind.wants_concat is None:
        return 0
    return _build(folder, config, tokenizer).concat_channels


def clip_weights(config: ClipConditionerConfig, path: Path) -> dict[str, TensorInfo]:
    """Return what the weights of a CLIP text encoder are, without building it.

    Args:
        config: What it is.
        path: The file that they should lie in.
    """
    rules = conditioner_map("clip", config).rules
    return {
        name: TensorInfo(torch.float32, tuple(rule.ours_shape), path)
        for rule in rules
        for name in rule.ours
    }


def _parts(folder: Path, main: Path | None) -> tuple[Path, ...]:
    """Where the parts of a conditioner of two lie."""
    own = [folder / part for part in PARTS]
    return (main or own[0], *own[1:])


def _read(folder: Path) -> tuple[type[Conditioner], Config | None, Tokenizer | None]:
    """The class of a conditioner, its configuration and its tokenizer, as far as it has them."""
    keys = read_component_config(folder)
    name = str(keys.pop("_class_name", None))
    if name not in _KINDS:
        near = nearest(name, _KINDS)
        raise CheckpointError(f"{folder / CONFIG}: unknown conditioner {short(name)}; {near}")
    kind = _KINDS[name]
    if kind not in CONFIGURATIONS:
        return kind, None, None
    with _mistakes_are_the_files():
        config = CONFIGURATIONS[kind].from_dict(keys, str(folder / CONFIG))
    if isinstance(config, ClassConditionerConfig) and not config.class_names:
        raise CheckpointError(f"{folder / CONFIG}: class_names is empty; expected the classes")
    return kind, config, _tokenizer(folder / _TOKENIZER) if kind in READ_TEXT else None


def _build(folder: Path, config: Config, tokenizer: Tokenizer | None) -> Conditioner:
    """A conditioner without weights."""
    with _mistakes_are_the_files(folder), torch.device("meta"):
        return build_conditioner(config, tokenizer)


@contextmanager
def _mistakes_are_the_files(folder: Path | None = None) -> Generator[None]:
    """A configuration that comes from a folder is the folder's mistake, not the user's."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}" if folder else str(error)) from None


def _tokenizer(path: Path) -> Tokenizer:
    refuse_pointer(path)
    try:
        return Tokenizer.from_file(str(path))
    # tokenizers raises a bare Exception for missing and damaged files alike
    except Exception as error:
        raise CheckpointError(f"{path}: {error}") from None
