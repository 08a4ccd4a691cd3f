"""Where a loop saves, goes back, counts and measures, and where two of these meet."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mezzotint.training.evaluations as evaluations_module
import mezzotint.training.loop as loop_module
from mezzotint.data import EmojiDataConfig, open_data
from mezzotint.device import select_precision
from mezzotint.errors import DataError, TrainingError
from mezzotint.training.autoencoder import AutoencoderTask
from mezzotint.training.batches import Batches, DataOrder
from mezzotint.training.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint
from mezzotint.training.ema import ExponentialMovingAverage, PowerEMAConfig
from mezzotint.training.evaluations import Evaluations, Measurement
from mezzotint.training.gauges import counted
from mezzotint.training.health import Health, Trouble
from mezzotint.training.log import RunLog
from mezzotint.training.loop import run_loop
from mezzotint.training.orders import LeavingOut
from mezzotint.training.oversight import HealthConfig
from mezzotint.training.ranks import Ranks
from mezzotint.training.recipe import BudgetConfig, RunConfig
from mezzotint.training.snapshots import save_if_due
from mezzotint.training.symptoms import Facts

FACTS = Facts(epoch_steps=6, max_steps=100, learning_rate=1e-3, diffusion=True)
NEVER = {"checkpoint_minutes": 1000.0, "sample_minutes": 1000.0}


class Counting:
    """A task whose only weight is the number of its steps."""

    images_per_step, rate = 8, 1.0

    def __init__(self) -> None:
        self.data = open_data(EmojiDataConfig(subset="demo-48", resolution=16))
        self.order = LeavingOut(DataOrder(len(self.data), 0))
        self.batches = Batches[int](lambda step: step)
        self.steps = torch.zeros(1)

    def train_step(self, step: int, progress: float) -> dict[str, Tensor | float]:
        self.steps += 1
        return {"loss": 0.5}

    def gauges(self) -> dict[str, float]:
        return {}

    def faulty_samples(self, step: int) -> list[Any]:
        return []

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"weights": {"steps": self.steps}}, {}

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.steps = checkpoint.tensors["weights"]["steps"].clone()

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None: ...
    def export(self, folder: Path) -> None: ...
    def draw_samples(self, path: Path) -> None: ...


def test_a_stop_is_saved_after_a_run_went_back_behind_where_it_was_resumed(tmp_path, monkeypatch):
    """It went on from step 8, goes back to step 4, and is stopped at step 6."""
    log = RunLog(tmp_path, "run", Console(quiet=True))
    stopped: list[str] = []
    monkeypatch.setattr(loop_module, "_stop_on_signal", lambda: contextlib.nullcontext(stopped))

    def trained(task: Counting, health: Health, **options: Any) -> None:
        run = RunConfig(log_steps=4, keep_checkpoints=4, **NEVER)
        budget = BudgetConfig(max_steps=100)
        checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
        run_loop(
            task,
            folder=tmp_path,
            budget=budget,
            run=run,
            log=log,
            health=health,
            checkpoint=checkpoint,
            **options,
        )

    def health() -> Health:
        execution = select_precision("float32", torch.device("cpu"))
        config = HealthConfig(arithmetic=False)
        return Health(config, log, execution, images_per_step=8, facts=FACTS)

    for _ in range(2):
        trained(Counting(), health(), stop_after=4)
    watching, task = health(), Counting()

    def observe(first: int, last: int, values: Any) -> Trouble | None:
        return None if watching.rollbacks else Trouble(last, 4, "it rises", "lower it")

    step = task.train_step

    def until_six(number: int, progress: float) -> dict[str, Tensor | float]:
        if watching.rollbacks and number == 5:
            stopped.append("SIGTERM")
        return step(number, progress)

    monkeypatch.setattr(watching, "observe", observe)
    monkeypatch.setattr(task, "train_step", until_six)
    with pytest.raises(KeyboardInterrupt):
        trained(task, watching)
    log.close()
    assert [r.to for r in watching.rollbacks] == [4]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-4",
        "step-6",
    ]


def test_a_way_back_that_is_damaged_all_along_ends_with_the_report(tmp_path, monkeypatch):
    log = RunLog(tmp_path, "run", Console(quiet=True))
    execution = select_precision("float32", torch.device("cpu"))
    config = HealthConfig(arithmetic=False)

    def trained(health: Health, stop_after: int) -> None:
        run_loop(
            Counting(),
            folder=tmp_path,
            budget=BudgetConfig(max_steps=100),
            run=RunConfig(log_steps=2, **NEVER),
            log=log,
            health=health,
            checkpoint=newest_checkpoint(tmp_path / "checkpoints")[0],
            stop_after=stop_after,
        )

    trained(Health(config, log, execution, images_per_step=8, facts=FACTS), stop_after=4)
    watching = Health(config, log, execution, images_per_step=8, facts=FACTS)

    def observe(first: int, last: int, values: Any) -> Trouble:
        for file in (tmp_path / "checkpoints" / "step-4").iterdir():
            file.write_bytes(b"")
        return Trouble(last, 4, "it rises", "lower it")

    monkeypatch.setattr(watching, "observe", observe)
    with pytest.raises(TrainingError, match="it rises"):
        trained(watching, stop_after=4)
    log.close()
    assert "it rises" in (tmp_path / "report.md").read_text()
    assert "passed by a damaged checkpoint" in (tmp_path / "log.txt").read_text()


def test_weights_that_are_lost_are_not_measured(tiny, tmp_path, monkeypatch):
    """Between two rows of the log, an evaluation is due after they became no numbers."""
    real = AutoencoderTask.train_step

    def step(self: AutoencoderTask, number: int, progress: float) -> dict[str, Tensor | float]:
        values = dict(real(self, number, progress))
        if number == 1 and self.rate == 1.0:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.fill_(torch.nan)
            values["loss"] = torch.tensor(torch.nan)
        return values

    monkeypatch.setattr(AutoencoderTask, "train_step", step)
    evaluation = {"every_steps": 3, "metric": "psnr", "samples": 8}
    recipe = tiny.autoencoder(
        run={**NEVER, "log_steps": 10, "evaluation": evaluation}, budget={"max_steps": 4}
    )
    run = tiny.train(recipe, tmp_path / "run")
    cards = sorted(path.name for path in (run / "evaluations").iterdir())
    assert cards == ["step-0000003.json", "step-0000004.json"]
    said = (run / "log.txt").read_text()
    assert "Gone back to step 0, with 0.1 times the learning rate" in said
    assert "cannot be evaluated" not in said


class Watched(Ranks):
    """Says whether a folder was there at each meeting of the ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.there = folder, list[bool]()

    def wait(self) -> None:
        self.there.append(self.folder.exists())


def measuring(tiny, folder: Path, config: dict[str, Any], ranks: Ranks) -> Evaluations:
    recipe = tiny.autoencoder(run={"evaluation": {"metric": "psnr", **config}})
    measurement, log = Measurement.of(recipe), RunLog(folder, "run", Console(quiet=True))
    assert measurement is not None
    task: Any = Counting()
    return Evaluations(measurement, recipe, task, folder, log, torch.device("cpu"), ranks)


def test_what_was_drawn_is_there_until_every_rank_has_read_it(tiny, tmp_path, monkeypatch):
    work = tmp_path / "evaluations" / ".step-0000002"
    ranks = Watched(work)
    evaluations = measuring(tiny, tmp_path, {"every_steps": 2}, ranks)

    def evaluate(*_: Any, **__: Any) -> None:
        work.mkdir(parents=True)
        ranks.there.clear()
        raise DataError("nothing to be measured")

    monkeypatch.setattr(evaluations_module, "evaluate", evaluate)
    evaluations.run(2, 0.0)
    evaluations.log.close()
    assert ranks.there == [True, False]


def test_an_evaluation_that_was_due_when_a_run_was_stopped_is_done_later(tiny, tmp_path):
    """A checkpoint is saved between that and the evaluation, and holds the time of the former."""
    ranks = Watched(tmp_path)
    begun, resumed = (measuring(tiny, tmp_path, {"every_minutes": 1.0}, ranks) for _ in range(2))
    assert not begun.due(6, 50.0) and begun.due(7, 61.0)
    resumed.on_rewind(7)
    assert resumed.due(7, 61.0) and not resumed.due(8, 62.0)
    for evaluations in (begun, resumed):
        evaluations.log.close()


def test_a_folder_with_a_best_model_is_not_begun_in_anew(tiny, tmp_path):
    """It would be compared with models of another training."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    with pytest.raises(TrainingError, match="already holds a run"):
        tiny.train(tiny.autoencoder(), tmp_path / "run")


def test_no_snapshot_is_stored_of_averages_of_nothing(tmp_path):
    """So it is as long as every step is skipped, its gradient being beyond float16."""
    ema = ExponentialMovingAverage(nn.Linear(2, 2), PowerEMAConfig(snapshot_steps=2))
    for last in (False, True):
        assert save_if_due(ema, tmp_path, last=last) is None
    assert list(tmp_path.iterdir()) == []


def test_errors_of_some_steps_are_not_told_as_those_of_all(tmp_path):
    log = RunLog(tmp_path, "run", Console(quiet=True))
    execution = select_precision("float32", torch.device("cpu"))
    health = Health(HealthConfig(), log, execution, images_per_step=8, facts=FACTS)
    trouble = health.observe(0, 50, {"unexplained": 0.4, "worse_than_nothing": 0.06})
    log.close()
    assert trouble is not None
    assert "in 3 of 50 steps the error was more than twice that of predicting" in trouble.text


def test_counting_a_step_leaves_it_as_it_is():
    """To the last bit: when one is counted depends on when rows of the log are written."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.SiLU()
    )
    head, x = nn.Linear(64, 16), torch.randn(2, 4, 8, 8)
    weights = [*network.parameters(), *head.parameters()]

    def work() -> list[Tensor]:
        for weight in weights:
            weight.grad = None
        q = head(network(x))
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        y.square().mean().backward()
        return [y.detach(), *(weight.grad.clone() for weight in weights if weight.grad is not None)]

    plain = work()
    made, flops = counted(work)
    assert len(made) == 7 and all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    with FlopCounterMode(display=False) as theirs:
        work()
    assert flops == theirs.get_total_flops() > 100_000


def test_the_time_ends_the_training_of_the_first_stage_too(tiny, tmp_path):
    first = tiny.write(tmp_path / "first.yaml", "autoencoder", budget={"max_steps": 3})
    stage = {"kind": "trained", "recipe": str(first)}
    recipe, run = tiny.diffusion(first_stage=stage, budget={"max_steps": 2}), tmp_path / "run"
    tiny.train(recipe, run, stop_minutes=0.0)
    assert not (run / "first_stage" / "model").exists() and not (run / "checkpoints").exists()
    assert "stopped before the first stage was trained" in (run / "log.txt").read_text()
    tiny.train(recipe, run, resume=True)
    assert (run / "model" / "model_index.json").is_file()
