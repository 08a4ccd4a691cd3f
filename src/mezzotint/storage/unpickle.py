"""Pickles of torch's, read without running what they say.

A pickle is a program, and whoever wrote it may name any function of any installed package. So it is
not given to Python: a small machine here goes through its instructions, knows the names of a closed
table and no others, and makes nothing but plain containers, numbers and texts. Tensors become
`StoredTensor`, objects of the training framework become `StandIn`. What the file says of sizes is
held against the file before it is believed, and what it may make is counted.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mezzotint.errors import CheckpointError
from mezzotint.storage.archive import StoredArchive
from mezzotint.storage.pickle_machine import Malformed, StandIn, run
from mezzotint.storage.stored import MOST_EXPANDED, Storage, StoredTensor, check_readings, extent

__all__ = ["ParameterDict", "StandIn", "StoredTensor", "read_pickle"]

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_BYTES = 16 << 20  # of a pickle; the longest of a real checkpoint have 5 MB
_MOST_DIMENSIONS = 8

_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,  # whose tensors say themselves what they are of
}
# numbers that Lightning keeps are often numpy's; those of other kinds become stand-ins
_NUMPY_NUMBERS = frozenset(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"])

# What may stand in a file of weights without being a weight, and is of no use here.
_INERT: Mapping[str, str] = {
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "pytorch_lightning.callbacks.gradient_accumulation_scheduler": "GradientAccumulationScheduler",
    "pytorch_lightning.callbacks.lr_monitor": "LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.progress": "ProgressBar ProgressBarBase",
    "pytorch_lightning.callbacks.progress.tqdm_progress": "TQDMProgressBar",
    "pytorch_lightning.callbacks.stochastic_weight_avg": "StochasticWeightAveraging",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "pytorch_lightning.utilities.enums": "LightningEnum GradClipAlgorithmType",
    "pytorch_lightning.trainer.states": "TrainerFn TrainerStatus RunningStage",
    # callbacks and schedulers of the original training script
    "main": "CUDACallback ImageLogger SetupCallback",
    "__main__": "CUDACallback ImageLogger SetupCallback",
    "ldm.lr_scheduler": (
        "LambdaLinearScheduler LambdaWarmUpCosineScheduler LambdaWarmUpCosineScheduler2"
    ),
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
    "argparse": "Namespace",
    "builtins": "bool bytes dict float int list object str tuple",
    "numpy": "ndarray",
    "torch": "Tensor",
    "torch.nn.parameter": "Parameter",
    "typing": "Any",
}


def read_pickle(path: Path) -> Any:
    """Read a ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file that torch wrote.

    Args:
        path: In the archive form of torch 1.6 and later, or in the form before it.

    Returns:
        What lies in it: dictionaries, lists, numbers and texts, with a `StoredTensor` for each
        tensor, whose values are not read yet, a `ParameterDict`, and a `StandIn` for objects of
        other known classes.

    Raises:
        CheckpointError: If the file is damaged, claims what it does not hold, or names anything
            that is not known to be harmless; the message names it. Nothing in it is run.
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, io.SEEK_END) == 0:
                raise CheckpointError(f"{path}: is empty")
            file.seek(0)
            archive = file.read(4) == b"PK\x03\x04"
            content = _read_archive(path, file) if archive else _read_legacy(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    check_readings(path, _tensors(content))
    return content


def _read_archive(path: Path, file: io.BufferedReader) -> Any:
    archive = StoredArchive(path, file)
    roots = [n.removesuffix("data.pkl") for n in archive.names if n.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one of torch's: no data.pkl in it")
    root = roots[0]
    order = f"{root}byteorder"
    if order in archive.names and archive.read(order, limit=16) != b"little":
        raise CheckpointError(f"{path}: its numbers are not little-endian")
    reader = _Reader(path)
    content, length = reader.run(program := archive.read(f"{root}data.pkl", limit=_MOST_BYTES))
    if length != len(program):
        raise CheckpointError(f"{path}: something follows the end of its pickle")
    for storage in reader.storages.values():
        storage.start, size = archive.locate(f"{root}data/{storage.key}")
        if size != storage.size:
            raise CheckpointError(
                f"{path}: storage {storage.key[:80]!r} is said to have {storage.elements:,}"
                f" elements of {storage.dtype.itemsize} bytes, but {size:,} bytes are there"
            )
    return content


def _read_legacy(path: Path, file: io.BufferedReader) -> Any:
    """Read the form before torch 1.6: several pickles, and then one storage after the other."""
    reader, position = _Reader(path), 0

    def following() -> Any:
        nonlocal position
        file.seek(position)
        content, length = reader.run(file.read(_MOST_BYTES))
        position += length
        return content

    try:
        magic = following()
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: no file of torch's: {reason}") from None
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(f"{path}: no file of torch's: a pickle without its mark")
    if following() != _LEGACY_VERSION:
        raise CheckpointError(f"{path}: of a version of torch's old form that is not known")
    system = following()
    if not isinstance(system, dict) or cast(Any, system).get("little_endian") is not True:
        raise CheckpointError(f"{path}: its numbers are not little-endian")
    content, keys = following(), following()
    if not isinstance(keys, list):
        raise CheckpointError(f"{path}: the list of its storages is damaged")
    whole, placed = file.seek(0, io.SEEK_END), set[str]()
    for key in cast(list[Any], keys):
        storage = reader.storages.get(key) if isinstance(key, str) else None
        file.seek(position)
        elements = int.from_bytes(file.read(8), "little", signed=True)
        if storage is None or elements != storage.elements:
            raise CheckpointError(f"{path}: storage {str(key)[:80]!r} is not what its tensors say")
        storage.start = position + 8
        position = storage.start + storage.size
        if position > whole:
            raise CheckpointError(f"{path}: ends before its storages do; is it truncated?")
        placed.add(storage.key)
    if missing := reader.storages.keys() - placed:
        raise CheckpointError(f"{path}: has no storage {min(missing)[:80]!r}")
    return content


def _tensors(content: Any) -> Iterator[StoredTensor]:
    """Every tensor, as often as it stands in a container; of each container once."""
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, dict | list | tuple | ParameterDict) and id(value) not in seen:
            seen.add(id(cast(object, value)))
            items = value.parameters if isinstance(value, ParameterDict) else cast(Any, value)
            pending.extend(items.values() if isinstance(items, dict) else items)


class ParameterDict:
    """A ``torch.nn.ParameterDict``, of which nothing is kept but what lies in it.

    Attributes:
        parameters: By name; nothing as yet says that they are tensors.
    """

    def __init__(self) -> None:
        self.parameters: dict[Any, Any] = {}

    def set_state(self, state: Any) -> None:
        """Take the parameters of a module's state; they are not copied."""
        parameters = cast(Any, state).get("_parameters") if isinstance(state, dict) else None
        if not isinstance(parameters, dict):
            raise Malformed("a ParameterDict is malformed")
        self.parameters = cast(dict[Any, Any], parameters)


class _Reader:
    """Runs the pickles of one file, and keeps what storages they speak of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}
        self._stand_ins: dict[str, StandIn] = {}
        self._expanded = 0
        plain: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _dictionary,
            "collections.Counter": _dictionary,
            "collections.defaultdict": lambda _=None, *items: _dictionary(*items),
            "builtins.set": lambda items=(): set(_hashable(items)),
            "builtins.frozenset": lambda items=(): frozenset(_hashable(items)),
            "builtins.bytearray": _bytes,
            "_codecs.encode": _encode,
            "copyreg._reconstructor": lambda *_: StandIn("an object"),
            "torch.Size": lambda items=(): tuple(_sequence(items)),
            "torch.device": lambda kind, index=None: _device(kind, index),
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch.nn.modules.container.ParameterDict": lambda: ParameterDict(),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "numpy.dtype": lambda name=None, *_: _NumpyType(name),
        }
        for module in ("pathlib", "pathlib._local"):
            plain[f"{module}.PosixPath"] = lambda *parts: _path("/", parts)
            plain[f"{module}.WindowsPath"] = lambda *parts: _path("\\", parts)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            plain[f"{module}.scalar"] = _number
            plain[f"{module}._reconstruct"] = lambda *_: StandIn("numpy.ndarray")
        self._functions = plain

    def run(self, program: bytes) -> tuple[Any, int]:
        """Return what a pickle makes, and its length."""
        try:
            return run(program, self._find, self._load)
        except CheckpointError:
            raise
        except Malformed as error:
            raise CheckpointError(f"{self.path}: refused: in its pickle, {error}") from None
        # pickletools raises what it pleases, and so does Python where arguments do not fit
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.path}: damaged pickle: {told}") from None

    def _find(self, module: str, name: str) -> Any:
        # as the protocols of Python 2, which torch writes, call them; and as Lightning 2 does
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if function := self._functions.get(full):
            return function
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        inert = _INERT.get(module.replace("lightning.pytorch.", "pytorch_lightning.", 1), "")
        if name in inert.split():
            return self._stand_ins.setdefault(full, StandIn(full))
        told = full if full.isprintable() and len(full) <= 80 else f"{ascii(full[:80])}…"
        raise CheckpointError(
            f"{self.path}: refused: it names {told}, which a file of weights does not need; nothing"
            " of it was run"
        )

    def _load(self, pid: Any) -> Any:
        parts = cast(tuple[Any, ...], pid) if isinstance(pid, tuple) else ()
        if len(parts) == 4 and parts[0] == "module":
            return parts[1]  # a class that was named before, here with its source beside it
        return self._storage(parts)

    def _storage(self, parts: tuple[Any, ...]) -> Storage:
        if len(parts) < 5:
            raise Malformed("a reference to a storage is malformed")
        mark, dtype, key, _, elements = parts[:5]
        if (
            mark != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or not _is_count(elements)
        ):
            raise Malformed("a reference to a storage is malformed")
        if len(parts) > 5 and parts[5] is not None:
            raise Malformed("a storage that is a part of another is not supported")
        storage = self.storages.setdefault(key, Storage(key, dtype, elements))
        if (storage.dtype, storage.elements) != (dtype, elements):
            raise Malformed(f"storage {key[:80]!r} is described in two ways")
        return storage

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: Any = None
    ) -> StoredTensor:
        if (
            not isinstance(storage, Storage)
            or not _is_count(offset)
            or not _are_counts(shape)
            or not _are_counts(stride)
            or len(shape) != len(stride)
        ):
            raise Malformed("a tensor is malformed")
        kind = dtype or storage.dtype
        elements = storage.size // kind.itemsize
        length, count = extent(shape, stride), math.prod(shape)
        if count > elements:
            self._expanded += count
        if (offset + length > elements and length) or self._expanded > MOST_EXPANDED:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {shape} does not fit into its storage of"
                f" {elements:,} elements"
            )
        return StoredTensor(self.path, kind, shape, stride, offset * kind.itemsize, storage)

    def _typed_tensor(self, *arguments: Any) -> StoredTensor:
        if len(arguments) < 7 or not isinstance(arguments[6], torch.dtype):
            raise Malformed("a tensor is malformed")
        return self._tensor(*arguments[:4], dtype=arguments[6])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _are_counts(values: Any) -> bool:
    if not isinstance(values, tuple):
        return False
    counts = cast(tuple[Any, ...], values)
    return len(counts) <= _MOST_DIMENSIONS and all(map(_is_count, counts))


def _sequence(items: Any) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise Malformed(f"a {type(items).__name__} where a list belongs")
    return list(cast(Iterable[Any], items))


def _hashable(items: Any) -> list[Any]:
    found = _sequence(items)
    if not all(isinstance(item, str | int | float | bytes) for item in found):
        raise Malformed("a set of something else than numbers and texts")
    return found


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(cast(dict[Any, Any], items))
    pairs = [_sequence(pair) for pair in _sequence(items)]
    if not all(len(pair) == 2 for pair in pairs):
        raise Malformed("a dictionary of something else than pairs")
    keys = _hashable([key for key, _ in pairs])
    return dict(zip(keys, (value for _, value in pairs), strict=True))


def _bytes(*arguments: Any) -> bytes:
    if len(arguments) > 1 or not all(isinstance(a, bytes) for a in arguments):
        raise Malformed("a bytearray is to be made of something else than bytes")
    return b"".join(arguments)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Malformed("bytes in an encoding that torch does not use")
    return text.encode(encoding)


def _device(kind: Any, index: Any) -> str:
    if not isinstance(kind, str) or not (index is None or _is_count(index)):
        raise Malformed("a device is malformed")
    return kind if index is None else f"{kind}:{index}"


def _path(separator: str, parts: tuple[Any, ...]) -> str:
    if len(parts) > 64 or not all(isinstance(part, str) and len(part) < 256 for part in parts):
        raise Malformed("a path is malformed")
    return separator.join(parts).replace(separator * 2, separator)


class _NumpyType:
    """A numpy data type by its name."""

    def __init__(self, name: object) -> None:
        self.name = name if isinstance(name, str) and name in _NUMPY_NUMBERS else None

    def set_state(self, state: Any) -> None:
        """Forget the type if its numbers are big-endian."""
        if isinstance(state, tuple) and cast(tuple[Any, ...], state)[1:2] == (">",):
            self.name = None


def _number(kind: Any, data: Any = b"") -> Any:
    """A numpy scalar as a number of Python's."""
    if not isinstance(kind, _NumpyType) or kind.name is None:
        return StandIn("a number of numpy's")
    if not isinstance(data, bytes):
        raise Malformed("a number of numpy's is malformed")
    return np.frombuffer(data, dtype=np.dtype(f"<{kind.name}"), count=1)[0].item()
