"""Weights in every layout that component folders come in, as diffusers writes them."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL as TheirAutoencoder

from mezzotint.checkpoints.folder import load_component
from mezzotint.errors import CheckpointError
from mezzotint.storage.safetensors_file import write_safetensors
from mezzotint.storage.tensors import find_weights, open_tensors

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def theirs() -> TheirAutoencoder:
    torch.manual_seed(0)
    return TheirAutoencoder(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
    )


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "safetensors": ({}, f"{STEM}.safetensors"),
    "bin": ({"safe_serialization": False}, f"{STEM}.bin"),
    "fp16": ({"variant": "fp16"}, f"{STEM}.fp16.safetensors"),
    "fp16-bin": ({"variant": "fp16", "safe_serialization": False}, f"{STEM}.fp16.bin"),
    "parts": ({"max_shard_size": "200KB"}, f"{STEM}.safetensors.index.json"),
    "parts-bin": (
        {"max_shard_size": "200KB", "safe_serialization": False},
        f"{STEM}.bin.index.json",
    ),
    "parts-fp16": (
        {"max_shard_size": "200KB", "variant": "fp16"},
        f"{STEM}.safetensors.index.fp16.json",
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_folders_that_diffusers_wrote(
    tmp_path: Path, theirs: TheirAutoencoder, layout: str
) -> None:
    options, name = LAYOUTS[layout]
    theirs.save_pretrained(tmp_path, **options)
    assert find_weights(tmp_path, STEM).name == name
    tensors = open_tensors(tmp_path / name)
    assert len(tensors.paths) > 1 if "parts" in layout else len(tensors.paths) == 1
    state = theirs.state_dict()
    assert {n: i.shape for n, i in tensors.items()} == {n: tuple(t.shape) for n, t in state.items()}
    read = tensors.read()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        ours = load_component(tmp_path)
        torch.testing.assert_close(ours.decode(ours.encode(x).mean), theirs(x).sample)


def test_whole_files_come_before_variants_and_safetensors_before_pickles(tmp_path: Path) -> None:
    names = [
        f"{STEM}.safetensors",
        f"{STEM}.fp16.safetensors",
        f"{STEM}.bin",
        f"{STEM}.fp16.bin",
    ]
    for name in names:
        (tmp_path / name).touch()
    for name in names:
        assert find_weights(tmp_path, STEM).name == name
        (tmp_path / name).unlink()
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no such file; there is other\.safetensors"):
        find_weights(tmp_path, STEM)


def test_reading_in_another_precision_leaves_whole_numbers(tmp_path: Path) -> None:
    state = {"w": torch.rand(3), "positions": torch.arange(3)}
    for path in (tmp_path / "a.safetensors", tmp_path / "a.ckpt"):
        if path.suffix == ".ckpt":
            torch.save({"state_dict": state, "global_step": 7}, path)
        else:
            safetensors.torch.save_file(state, path, {"format": "pt", "note": "x"})
        tensors = open_tensors(path)
        assert tensors["w"].dtype == torch.float32
        read = tensors.read(torch.bfloat16)
        assert read["w"].dtype == torch.bfloat16
        assert read["positions"].tolist() == [0, 1, 2]
    assert tensors.beside == {"global_step": 7}
    assert open_tensors(tmp_path / "a.safetensors").metadata == {"format": "pt", "note": "x"}


def test_some_tensors_alone(tmp_path: Path) -> None:
    state = {"a.w": torch.rand(3, 4).half(), "a.b": torch.rand(2).half(), "n": torch.arange(5)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        tensors = open_tensors(path)
        read = tensors.read(torch.float32, ["n", "a.w"])
        assert list(read) == ["n", "a.w"] and read["a.w"].dtype == torch.float32
        assert torch.equal(read["a.w"], state["a.w"].float())
        alone = tensors.select(["a.b"])
        assert list(alone) == ["a.b"] and torch.equal(alone.read()["a.b"], state["a.b"])
        whole = tensors.read(torch.bfloat16)
        # they pass through one piece of memory, and none keeps it
        assert all(torch.equal(whole[n], state[n].bfloat16()) for n in ("a.w", "a.b"))


def test_what_we_write_is_what_the_package_writes(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    state = {str(kind): (torch.rand(3, 5) * 9).to(kind) for kind in kinds}
    state |= {"empty": torch.zeros(0), "scalar": torch.tensor(7.0), "odd": torch.ones(3).half()}
    path, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    entries = [(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in state.items()]
    write_safetensors(path, entries, {"format": "pt"})
    safetensors.torch.save_file(state, theirs, {"format": "pt"})
    for found in (safetensors.torch.load_file(path), open_tensors(theirs).read()):
        assert found.keys() == state.keys()
        assert all(found[n].dtype == t.dtype for n, t in state.items())
        assert all(torch.equal(found[n].double(), t.double()) for n, t in state.items())
    assert open_tensors(path).metadata == {"format": "pt"}
    assert path.stat().st_size == theirs.stat().st_size


def test_a_file_that_shrinks_between_header_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1000)}, path)
    tensors = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is shorter than it was; was it changed?"):
        tensors.read()


def index(weight_map: object) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no index of weights"),
        ("[]", "is no index of weights"),
        (index(["w"]), "is no index of weights"),
        (index({"w": "../../etc/passwd"}), "refused: '../../etc/passwd' is no file beside it"),
        (index({"w": "/etc/passwd"}), "refused: '/etc/passwd' is no file beside it"),
        (index({"w": "a.index.json"}), "refused: 'a.index.json' is no file beside it"),
        (index({"w": "missing.safetensors"}), "missing.safetensors: no such file"),
        (index({"x": "part.safetensors"}), "part.safetensors: has no 'x', as a.index.json says"),
        (index({"w": "part.exe"}), "part.exe: .exe is no format of weights"),
    ],
)
def test_indices_that_lie(tmp_path: Path, content: str, message: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "part.exe").touch()
    (tmp_path / "a.index.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(tmp_path / "a.index.json")
    assert message in str(caught.value)


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TWICE = struct.pack("<Q", 17) + b'{"w": 1, "w": 2 }'
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\xff" * 8, "damaged"),
        (header({"w": ONE}, b"\0" * 4, length=1 << 40), "damaged"),
        (header({"w": ONE}, b"\0" * 3), "damaged"),
        (header({"w": ONE | {"shape": [1 << 40]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"data_offsets": [4, 0]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"data_offsets": [0, 1 << 40]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE, "v": ONE}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"dtype": "PY_OBJECT"}}, b"\0" * 4), "damaged"),
        (header([1, 2]), "damaged"),
        (header({"w": ONE, "v": ONE | {"data_offsets": [8, 12]}}, b"\0" * 12), "damaged"),
        (header({"w": ONE | {"data_offsets": [4, 8]}}, b"\0" * 8), "damaged"),
        (header({"w": ONE | {"data_offsets": [-4, 0]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"shape": [1.0]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"shape": [-1, -1]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"shape": [1] * 99}}, b"\0" * 4), "damaged"),
        (header({"w": ONE | {"shape": [1 << 60, 0]}}, b"\0" * 4), "damaged"),
        (header({"w": ONE, "__metadata__": {"format": 3}}, b"\0" * 4), "damaged"),
        (header({"w": ONE, "__metadata__": "pt"}, b"\0" * 4), "damaged"),
        (header({"w": [1]}, b"\0" * 4), "damaged"),
        (TWICE, "a name stands there twice"),
        (header({"w": ONE}, b"\0" * 8), "its tensors end at byte"),
        (struct.pack("<Q", 8000) + b"[" * 8000, "damaged"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for value in ([torch.ones(1)], {"w": 3}, {"state_dict": {}}, "text"):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="holds no named tensors"):
            open_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"weights",
        b"\x80\x02.",  # ends with nothing on the stack
        b"\x80\x02h\x05.",  # recalls what was never stored
        b"\x80\x02K\x01a.",  # appends to nothing
        b"\x80\x02X\xff\xff\xff\xffab",  # a text longer than the file
        b"PK\x03\x04" + bytes(60),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_file_of_weights_is_told_in_one_line(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    assert len(message) >= len(f"{path}: is empty")
