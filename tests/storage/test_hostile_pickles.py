"""Hostile and damaged pickles are refused by name, run nothing, and take little memory."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.storage.unpickle import read_pickle

Hostile = Callable[[Path, Path], None]  # where to write, and a file that must not appear
HOSTILE: dict[str, tuple[Hostile, str]] = {}


def hostile(reason: str) -> Callable[[Hostile], Hostile]:
    def add(build: Hostile) -> Hostile:
        HOSTILE[build.__name__] = (build, reason)
        return build

    return add


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def honest() -> dict[str, Any]:
    return {"w": torch.arange(256.0), "b": torch.arange(8.0)}


def packed(path: Path, program: bytes, *, storages: dict[str, bytes] | None = None, **more: bytes):
    """Write an archive in torch's form around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in more.items():
            file.writestr(f"archive/{name}", data)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0", count: int = 4) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(of: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes = b"".join([b"(", *map(number, shape), b"t", b"(", *map(number, stride), b"t"])
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + number(offset) + sizes + b"\x89}tR"


FOUR = {"0": b"\0" * 16}


def of_tensor(path: Path, program: bytes) -> None:
    packed(path, b"\x80\x02" + program + b".", storages=FOUR)


@hostile("is empty")
def empty(path: Path, _: Path) -> None:
    path.touch()


@hostile("no file of torch's")
def text_file(path: Path, _: Path) -> None:
    path.write_text("<html>404: not found</html>\n" * 100)


@hostile("no file of torch's")
def noise(path: Path, _: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


@hostile("no file of torch's: a pickle without its mark")
def plain_pickle(path: Path, _: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0, 2.0]}))


@hostile("is it truncated?")
def half_an_archive(path: Path, _: Path) -> None:
    torch.save(honest(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@hostile("is it truncated?")
def archive_without_its_last_bytes(path: Path, _: Path) -> None:
    torch.save(honest(), path)
    path.write_bytes(path.read_bytes()[:-30])


@hostile("refused: it names posix.system")
def shell_command(path: Path, canary: Path) -> None:
    packed(path, pickle.dumps({"w": Call(os.system, f"touch {canary}")}, 2))


@hostile("no file of torch's: refused: it names posix.system")
def shell_command_in_the_old_form(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {canary}"), 2))


@hostile("refused: it names posix.system")
def shell_command_among_the_old_forms_pickles(path: Path, canary: Path) -> None:
    file = io.BytesIO()
    torch.save(honest(), file, _use_new_zipfile_serialization=False)
    head = file.getvalue()[: file.getvalue().index(b"}q") - 2]
    path.write_bytes(head + pickle.dumps(Call(os.system, f"touch {canary}"), 2))


@hostile("refused: it names builtins.eval")
def evaluated_text(path: Path, canary: Path) -> None:
    packed(path, pickle.dumps(Call(eval, f"open({str(canary)!r}, 'w')"), 4))


@hostile("refused: it names builtins.getattr")
def attribute_of_a_module(path: Path, _: Path) -> None:
    packed(path, pickle.dumps(Call(getattr, torch.Size, "mro"), 2))


@hostile("refused: it names subprocess.Popen")
def new_object_of_a_class(path: Path, canary: Path) -> None:
    packed(path, b"\x80\x02csubprocess\nPopen\n(" + text(f"touch {canary}") + b"t\x81.")


@hostile("refused: it names torch.hub.load")
def function_of_torch(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02ctorch.hub\nload\n(" + text("evil/repo") + b"tR.")


@hostile("refused: it names torch.storage.sys.modules")
def dotted_name(path: Path, _: Path) -> None:
    dotted = b"\x8c\x0dtorch.storage\x8c\x0bsys.modules\x93"
    packed(path, b"\x80\x04" + dotted + b".")


@hostile("the instruction INST")
def old_instruction(path: Path, canary: Path) -> None:
    packed(path, b"(S'touch " + str(canary).encode() + b"'\nios\nsystem\n.")


@hostile("the instruction EXT1")
def extension_registry(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02\x82\x01.")


@hostile("the instruction PERSID")
def reference_in_text(path: Path, _: Path) -> None:
    packed(path, b"Pstorage\n.")


@hostile("it changes a function")
def changed_function(path: Path, _: Path) -> None:
    state = b"N}" + text("_function") + number(1) + b"s\x86b"
    packed(path, b"\x80\x02ccollections\nOrderedDict\n" + state + b".")


@hostile("said to have 1,000,000 elements of 4 bytes, but 16 bytes are there")
def storage_that_lies(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(count=1_000_000), 0, (1_000_000,), (1,)))


@hostile("does not fit into its storage of 4 elements")
def tensor_larger_than_its_storage(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), 0, (5,), (1,)))


@hostile("does not fit into its storage")
def tensor_beyond_its_storage(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), 2, (3,), (1,)))


@hostile("does not fit into its storage")
def tensor_of_one_number_a_trillion_times(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), 0, (1 << 40,), (0,)))


@hostile("a tensor is malformed")
def negative_offset(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), -2, (2,), (1,)))


@hostile("a tensor is malformed")
def negative_stride(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), 3, (3,), (-1,)))


@hostile("a tensor is malformed")
def more_strides_than_sides(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(), 0, (4,), (1, 1)))


@hostile("has no member 'archive/data/9'")
def storage_that_is_not_there(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(key="9"), 0, (4,), (1,)))


@hostile("a reference to a storage is malformed")
def storage_of_no_type(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(kind=text("FloatStorage")), 0, (4,), (1,)))


@hostile("has no member 'archive/data/../../secret'")
def storage_out_of_the_archive(path: Path, _: Path) -> None:
    of_tensor(path, tensor(storage(key="../../secret"), 0, (4,), (1,)))


@hostile("a bytearray is to be made of something else")
def bytearray_of_a_terabyte(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02cbuiltins\nbytearray\n" + number(1 << 40) + b"\x85R.")


@hostile("it remembers nothing under")
def memory_of_nothing(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFF0) + b"j" + b"\0" * 4 + b".")


@hostile("it changes a StoredTensor")
def changed_tensor(path: Path, _: Path) -> None:
    state = b"}" + text("shape") + number(1 << 40) + b"\x85sb"
    of_tensor(path, tensor(storage(), 0, (4,), (1,)) + state)


@hostile("it changes a Storage")
def changed_storage(path: Path, _: Path) -> None:
    of_tensor(
        path, tensor(storage() + b"}" + text("elements") + number(1 << 40) + b"sb", 0, (4,), (1,))
    )


@hostile("a tuple where only a number or a text can stand")
def key_that_takes_forever_to_hash(path: Path, _: Path) -> None:
    double = b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60))
    packed(path, b"\x80\x02K\x01q\0" + double + b"}h\x3cNs.")


@hostile("a tuple where only a number or a text can stand")
def key_that_is_too_deep_to_hash(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}(K\x01" + b"\x85" * 900_000 + b"Nu.")


@hostile("it makes more than 1,000,000 objects")
def copies_of_a_long_list(path: Path, _: Path) -> None:
    long = b"](" + b"N" * 400_000 + b"eq\0"
    packed(
        path,
        b"\x80\x02"
        + long
        + b"h\0\x85ctorch\nSize\nq\x010"
        + b"("
        + b"h\x01h\0\x85R" * 25_000
        + b"l.",
    )


@hostile("a device is malformed")
def text_of_doubling_lists(path: Path, _: Path) -> None:
    double = b"".join(
        b"](h" + bytes([k]) + b"h" + bytes([k]) + b"eq" + bytes([k + 1]) for k in range(40)
    )
    packed(path, b"\x80\x02]q\0" + double + b"ctorch\ndevice\nh\x28\x85R.")


@hostile("a whole number of more than 64 bytes")
def number_of_many_digits(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02\x8b" + struct.pack("<I", 4000) + b"\x7f" * 4000 + b".")


@hostile("it calls a dict")
def called_dictionary(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02})R.")


@hostile("is it truncated?")
def directory_that_lies_of_its_place(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    end = data.index(b"PK\x05\x06")
    data[end + 16 : end + 20] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(data)


@hostile("refused: it names 'os.\\x1b[2J\\nsystem'")
def name_that_clears_the_screen(path: Path, _: Path) -> None:
    packed(path, b"\x80\x04\x8c\x02os\x8c\x0b\x1b[2J\nsystem\x93.")


@hostile("it makes more than 1,000,000 objects")
def millions_of_objects(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02(" + b"}" * 2_000_000 + b"l.")


@hostile("damaged pickle")
def string_longer_than_the_file(path: Path, _: Path) -> None:
    packed(path, b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")


@hostile("damaged pickle")
def pickle_without_an_end(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}")


@hostile("something follows the end of its pickle")
def two_pickles(path: Path, canary: Path) -> None:
    packed(path, b"\x80\x02}." + pickle.dumps(Call(os.system, f"touch {canary}"), 2))


@hostile("'archive/data.pkl' is compressed")
def zip_bomb(path: Path, _: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data.pkl", "w") as member,
    ):
        for _ in range(1000):
            member.write(b"\0" * (1 << 20))


@hostile("'archive/../../evil' is named like a path out of the archive")
def path_escape(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.", **{"../../evil": b"x"})


@hostile("'/etc/evil' is named like a path out of the archive")
def absolute_path(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("/etc/evil", b"x")


@hostile("'archive/data.pkl' is there twice")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def member_twice(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data.pkx", b"\x80\x02].")
    path.write_bytes(path.read_bytes().replace(b"data.pkx", b"data.pkl"))


@hostile("is encrypted")
def encrypted(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


@hostile("is not where the archive says")
def misplaced_member(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.", storages=FOUR)
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[data.index(b"PK\x01\x02") + 42 : data.index(b"PK\x01\x02") + 46] = data[
        second + 42 : second + 46
    ]
    path.write_bytes(data)


@hostile("its directory has")
def directory_of_a_gigabyte(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    end = data.index(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", 1 << 30)
    path.write_bytes(data)


@hostile("no data.pkl in it")
def archive_of_something_else(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", b"<xml/>")


@hostile("not little-endian")
def big_endian(path: Path, _: Path) -> None:
    packed(path, b"\x80\x02}.", byteorder=b"big")


@hostile("is it truncated?")
def truncated_old_form(path: Path, _: Path) -> None:
    torch.save(honest(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


@hostile("is not what its tensors say")
def old_form_whose_storage_lies(path: Path, _: Path) -> None:
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20] + struct.pack("<q", 1 << 40) + b"\0" * 12)


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_and_damaged_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    build, reason = HOSTILE[name]
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    build(path, canary)
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message
    assert not canary.exists()


def test_refusing_takes_little_memory(tmp_path: Path) -> None:
    """All of them in one process, torch included."""
    paths = [str(tmp_path / f"{name}.ckpt") for name in HOSTILE]
    for (build, _), path in zip(HOSTILE.values(), paths, strict=True):
        build(Path(path), tmp_path / "canary")
    code = f"""
from pathlib import Path
from mezzotint.storage.unpickle import read_pickle
from mezzotint.errors import CheckpointError
refused = 0
for path in {paths!r}:
    try:
        read_pickle(Path(path))
    except CheckpointError:
        refused += 1
status = Path("/proc/self/status").read_text()
print(refused, status.partition("VmHWM:")[2].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, peak = map(int, done.stdout.split())
    assert refused == len(HOSTILE) >= 30
    assert peak < 500_000  # KiB; the torch in it takes half
    assert not (tmp_path / "canary").exists()
