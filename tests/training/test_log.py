"""What is logged of a step is logged once, whatever a run went through."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from mezzotint.errors import TrainingError
from mezzotint.training.log import RunLog

QUIET = Console(quiet=True)


def steps_of(folder: Path, name: str = "loss") -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if name in row]


def begun(folder: Path, **options: Any) -> RunLog:
    log = RunLog(folder, "run", QUIET, **options)
    log.rewind(-1)
    for step in (10, 20, 30):
        log.numbers(step, {"loss": 1.0 * step})
    return log


def test_rows_after_the_checkpoint_go(tmp_path):
    log = begun(tmp_path)
    log.warn(20, "learning rate", "training diverges")
    log.warn(30, "evaluation", "cannot be evaluated")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as if the process was killed here
    log = RunLog(tmp_path, "run", QUIET)
    log.rewind(10, {"learning rate"})
    log.numbers(20, {"loss": 0.5})
    log.close()
    assert steps_of(tmp_path) == [10, 20]
    # of warnings those stay that will not be given again
    assert steps_of(tmp_path, "warning") == [20]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_no_step_twice(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    begun(tmp_path).close()
    log = RunLog(tmp_path, "run", QUIET)
    log.rewind(20)
    log.numbers(30, {"loss": 0.25})
    log.rewind(10)  # and back in the same process
    log.numbers(20, {"loss": 0.5})
    log.close()
    shown = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(10, 10.0), (20, 0.5)]


def test_a_tensorboard_that_is_not_installed_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    begun(tmp_path).close()
    told = (tmp_path / "log.txt").read_text()
    assert told.count("TensorBoard is not installed: the numbers go to metrics.jsonl alone") == 1
    assert steps_of(tmp_path) == [10, 20, 30]


def test_a_tracker_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """The package is not installed where this is tested: a stand-in takes what it is told."""
    begins: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float]) -> None: ...
        def finish(self) -> None: ...

    package = ModuleType("wandb")
    package.init = lambda **given: begins.append(given) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    for _ in range(2):
        begun(tmp_path, wandb="emoji").close()
    begun(tmp_path / "other", wandb="emoji").close()
    first, again, other = (given["id"] for given in begins)
    assert first == again != other
    assert {given["resume"] for given in begins} == {"allow"}


def test_a_tracker_that_is_not_installed_is_named(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(TrainingError, match="pip install wandb, or leave run.wandb out"):
        tiny.train(tiny.autoencoder(run={"wandb": "emoji"}), tmp_path / "run")
