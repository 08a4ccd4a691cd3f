"""Pickles of torch's, read without running what they say.

A pickle is a program, and whoever wrote it may name any function of any installed package. Here the
names that it may use stand in a closed table, and none of them does more than to note numbers:
tensors become `StoredTensor`, objects of the training framework become inert stand-ins, and any
other name is refused. What the file says of sizes is held against the file before it is believed.
"""

import codecs
import collections
import io
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Never, cast

import numpy as np
import torch
from torch import Tensor

from mezzotint.checkpoints.archive import StoredArchive
from mezzotint.errors import CheckpointError

__all__ = ["StandIn", "StoredTensor", "read_pickle"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# The longest pickle of a real checkpoint, with the state of an optimizer, has some 500,000
# instructions in some 5 MB; an instruction makes an object of 200 bytes at the most.
_MOST_INSTRUCTIONS, _MOST_BYTES = 1_000_000, 64 << 20
_MOST_DIMENSIONS = 8
_REFUSED_INSTRUCTIONS = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER"}

_STORAGES: dict[str, torch.dtype] = {
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
}
_DTYPES: dict[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in _STORAGES.values()}
# Numbers that Lightning keeps are often numpy's; more kinds than these become stand-ins.
_NUMPY_NUMBERS = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"}

# modules as the protocols of Python 2, which torch writes, call them
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# What may stand in a file of weights without being a weight, and is of no use here: an object of
# one of these classes becomes a `StandIn`.
_INERT: Mapping[str, frozenset[str]] = {
    "pytorch_lightning.callbacks.early_stopping": frozenset({"EarlyStopping"}),
    "pytorch_lightning.callbacks.gradient_accumulation_scheduler": frozenset(
        {"GradientAccumulationScheduler"}
    ),
    "pytorch_lightning.callbacks.lr_monitor": frozenset({"LearningRateMonitor"}),
    "pytorch_lightning.callbacks.model_checkpoint": frozenset({"ModelCheckpoint"}),
    "pytorch_lightning.callbacks.progress": frozenset({"ProgressBar", "ProgressBarBase"}),
    "pytorch_lightning.callbacks.progress.tqdm_progress": frozenset({"TQDMProgressBar"}),
    "pytorch_lightning.callbacks.stochastic_weight_avg": frozenset({"StochasticWeightAveraging"}),
    "pytorch_lightning.utilities.parsing": frozenset({"AttributeDict"}),
    "pytorch_lightning.utilities.enums": frozenset({"LightningEnum", "GradClipAlgorithmType"}),
    "pytorch_lightning.trainer.states": frozenset({"TrainerFn", "TrainerStatus", "RunningStage"}),
    # callbacks of the original training script
    "main": frozenset({"CUDACallback", "ImageLogger", "SetupCallback"}),
    "__main__": frozenset({"CUDACallback", "ImageLogger", "SetupCallback"}),
    "ldm.lr_scheduler": frozenset(
        {"LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2"}
    ),
    "omegaconf.base": frozenset({"ContainerMetadata", "Metadata"}),
    "omegaconf.dictconfig": frozenset({"DictConfig"}),
    "omegaconf.listconfig": frozenset({"ListConfig"}),
    "omegaconf.nodes": frozenset(
        {"AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"}
    ),
    "argparse": frozenset({"Namespace"}),
    "builtins": frozenset(
        {"bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple"}
    ),
    "numpy": frozenset({"ndarray"}),
    "torch": frozenset({"Tensor"}),
    "torch.nn.parameter": frozenset({"Parameter"}),
    "typing": frozenset({"Any"}),
}


class StandIn:
    """Where an object of a class stood that is of no use here; it takes whatever it is given."""

    def __new__(cls, *_: object, **__: object) -> "StandIn":
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Let go of it."""

    def extend(self, _: object) -> None:
        """Let go of them."""

    def add(self, _: object) -> None:
        """Let go of it."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that lies in a file, as the file describes it.

    Attributes:
        dtype: Of its numbers.
        shape: Its shape.
        stride: Steps in its storage, in elements.
        start: Where it begins, in bytes from the start of the file.
        file: The mapped file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    file: mmap.mmap

    def read(self) -> Tensor:
        """Return the tensor; its memory is the file's, copied page by page where it is changed."""
        extent = _extent(self.shape, self.stride)
        if extent == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(self.file, dtype=self.dtype, count=extent, offset=self.start)
        return flat.as_strided(self.shape, self.stride)


def read_pickle(path: Path) -> Any:
    """Read a ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file that torch wrote.

    Args:
        path: In the archive form of torch 1.6 and later, or in the form before it.

    Returns:
        What lies in it: dictionaries, lists, numbers and strings, with a `StoredTensor` for each
        tensor, whose values are not read yet, and a `StandIn` for objects of known classes.

    Raises:
        CheckpointError: If the file is damaged, claims what it does not hold, or names anything
            that is not known to be harmless; the message names it. Nothing in it is run.
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, io.SEEK_END) == 0:
                raise CheckpointError(f"{path}: is empty")
            # private: what is written into a tensor does not reach the disk
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        if mapped[:4] == b"PK\x03\x04":
            return _read_archive(path, mapped)
        return _read_legacy(path, mapped)
    except CheckpointError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _read_archive(path: Path, mapped: mmap.mmap) -> Any:
    archive = StoredArchive(path, mapped)
    roots = [n.removesuffix("data.pkl") for n in archive.names if n.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one of torch's: no data.pkl in it")
    root = roots[0]
    order = f"{root}byteorder"
    if order in archive.names and archive.read(order, limit=16) != b"little":
        raise CheckpointError(f"{path}: its numbers are not little-endian")

    def locate(key: str) -> tuple[int, int]:
        return archive.locate(f"{root}data/{key}")

    program = archive.read(f"{root}data.pkl", limit=_MOST_BYTES)
    if _check_program(path, program) != len(program):
        raise CheckpointError(f"{path}: something follows the end of its pickle")
    return _Reader(path, program, mapped, locate).load()


def _read_legacy(path: Path, mapped: mmap.mmap) -> Any:
    """Read the form before torch 1.6: several pickles, and then one storage after the other."""
    position = 0

    def following(locate: "Callable[[str], tuple[int, int]] | None" = None) -> Any:
        nonlocal position
        program = mapped[position : position + _MOST_BYTES]
        length = _check_program(path, program)
        position += length
        return _Reader(path, program[:length], mapped, locate).load()

    try:
        magic = following()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no file of torch's: {_reason(error, path)}") from None
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(f"{path}: no file of torch's: a pickle without its mark")
    if (version := following()) != _LEGACY_VERSION:
        raise CheckpointError(f"{path}: version {version!r} of torch's old form is not known")
    system = following()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: its numbers are not little-endian")
    # the storages' places are known only after the pickle that refers to them
    places: dict[str, tuple[int, int]] = {}
    content_at = position
    program = mapped[position : position + _MOST_BYTES]
    length = _check_program(path, program)
    position += length
    sizes = _Sizes()
    _Reader(path, program[:length], mapped, None, sizes).load()
    keys = following()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: the list of its storages is damaged")
    for key in cast(list[str], keys):
        count = int.from_bytes(mapped[position : position + 8], "little", signed=True)
        if key not in sizes.bytes_per_element or count != sizes.elements[key]:
            raise CheckpointError(f"{path}: storage {key!r} is not what its tensors say")
        size = count * sizes.bytes_per_element[key]
        if position + 8 + size > len(mapped):
            raise CheckpointError(f"{path}: ends before its storage {key!r} does; is it truncated?")
        places[key] = (position + 8, size)
        position += 8 + size

    def locate(key: str) -> tuple[int, int]:
        if key not in places:
            raise CheckpointError(f"{path}: has no storage {key!r}")
        return places[key]

    return _Reader(path, mapped[content_at : content_at + length], mapped, locate).load()


def _reason(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def _check_program(path: Path, program: bytes) -> int:
    """Return the length of a pickle after going through its instructions, running none.

    Raises:
        CheckpointError: If it is malformed, has instructions that torch does not write, or so many
            that it could only be meant to fill the memory.
    """
    file = io.BytesIO(program)
    count = 0
    try:
        for instruction, argument, _ in pickletools.genops(file):
            count += 1
            if instruction.name in _REFUSED_INSTRUCTIONS:
                raise CheckpointError(
                    f"{path}: refused: its pickle has the instruction {instruction.name}, which"
                    " torch does not write"
                )
            # an entry far outside makes Python reserve the whole table up to it
            place = argument if instruction.name in {"PUT", "LONG_BINPUT"} else 0
            too_far = not isinstance(place, int) or place > _MOST_INSTRUCTIONS
            if count > _MOST_INSTRUCTIONS or too_far:
                raise CheckpointError(
                    f"{path}: refused: its pickle would make more objects than"
                    f" {_MOST_INSTRUCTIONS:,}, which no checkpoint has"
                )
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises what it pleases
        raise CheckpointError(f"{path}: damaged pickle: {error}") from None
    return file.tell()


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file."""

    dtype: torch.dtype
    elements: int
    start: int


class _Sizes:
    """Of the storages that a pickle refers to, while nobody knows yet where they lie."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = {}
        self.bytes_per_element: dict[str, int] = {}


class _Callable:
    """A function that a pickle may call; it has no attributes that the pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> Never:
        raise pickle.UnpicklingError("a function was to be changed")

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names of a closed table and no others."""

    def __init__(
        self,
        path: Path,
        program: bytes,
        mapped: mmap.mmap,
        locate: Callable[[str], tuple[int, int]] | None,
        sizes: _Sizes | None = None,
    ) -> None:
        super().__init__(io.BytesIO(program))
        self._path, self._mapped, self._locate, self._sizes = path, mapped, locate, sizes
        self._stand_ins: dict[str, type[StandIn]] = {}
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): lambda *a: collections.OrderedDict(*a),
            ("collections", "defaultdict"): lambda *a: dict(*a[1:]),
            ("collections", "Counter"): lambda *a: dict(*a),
            ("builtins", "set"): lambda *a: set(*a),
            ("builtins", "bytearray"): _bytearray,
            ("_codecs", "encode"): _encode,
            ("copyreg", "_reconstructor"): lambda *_: StandIn(),
            ("torch", "Size"): lambda *a: tuple(*a),
            ("torch", "device"): lambda *a: str(a[0]),
            ("pathlib", "PosixPath"): lambda *a: str(PurePosixPath(*a)),
            ("pathlib", "WindowsPath"): lambda *a: str(PureWindowsPath(*a)),
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
            **{
                (f"numpy.{core}.multiarray", name): function
                for core in ("core", "_core")
                for name, function in (("scalar", _number), ("_reconstruct", lambda *_: StandIn()))
            },
            ("numpy", "dtype"): _NumpyType.named,
        }

    def load(self) -> Any:
        try:
            return super().load()
        except CheckpointError:
            raise
        # a malformed program can make the unpickler raise nearly anything
        except Exception as error:
            raise CheckpointError(
                f"{self._path}: damaged pickle: {type(error).__name__}: {error}"
            ) from None

    def find_class(self, module: str, name: str, /) -> Any:
        module = _RENAMED.get(module, module)
        # Lightning 2 keeps the classes of Lightning 1 elsewhere
        known = _INERT.get(module.replace("lightning.pytorch.", "pytorch_lightning.", 1), ())
        if function := self._functions.get((module, name)):
            return _Callable(function)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name in known:
            full = f"{module}.{name}"
            return self._stand_ins.setdefault(full, type(name, (StandIn,), {"__module__": module}))
        raise CheckpointError(
            f"{self._path}: refused: it names {module}.{name}, which a file of weights does not"
            " need; nothing of it was run"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(cast(tuple[Any, ...], pid)) < 5
            or pid[0] != "storage"
            or not isinstance(pid[1], torch.dtype)
            or not isinstance(pid[2], str)
            or not _is_count(pid[4])
        ):
            raise pickle.UnpicklingError("a reference to a storage is malformed")
        dtype, key, elements = pid[1], pid[2], pid[4]
        if len(cast(tuple[Any, ...], pid)) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a storage that is a part of another is not supported")
        if self._sizes is not None:
            if self._sizes.elements.setdefault(key, elements) != elements:
                raise CheckpointError(f"{self._path}: storage {key!r} has two sizes")
            self._sizes.bytes_per_element[key] = dtype.itemsize
            return _Storage(dtype, elements, 0)
        if self._locate is None:
            raise pickle.UnpicklingError("a tensor where none belongs")
        start, size = self._locate(key)
        if size != elements * dtype.itemsize:
            raise CheckpointError(
                f"{self._path}: storage {key!r} is said to have {elements:,} elements of"
                f" {dtype.itemsize} bytes, but {size:,} bytes are there"
            )
        return _Storage(dtype, elements, start)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if (
            not isinstance(storage, _Storage)
            or not _is_count(offset)
            or not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not all(
                map(_is_count, (*cast(tuple[Any, ...], shape), *cast(tuple[Any, ...], stride)))
            )
            or len(cast(tuple[Any, ...], shape)) != len(cast(tuple[Any, ...], stride))
            or len(cast(tuple[Any, ...], shape)) > _MOST_DIMENSIONS
        ):
            raise pickle.UnpicklingError("a tensor is malformed")
        sizes, steps = cast(tuple[int, ...], shape), cast(tuple[int, ...], stride)
        extent, elements = (
            _extent(sizes, steps),
            int(np.prod([int(s) for s in sizes], dtype=object)),
        )
        if offset + extent > storage.elements or elements > storage.elements:
            raise CheckpointError(
                f"{self._path}: a tensor of shape {sizes} does not fit into its storage of"
                f" {storage.elements:,} elements"
            )
        start = storage.start + offset * storage.dtype.itemsize
        return StoredTensor(storage.dtype, sizes, steps, start, self._mapped)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements of a storage lie between the first of a tensor and its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _bytearray(*arguments: Any) -> bytearray:
    if not all(isinstance(a, bytes) for a in arguments):
        raise pickle.UnpicklingError("a bytearray is to be made of something else than bytes")
    return bytearray(*arguments)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1", "utf-8", "ascii"}:
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return codecs.encode(text, encoding)


class _NumpyType:
    """A numpy data type by its name."""

    name: object = None

    @classmethod
    def named(cls, name: object = None, *_: object) -> "_NumpyType":
        """Stand for the type of this name."""
        kind = cls()
        kind.name = name
        return kind

    def __setstate__(self, state: object) -> None:
        """Forget the type if its numbers are big-endian."""
        if isinstance(state, tuple) and ">" in cast(tuple[object, ...], state)[1:2]:
            self.name = None


def _number(kind: Any, data: Any = b"") -> Any:
    """A numpy scalar as a number of Python's."""
    if not isinstance(kind, _NumpyType) or kind.name not in _NUMPY_NUMBERS:
        return StandIn()
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a number of numpy's is malformed")
    return np.frombuffer(data, dtype=np.dtype(f"<{kind.name}"), count=1)[0].item()
