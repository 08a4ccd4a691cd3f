"""One component of a model on disk: ``config.json`` and its weights in safetensors.

The format is that of the public diffusers checkpoints, read strictly and written whole or not at
all.
"""

import json
import os
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mezzotint.checkpoints.layouts import config_to_layout, layout_to_config
from mezzotint.config import Config
from mezzotint.errors import CheckpointError
from mezzotint.storage.safetensors_file import write_safetensors
from mezzotint.storage.tensors import TensorInfo, find_weights, open_tensors, refuse_pointer

__all__ = [
    "Fit",
    "build_component",
    "compare",
    "fill_unsaved_buffers",
    "load_component",
    "load_state_strictly",
    "load_weights",
    "modern_name",
    "read_component_config",
    "read_json",
    "save_component",
    "save_weights",
    "weight_files",
    "whole_or_not",
    "write_atomically",
    "write_json",
]

CONFIG = "config.json"
_MOST_JSON = 8 << 20  # bytes; the longest of real folders have a few thousand
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
# the projections of plain attention blocks in folders of before 2023
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def save_component(
    module: nn.Module,
    folder: Path | str,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a UNet or a first stage as a component folder.

    Args:
        module: Has a ``config`` that `mezzotint.checkpoints.layouts` knows.
        folder: Made if need be. What is there stays whole until the new files are.
        extra: More keys for ``config.json``, such as ``scaling_factor``.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.

    Raises:
        CheckpointError: If it cannot be written.
    """
    folder = Path(folder)
    keys = config_to_layout(cast(Config, module.config)) | dict(extra or {})
    save_weights(module.state_dict(), folder / WEIGHTS, dtype)
    write_json(folder / CONFIG, keys)


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> None:
    """Write tensors in safetensors, holding a copy of one at a time.

    Args:
        tensors: By name.
        path: The file; its folder is made if need be.
        dtype: Of the floating-point ones on the disk; None keeps each as it is.

    Raises:
        CheckpointError: If it cannot be written.
    """
    entries = [
        (
            name,
            dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
            tuple(tensor.shape),
            partial(tensors.__getitem__, name),
        )
        for name, tensor in tensors.items()
    ]
    with whole_or_not(path) as temporary:
        write_safetensors(temporary, entries, {"format": "pt"})


def load_component(folder: Path | str, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """Read a component folder.

    Args:
        folder: Holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, or a variant of
            it that `mezzotint.storage.tensors.find_weights` finds.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.

    Returns:
        A `UNet`, `AutoencoderKL`, `VQModel` or `IdentityFirstStage` in evaluation mode on the CPU.

    Raises:
        CheckpointError: If a file is missing or damaged, the configuration says what we cannot
            build, or a tensor is missing, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    module = build_component(folder)
    load_weights(module, find_weights(folder, STEM), dtype, modern_name)
    return module.eval()


def build_component(folder: Path) -> nn.Module:
    """Build what a component folder says, on the meta device: without weights.

    Raises:
        CheckpointError: If its configuration is missing or damaged, or says what we cannot build.
    """
    layout, config = layout_to_config(read_component_config(folder), str(folder / CONFIG))
    with torch.device("meta"):  # no time lost on random weights that are overwritten
        return layout.build(config)


def load_weights(
    module: nn.Module,
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Read all weights of a module from a file that has them and no others.

    Args:
        module: Best on the meta device, where it takes up no memory before.
        path: What `mezzotint.storage.tensors.open_tensors` reads.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.
        rename: From a name in the file to the module's; None for a tensor to leave out.

    Raises:
        CheckpointError: If the file is damaged, or a tensor is missing, unexpected or of the wrong
            shape or type.
    """
    stored = open_tensors(path)
    names = {name: ours for name in stored if (ours := rename(name)) is not None}
    # before gigabytes are read that do not fit
    infos = {ours: stored[name] for name, ours in names.items()}
    compare(module.state_dict(), infos).require(type(module).__name__, path)
    tensors = {names[name]: tensor for name, tensor in stored.read(dtype, names).items()}
    load_state_strictly(module, tensors, path)
    fill_unsaved_buffers(module)


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """Return all files that a component's weights are read from; see `find_weights`."""
    path = find_weights(folder, stem)
    return (path, *open_tensors(path).paths) if path.suffix == ".json" else (path,)


def read_component_config(folder: Path | str) -> dict[str, Any]:
    """Return the keys of a component's ``config.json`` as they stand there.

    Raises:
        CheckpointError: If the file is missing or is not a JSON object.
    """
    return read_json(Path(folder) / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a model folder that holds keys and values.

    Raises:
        CheckpointError: If the file is missing or is not a JSON object.
    """
    refuse_pointer(path)
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_JSON):
            raise CheckpointError(f"{path}: refused: is no file of at most {_MOST_JSON:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return cast(dict[str, Any], data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file of a model folder; see `write_atomically`."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def load_state_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load weights that must be exactly those of a module.

    Args:
        module: On the meta device it takes the tensors over, elsewhere it copies them.
        tensors: By name.
        source: What an error calls their file.

    Raises:
        CheckpointError: Naming what is missing, unexpected or of the wrong shape or type.
    """
    compare(module.state_dict(), tensors).require(type(module).__name__, source)
    on_meta = any(t.is_meta for t in module.state_dict().values())
    module.load_state_dict(tensors, assign=on_meta)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the tensors of a file go with those that a network wants.

    Attributes:
        missing: Names of those that should be there.
        unexpected: Names of those that should not.
        wrong: Names of those of another shape, with both shapes.
        mistyped: Names of whole numbers where fractions belong, or the other way round.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]
    mistyped: tuple[str, ...]

    def told(self, kind: str) -> str | None:
        """Return a sentence on all that does not fit a network of this kind, if anything."""
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.wrong,
            "wrong type": self.mistyped,
        }
        parts = [f"{what} {_some(names)}" for what, names in lists.items() if names]
        return f"does not fit its {kind}: {'; '.join(parts)}" if parts else None

    def require(self, kind: str, source: Path) -> None:
        """Raise a CheckpointError that says what does not fit, unless all does."""
        if (told := self.told(kind)) is not None:
            raise CheckpointError(f"{source}: {told}")


def compare(
    wanted: Mapping[str, Tensor | TensorInfo], found: Mapping[str, Tensor | TensorInfo]
) -> Fit:
    """Hold the tensors of a file against those of a network; none of them is read.

    Args:
        wanted: By name, the network's.
        found: By the same names, the file's.
    """
    both = [(name, wanted[name], found[name]) for name in wanted if name in found]
    return Fit(
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(name for name in found if name not in wanted),
        wrong=tuple(
            f"{name} {tuple(there.shape)} where {tuple(expected.shape)} was expected"
            for name, expected, there in both
            if tuple(there.shape) != tuple(expected.shape)
        ),
        mistyped=tuple(
            f"{name} of {there.dtype}"
            for name, expected, there in both
            if there.dtype.is_floating_point != expected.dtype.is_floating_point
        ),
    )


def _some(names: Sequence[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return (
        f"({len(names)}): " + ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
    )


def modern_name(name: str) -> str:
    """Return what folders of today call a tensor of a UNet or a first stage."""
    if ".attentions." not in name:
        return name
    return ".".join(_OLD_NAMES.get(part, part) for part in name.split("."))


def fill_unsaved_buffers(module: nn.Module) -> None:
    """Give memory to the buffers that are no weights; all of them are counts that begin at 0.

    Args:
        module: Was built on the meta device.
    """
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that whoever reads it finds the old one whole, or the new one.

    Args:
        path: Its folder is made if need be.
        data: The content.

    Raises:
        CheckpointError: If it cannot be written, for example on a full disk; what stood there
            before is as it was.
    """
    with whole_or_not(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_or_not(path: Path) -> Generator[Path]:
    """Offer a temporary path; afterwards it is on the disk, and bears the right name.

    Args:
        path: The right name; its folder is made if need be.

    Raises:
        CheckpointError: If it cannot be written; what stood there before is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _synchronise(temporary)
        temporary.replace(path)
        _synchronise(path.parent)  # the new name itself must survive a power cut
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
