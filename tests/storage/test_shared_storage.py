"""Tensors over one storage: tied weights and averages are read, multiplied memory is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import open_tensors
from mezzotint.storage.unpickle import read_pickle

FORMS = pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
BASE = torch.arange(1 << 17, dtype=torch.float32)


def saved(path: Path, state: dict[str, Any], archive: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    return path


@FORMS
def test_tied_weights_averages_and_parts(tmp_path: Path, archive: bool) -> None:
    rows = BASE.view(128, 1024)
    tied = {"embed": rows, "head": rows.detach(), "transposed": rows.t(), "again": rows}
    average = {"model_ema.embed": rows.clone(), "model_ema.head": rows.clone()}
    parts = {f"part.{n}": row for n, row in enumerate(BASE.clone().split(1024))}
    state = tied | average | parts
    found = open_tensors(saved(tmp_path / "a.ckpt", {"state_dict": state}, archive)).read()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@FORMS
@pytest.mark.parametrize("views", ["views", "shifted", "one object", "nested"])
def test_a_storage_that_is_read_too_often(tmp_path: Path, archive: bool, views: str) -> None:
    names = [f"w{n}" for n in range(300)]
    state: dict[str, Any] = {
        "views": lambda: {name: BASE.view(2, -1) for name in names},
        "shifted": lambda: {name: BASE[n:] for n, name in enumerate(names)},
        "one object": lambda: dict.fromkeys(names, BASE),
        "nested": lambda: {"state_dict": dict.fromkeys(names[:3], BASE), "more": [BASE, BASE]},
    }[views]()
    path = saved(tmp_path / "a.ckpt", state, archive)
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: refused: its tensors read storage ")
    assert told.endswith(" of 131,072 elements more than 4 times over")


def test_an_expanded_tensor_of_many_names(tmp_path: Path) -> None:
    wide = torch.zeros(1).expand(1 << 20)
    open_tensors(saved(tmp_path / "a.ckpt", {"a": wide, "b": wide}))
    path = saved(tmp_path / "b.ckpt", {f"w{n}": wide for n in range(100)})
    with pytest.raises(CheckpointError, match="of 1 elements more than 4 times over"):
        read_pickle(path)


def test_small_ones_may_be_shared_as_often_as_it_pleases(tmp_path: Path) -> None:
    step = torch.tensor(7)
    state = {f"step.{n}": step for n in range(1000)}
    assert len(open_tensors(saved(tmp_path / "a.ckpt", state))) == 1000
