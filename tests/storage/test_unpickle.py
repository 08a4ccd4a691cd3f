"""Files of torch's come out as they went in, and what stands beside their tensors is inert."""

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.storage.unpickle import ParameterDict, StandIn, StoredTensor, read_pickle

FORMS = pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])


def read_all(value: Any) -> Any:
    """The same with tensors in place of what is stored."""
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: read_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(read_all(item) for item in value)
    return value


@FORMS
def test_tensors_of_every_kind(tmp_path: Path, archive: bool) -> None:
    torch.manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    kinds += [torch.int16, torch.int8, torch.uint8, torch.bool]
    state: dict[str, Any] = {str(kind): (torch.rand(3, 5) * 9).to(kind) for kind in kinds}
    base = torch.arange(24.0).view(4, 6)
    state |= {
        "transposed": base.t(),
        "row": base[2],
        "strided": base[::2, 1::3],
        "expanded": torch.zeros(2, 0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.rand(2)),
    }
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    found = read_pickle(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found[name].read(), tensor.detach()), name


@FORMS
def test_containers_and_values(tmp_path: Path, archive: bool) -> None:
    value = {
        "epoch": 3,
        "loss": np.float64(0.25),
        "count": np.int64(1 << 40),
        "name": "sd",
        "flags": [True, None, 1.5, b"bytes", (1, 2), {3}],
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "ordered": OrderedDict(a=torch.ones(2)),
        "path": Path("/tmp/x"),
    }
    path = tmp_path / "a.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    found = read_all(read_pickle(path))
    assert torch.equal(found["ordered"].pop("a"), torch.ones(2))
    expected = value | {"size": (2, 3), "device": "cpu", "path": "/tmp/x", "ordered": {}}
    assert found == expected
    assert type(found["loss"]) is float and type(found["count"]) is int


def test_a_module_state_dict_equals_what_torch_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)), path)
    with pytest.raises(CheckpointError, match=r"refused: it names torch\.nn\.modules\.container"):
        read_pickle(path)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    torch.save(network.state_dict(), path)
    known = torch.load(path, weights_only=True)
    found = read_pickle(path)
    assert list(found) == list(known)
    assert all(torch.equal(found[name].read(), known[name]) for name in known)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """Classes where Lightning keeps its own, which is not installed here."""
    made: dict[str, type] = {}
    for full in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "omegaconf.listconfig.ListConfig",
    ):
        module, _, name = full.rpartition(".")
        parents = module.split(".")
        for depth in range(1, len(parents) + 1):
            place = ".".join(parents[:depth])
            monkeypatch.setitem(sys.modules, place, types.ModuleType(place))
        base = dict if name == "AttributeDict" else object
        made[name] = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    return made


@FORMS
def test_what_lightning_leaves_in_a_checkpoint_is_inert(
    tmp_path: Path, lightning: dict[str, type], archive: bool
) -> None:
    settings = lightning["ListConfig"]()
    settings.__dict__ = {"content": [1, 2]}
    value = {
        "state_dict": OrderedDict(w=torch.arange(3)),
        "callbacks": {lightning["ModelCheckpoint"]: {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": lightning["AttributeDict"](lr=1e-4),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "settings": settings,
    }
    path = tmp_path / "last.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    found = read_pickle(path)
    assert found["state_dict"]["w"].read().tolist() == [0, 1, 2]
    assert isinstance(found["hyper_parameters"], StandIn)
    assert isinstance(found["settings"], StandIn) and found["settings"].name.endswith("ListConfig")
    (callback, state), *_ = found["callbacks"].items()
    assert isinstance(callback, StandIn) and callback.name.endswith(".ModelCheckpoint")
    assert state["best_model_score"].read() == 0.5


@FORMS
def test_dictionaries_of_parameters(tmp_path: Path, archive: bool) -> None:
    """The first files of textual inversion have one."""
    path = tmp_path / "a.pt"
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.rand(2, 8))})
    state = {"string_to_param": parameters}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    found = read_pickle(path)["string_to_param"]
    assert isinstance(found, ParameterDict) and list(found.parameters) == ["*"]
    assert torch.equal(found.parameters["*"].read(), parameters["*"])


@pytest.mark.parametrize("state", [[1], {"_parameters": [1]}, {"x": 1}])
def test_damaged_dictionaries_of_parameters(tmp_path: Path, state: Any) -> None:
    class Damaged:
        def __reduce__(self) -> Any:
            return torch.nn.ParameterDict, (), state

    path = tmp_path / "a.pt"
    torch.save({"string_to_param": Damaged()}, path)
    with pytest.raises(CheckpointError, match="a ParameterDict is malformed"):
        read_pickle(path)


@FORMS
def test_numbers_that_stand_for_many(tmp_path: Path, archive: bool) -> None:
    """Embeddings that begin from one vector are saved like that."""
    vector = torch.rand(1, 8)
    path = tmp_path / "a.pt"
    state = {"string_to_param": {"*": vector.expand(4, 8)}}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    found = read_pickle(path)["string_to_param"]["*"].read()
    assert torch.equal(found, vector.expand(4, 8))
    found[0] = 0  # each has memory of its own
    assert torch.equal(found[1:], vector.expand(3, 8))


def test_too_many_numbers_are_not_made_of_few(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    one = torch.rand(1)
    torch.save({str(n): one.expand(1 << 20) for n in range(5)}, path)
    with pytest.raises(CheckpointError, match="does not fit into its storage of 1 elements"):
        read_pickle(path)


def test_changing_a_tensor_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    read_pickle(path)["w"].read().zero_()
    assert path.read_bytes() == before
    assert read_pickle(path)["w"].read().tolist() == [1, 1, 1, 1]
