"""Files of LoRA adapters (Hu et al. 2021, arXiv 2106.09685), as other programs write them.

An adapter changes the weight W of a layer to W + (alpha / r) B A, where A has r rows and B has r
columns. Kohya's files call a layer by its name with underscores in place of dots, and keep alpha
beside B and A; those of PEFT and diffusers keep the dots, and say alpha in a configuration.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from mezzotint.checkpoints.loaded import content_hash
from mezzotint.checkpoints.lora_scales import CONFIG, Scales, read_config, read_metadata
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import Tensors, open_tensors

__all__ = ["LoraAdapter", "LoraLayer", "Part", "lora_files", "read_lora"]

Part = Literal["unet", "text"]

_STEMS = ("pytorch_lora_weights", "adapter_model")  # of diffusers' folders, and of PEFT's
_SUFFIXES = (".safetensors", ".bin")
_PEFT_PREFIX = "base_model.model."

# what follows a layer's name
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_OLDEST = {"_lora.down.weight": _DOWN, "_lora.up.weight": _UP}  # diffusers' attention processors
_ROLES = {
    ".lora_down.weight": _DOWN,  # kohya's
    ".lora_up.weight": _UP,
    ".alpha": _ALPHA,
    ".lora_A.weight": _DOWN,  # PEFT's, and now diffusers'
    ".lora_B.weight": _UP,
    ".lora_A.default.weight": _DOWN,
    ".lora_B.default.weight": _UP,
    ".lora.down.weight": _DOWN,  # diffusers' before that
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    **_OLDEST,
}
# what precedes it
_PARTS: Mapping[str, Part] = {
    "lora_unet_": "unet",
    "lora_te_": "text",
    "lora_te1_": "text",
    "unet.": "unet",
    "text_encoder.": "text",
}
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_PLAIN = "expected a plain LoRA: lora_down and lora_up, or lora_A and lora_B"
# other kinds of adapters, by what stands in their names
_OTHERS: Mapping[str, str] = {
    "lora_te2_": "for Stable Diffusion XL, whose second text encoder no model here has",
    "text_encoder_2.": "for Stable Diffusion XL, whose second text encoder no model here has",
    "dora_scale": f"a DoRA; {_PLAIN}",
    "lora_magnitude_vector": f"a DoRA; {_PLAIN}",
    ".hada_": f"a LoHa; {_PLAIN}",
    ".lokr_": f"a LoKr; {_PLAIN}",
    "oft_": f"an OFT or a BOFT; {_PLAIN}",
    ".lora_mid.": f"a LoRA with a third factor; {_PLAIN}",
    "lora_embedding_": f"a LoRA of the vocabulary; {_PLAIN}",
    ".on_input": f"an IA3; {_PLAIN}",
    "ia3_": f"an IA3; {_PLAIN}",
    ".b1.weight": f"a GLoRA; {_PLAIN}",
    ".diff.": f"a file of whole differences; {_PLAIN}",
    ".diff_b.": f"a file of whole differences; {_PLAIN}",
    "bundle_emb.": f"a LoRA with embeddings in it; {_PLAIN}",
    ".lora_B.bias": f"a LoRA with biases; {_PLAIN}",
    ".lora_up.bias": f"a LoRA with biases; {_PLAIN}",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer:
    """What an adapter changes one layer by: ``scale * up @ down``.

    Attributes:
        key: What the file calls the layer.
        part: The network that it lies in; None if the file does not say.
        path: Its name there, with dots or with underscores.
        down: A, ``(r, in)`` or ``(r, in, h, w)``.
        up: B, ``(out, r)`` or ``(out, r, 1, 1)``.
        scale: alpha / r.
    """

    key: str
    part: Part | None
    path: str
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraAdapter:
    """An adapter as it was read; it fits a model or does not.

    Attributes:
        name: What it is called while it acts; by default as its file.
        path: The file or the folder.
        sha256: Of the file, or over those of several.
        layers: What it changes.
    """

    name: str
    path: Path
    sha256: str
    layers: tuple[LoraLayer, ...]


def read_lora(path: Path | str) -> LoraAdapter:
    """Read a LoRA adapter.

    Args:
        path: A file of kohya's, PEFT's or diffusers' form; or a folder with
            ``pytorch_lora_weights.safetensors``, or ``adapter_model.safetensors`` and
            ``adapter_config.json``.

    Raises:
        CheckpointError: If it is damaged, holds anything that is not of a LoRA, is another kind of
            adapter, or does not say how strongly it acts.
    """
    path = Path(path)
    files = lora_files(path)
    stored = open_tensors(files[0])
    _refuse_others(files[0], stored)
    entries = _group(files[0], stored)
    scales = _scales(files, stored)
    layers = tuple(_read_layer(files[0], entry, stored, scales) for entry in entries)
    name = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
    return LoraAdapter(name=name, path=path, sha256=content_hash(files), layers=layers)


def lora_files(path: Path) -> tuple[Path, ...]:
    """Return the files that an adapter is read from, its weights first.

    Raises:
        CheckpointError: If a folder has no weights of an adapter.
    """
    file = path
    if path.is_dir():
        names = [f"{stem}{suffix}" for stem in _STEMS for suffix in _SUFFIXES]
        there = [path / name for name in names if (path / name).is_file()]
        if not there:
            raise CheckpointError(f"{path}: is no folder of an adapter; it has no {names[0]}")
        file = there[0]
    config = file.with_name(CONFIG)
    return (file, config) if file.stem == _STEMS[1] and config.is_file() else (file,)


@dataclass
class _Entry:
    """The tensors of one layer, by what they are."""

    key: str
    part: Part | None
    path: str
    names: dict[str, str] = field(default_factory=dict[str, str])


def _refuse_others(file: Path, names: Iterable[str]) -> None:
    for name in names:
        for mark, kind in _OTHERS.items():
            if mark in f"{name}.":
                raise CheckpointError(f"{file}: is {kind}. It has {name!r}")


def _group(file: Path, stored: Tensors) -> list[_Entry]:
    """Bring together what belongs to one layer, and see that it is whole."""
    entries: dict[tuple[Part | None, str], _Entry] = {}
    strange: list[str] = []
    for name in stored:
        suffix = next((suffix for suffix in _ROLES if name.endswith(suffix)), None)
        if suffix is None:
            strange.append(name)
            continue
        key = name.removesuffix(suffix)
        part, path = _locate(key, oldest=suffix in _OLDEST)
        entry = entries.setdefault((part, path), _Entry(key, part, path))
        other = entry.names.setdefault(_ROLES[suffix], name)
        if other != name:
            raise CheckpointError(f"{file}: {name!r} and {other!r} are the same of one layer")
    if strange:
        raise CheckpointError(
            f"{file}: {len(strange)} of {len(stored)} tensors are no part of a LoRA,"
            f" {strange[0]!r} for one; {_PLAIN}"
        )
    for entry in entries.values():
        _check_whole(file, entry, stored)
    return list(entries.values())


def _locate(key: str, *, oldest: bool) -> tuple[Part | None, str]:
    """The network that a layer lies in, and its name there."""
    path = key.replace(_PEFT_PREFIX, "", 1)
    prefix = next((prefix for prefix in _PARTS if path.startswith(prefix)), "")
    part, path = _PARTS.get(prefix), path.removeprefix(prefix)
    if oldest:
        layer, _, name = path.replace(".processor.", ".").rpartition(".")
        if layer.endswith("self_attn"):
            name = _ATTENTION.get(name, name)
        path = f"{layer}.{name}" + (".0" if name == "to_out" else "")
    return part, path


def _check_whole(file: Path, entry: _Entry, stored: Tensors) -> None:
    for role in (_DOWN, _UP):
        if role not in entry.names:
            raise CheckpointError(f"{file}: {entry.key}: has no {role!r}; it has {entry.names}")
    down, up = (stored[entry.names[role]] for role in (_DOWN, _UP))
    for role, info in ((_DOWN, down), (_UP, up)):
        if not info.dtype.is_floating_point or len(info.shape) not in (2, 4):
            raise CheckpointError(
                f"{file}: {entry.names[role]}: expected fractions in 2 or 4 dimensions, got"
                f" {info.dtype} of shape {info.shape}"
            )
    rank = down.shape[0]
    if not rank or up.shape[1] != rank or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"{file}: {entry.key}: down {down.shape} and up {up.shape} do not fit: expected"
            " (r, in, …) and (out, r)"
        )


def _scales(files: tuple[Path, ...], stored: Tensors) -> Callable[[_Entry], Scales]:
    """How strongly layers act that have no alpha of their own."""
    by_peft = any(_PEFT_PREFIX in name for name in stored)
    config = files[0].with_name(CONFIG)
    if config in files:
        whole = read_config(config)
        return lambda _: whole
    said = read_metadata(files[0], stored.metadata)

    def of(entry: _Entry) -> Scales:
        if entry.part in said or None in said:
            return said.get(entry.part) or said[None]
        if by_peft:
            raise CheckpointError(
                f"{files[0]}: is of PEFT's form, whose alpha stands in {CONFIG}; expected it beside"
                f" {_STEMS[1]}.safetensors, or .alpha for each layer"
            )
        return Scales()

    return of


def _read_layer(
    file: Path, entry: _Entry, stored: Tensors, scales: Callable[[_Entry], Scales]
) -> LoraLayer:
    tensors = stored.read(names=entry.names.values())
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise CheckpointError(f"{file}: {name}: holds values that are infinite or no numbers")
    down, up = (tensors[entry.names[role]] for role in (_DOWN, _UP))
    rank = down.shape[0]
    if _ALPHA in entry.names:
        alpha = tensors[entry.names[_ALPHA]]
        if alpha.numel() != 1:
            name = entry.names[_ALPHA]
            raise CheckpointError(f"{file}: {name}: expected one number, got {alpha.numel()}")
        scale = Scales(alpha=float(alpha)).of(entry.path, rank)
    else:
        scale = scales(entry).of(entry.path, rank)
    return LoraLayer(key=entry.key, part=entry.part, path=entry.path, down=down, up=up, scale=scale)
