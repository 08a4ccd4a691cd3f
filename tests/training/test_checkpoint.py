"""Checkpoints are whole or not at all."""

from pathlib import Path

import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    list_checkpoints,
    newest_checkpoint,
    restore_optimizer,
    restore_or_begin,
    save_checkpoint,
)


def save(folder, step):
    return save_checkpoint(folder, step, {"w": {"a": torch.full((4,), float(step))}}, {"s": step})


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    checkpoint, damaged = newest_checkpoint(tmp_path)
    assert damaged == []
    assert checkpoint.step == 7 and checkpoint.values == {"s": 7}
    assert torch.equal(checkpoint.tensors["w"]["a"], torch.full((4,), 7.0))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-9", "step-10"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / ("state.json" if damage == "state" else "w.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    checkpoint, sentences = newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(sentences) == 1 and str(newest) in sentences[0]


def test_going_back_behind_a_damaged_one_keeps_what_is_new(tmp_path):
    save(tmp_path, 50)
    (save(tmp_path, 100) / "w.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 60, {"w": {"a": torch.zeros(1)}}, {}, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-60"]


def test_one_from_before_what_may_be_bad_stays_beside_the_newest(tmp_path):
    """And the next that may become one; however often one is saved, it does not stay behind."""
    kept: list[list[str]] = []
    for step, well_until in ((10, 0), (20, 10), (30, 10), (40, 10), (50, 35), (60, 45)):
        tensors = {"w": {"a": torch.zeros(1)}}
        save_checkpoint(tmp_path, step, tensors, {}, keep=1, well_until=well_until)
        kept.append([p.name.removeprefix("step-") for p in list_checkpoints(tmp_path)])
    assert kept[:3] == [["10"], ["10", "20"], ["10", "20", "30"]]
    assert kept[3:] == [["10", "20", "40"], ["20", "40", "50"], ["40", "50", "60"]]


def test_what_is_damaged_is_passed_by_also_on_the_way_back(tmp_path):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, {"w": {"a": torch.zeros(1)}}, {}, keep=9)
    (tmp_path / "step-20" / "w.safetensors").write_bytes(b"")
    found, damaged = newest_checkpoint(tmp_path, until=29)
    assert found is not None and found.step == 10 and "step-20" in damaged[0]
    (tmp_path / "step-10" / "w.safetensors").write_bytes(b"")
    found, damaged = newest_checkpoint(tmp_path, until=29)
    assert found is not None and found.step == 30 and len(damaged) == 2


def test_the_same_step_is_saved_anew(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"w": {"a": torch.zeros(1)}}, {"s": 6})
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.values == {"s": 6}
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "w.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
        newest_checkpoint(tmp_path)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-2.99.tmp").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1"]


def test_optimizer_state_continues_exactly():
    def run(steps, optimizer, parameter, start=0):
        for k in range(start, start + steps):
            parameter.grad = torch.sin(torch.arange(5.0) + k)
            optimizer.step()

    whole = torch.nn.Parameter(torch.zeros(5))
    run(10, torch.optim.AdamW([whole], lr=0.1), whole)

    first = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([first], lr=0.1)
    run(6, optimizer, first)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = torch.optim.AdamW([second], lr=0.1)
    restore_optimizer(resumed, flatten_optimizer(optimizer))
    run(4, resumed, second, start=6)
    assert torch.equal(whole, second)


def test_an_optimizer_that_begins_anew_forgets_what_it_had():
    """A run that goes back to weights that were carried has the moments that made it go back."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert restore_or_begin(optimizer, Checkpoint(4, {}, {}, Path("carried"))) == 4
    assert flatten_optimizer(optimizer) == {}
    with torch.no_grad():
        parameter.zero_()
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(parameter, torch.full((3,), -0.1))
