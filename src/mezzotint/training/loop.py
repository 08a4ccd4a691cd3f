"""The one training loop: budget, learning rate, checkpoints, signals, log, sample grids."""

import contextlib
import math
import signal
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from mezzotint.errors import TrainingError
from mezzotint.training.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from mezzotint.training.log import RunLog
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.recipe import BudgetConfig, RunConfig

__all__ = ["Task", "run_loop"]


class Task(Protocol):
    """What a loop trains: one stage, with its networks, optimizers and data."""

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees."""
        ...

    def train_step(self, step: int, progress: float) -> Mapping[str, Tensor | float]:
        """Do one optimizer step.

        Args:
            step: Steps done before this one.
            progress: Share of the budget that is spent, in [0, 1).

        Returns:
            Values for the log; ``loss`` among them.
        """
        ...

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return all that a resumed run needs: tensors by group and name, and plain values."""
        ...

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave."""
        ...

    def draw_samples(self, path: Path) -> None:
        """Draw what the model can do now into a PNG."""
        ...

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Store the averages of the weights as they stand, if the recipe says so at this step.

        Args:
            folder: For all snapshots of the run.
            last: Whether training is at its end.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write the finished model."""
        ...


@contextlib.contextmanager
def _stop_on_signal() -> Generator[list[str]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that a checkpoint can be saved."""
    received: list[str] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    previous: dict[int, Any] = {}
    # signals can only be handled in the main thread; elsewhere the caller's handling stands
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Clock:
    """Time spent in training, over all sessions of a run; drawing and saving do not count."""

    def __init__(self, spent: float) -> None:
        self._spent = spent
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._since

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        spent = self.seconds
        try:
            yield
        finally:
            self._spent, self._since = spent, time.monotonic()


def _progress(budget: BudgetConfig, step: int, seconds: float) -> float:
    shares = [0.0]
    if budget.max_steps is not None:
        shares.append(step / budget.max_steps)
    if budget.max_minutes is not None:
        shares.append(seconds / 60 / budget.max_minutes)
    return max(shares)


def run_loop(
    task: Task,
    *,
    folder: Path,
    budget: BudgetConfig,
    run: RunConfig,
    log: RunLog,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    stop_after: int | None = None,
) -> None:
    """Train a task until its budget is spent, and export the model to ``folder/model``.

    Args:
        task: What to train.
        folder: The run folder.
        budget: When to end.
        run: What to write, and when.
        log: Where losses and events go.
        checkpoint: Where to go on from; None starts anew.
        ranks: This process among the others of the run. What the clock decides, the first decides
            for all.
        stop_after: Save a checkpoint and return after so many steps of this call, if the budget is
            not spent before.

    Raises:
        TrainingError: If the loss is no longer a number, a checkpoint cannot be saved, or another
            process has ended.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    step, spent = 0, 0.0
    if checkpoint is not None:
        task.load_state(checkpoint)
        step, spent = checkpoint.step, float(checkpoint.values["seconds"])
        log.event(f"going on from step {step:,} ({checkpoint.path})")
    first, clock = step, _Clock(spent)
    # at whole multiples of the interval, whatever stopped and continued the run in between
    interval = 60 * run.checkpoint_minutes
    due = (spent // interval + 1) * interval
    last_drawn = clock.seconds

    def flush() -> None:
        _check_finite(log.flush(step, clock.seconds, task.images_per_step), step, folder)

    def save() -> None:
        flush()  # never push a good checkpoint out by one that is no longer a number
        tensors, values = task.state()
        values["seconds"] = clock.seconds
        save_checkpoint(folder / "checkpoints", step, tensors, values, run.keep_checkpoints, ranks)

    with _stop_on_signal() as stopped, log.progress() as display:
        while True:
            seconds = clock.seconds
            mine = [_progress(budget, step, seconds), seconds >= due]
            mine += [seconds - last_drawn > 60 * run.sample_minutes]
            progress, must_save, must_draw, must_stop = ranks.largest(
                [*(mine if ranks.is_first else [0.0] * len(mine)), bool(stopped)]
            )
            display(progress, seconds, step)
            if must_stop:
                if step > first:
                    save()
                by = stopped[0] if stopped else "a signal to another process"
                log.event(f"stopped by {by} at step {step:,}; go on with --resume")
                raise KeyboardInterrupt
            if progress >= 1.0:
                break
            if stop_after is not None and step - first >= stop_after:
                save()
                log.event(f"stopped after {step - first:,} steps, at step {step:,}")
                return
            if must_save:
                with clock.paused():
                    save()
                due = (clock.seconds // interval + 1) * interval
            if must_draw:
                with clock.paused():
                    task.draw_samples(folder / "samples" / f"step-{step:07d}.png")
                last_drawn = clock.seconds
            with ranks.told():
                log.collect(task.train_step(step, progress))
            step += 1
            if step % run.log_steps == 0:
                flush()
            with clock.paused():
                task.save_snapshot(folder / "ema")
    save()
    task.save_snapshot(folder / "ema", last=True)
    task.export(folder / "model")
    task.draw_samples(folder / "samples" / f"step-{step:07d}.png")
    log.event(f"done after {step:,} steps and {clock.seconds / 60:.1f} minutes: {folder / 'model'}")


def _check_finite(averages: Mapping[str, float], step: int, folder: Path) -> None:
    for name, value in averages.items():
        if not math.isfinite(value):
            saved = list_checkpoints(folder / "checkpoints")
            where = f"; the last checkpoint is {saved[-1]}" if saved else ""
            raise TrainingError(
                f"{name} is no longer a number at step {step}: lower optimizer.learning_rate, or"
                f" set precision=float32{where}"
            )
