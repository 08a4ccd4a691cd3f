"""The one training loop: budget, checkpoints, signals, log, callbacks, and a way back."""

import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from mezzotint.errors import CheckpointError, TrainingError
from mezzotint.training.batches import Batches
from mezzotint.training.callbacks import Callback
from mezzotint.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from mezzotint.training.health import Health, Rollback, Sample, Trouble
from mezzotint.training.log import RunLog
from mezzotint.training.orders import LeavingOut, TrainingData, can_leave_out
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.recipe import BudgetConfig, RunConfig

__all__ = ["Task", "run_loop"]


class Task(Protocol):
    """What a loop trains: one stage, with its networks, optimizers and data.

    Attributes:
        data: The samples.
        order: In which they are seen.
        batches: Made of them.
        rate: What the learning rate is multiplied by.
    """

    data: TrainingData
    order: LeavingOut
    batches: Batches[Any]
    rate: float

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

    def gauges(self) -> Mapping[str, float]:
        """Return what is worth a look at every row of the log; all ranks must ask."""
        ...

    def faulty_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step whose loss is no number with the weights now."""
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
    health: Health,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    stop_after: int | None = None,
    stop_at: float | None = None,
) -> None:
    """Train a task until its budget is spent, and export the model to ``folder/model``.

    Args:
        task: What to train.
        folder: The run folder.
        budget: When to end.
        run: What to write, and when.
        log: Where losses and events go.
        health: Watches the run.
        callbacks: What is done beside training.
        checkpoint: Where to go on from; None starts anew.
        ranks: This process among the others of the run. What the clock decides, the first decides
            for all.
        stop_after: Save a checkpoint and return after so many steps of this call, if the budget is
            not spent before.
        stop_at: The same from a time of `time.monotonic` on.

    Raises:
        TrainingError: If the loss is no number, or diverges, and going back did not help; a
            checkpoint cannot be saved; or another process has ended.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    loop = _Loop(task, folder, run, log, health, callbacks, ranks)
    loop.start(checkpoint)
    with _stop_on_signal() as stopped, log.progress() as display:
        if not loop.train(budget, display, stopped, stop_after, stop_at):
            return
    loop.end()


class _Loop:
    """The state of `run_loop`, whose arguments these are."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        run: RunConfig,
        log: RunLog,
        health: Health,
        callbacks: Sequence[Callback],
        ranks: Ranks,
    ) -> None:
        self.task, self.folder, self.config, self.log = task, folder, run, log
        self.health, self.callbacks, self.ranks = health, callbacks, ranks
        self.step, self.first, self.clock = 0, 0, _Clock(0.0)
        self.flushed = 0
        # the state at the start, until a checkpoint is known to be as good; the first step of one
        self.begun: Checkpoint | None = None
        self.saved_first = math.inf
        self.saved = 0  # the step of the newest one

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Begin anew, or at a checkpoint."""
        if checkpoint is not None:
            self.task.load_state(checkpoint)
            self.health.load_state(checkpoint.values, checkpoint.step)
            self._apply()
            self.step = checkpoint.step
            self.clock = _Clock(float(checkpoint.values["seconds"]))
            self.log.event(f"going on from step {self.step:,} ({checkpoint.path})")
        elif self.config.health.rollback:
            self.begun = _in_memory(*self.task.state())
        # what a killed process had written of later steps, they will write again
        self._rewind(-1 if checkpoint is None else self.step)
        self.health.begin()
        self.first = self.flushed = self.saved = self.step

    def train(
        self,
        budget: BudgetConfig,
        display: Callable[[float, float, int], None],
        stopped: Sequence[str],
        stop_after: int | None,
        stop_at: float | None,
    ) -> bool:
        """Train until the budget is spent; returns whether it is."""
        task, log, ranks, clock = self.task, self.log, self.ranks, self.clock
        # at whole multiples of the interval, whatever stopped and continued the run in between
        interval = 60 * self.config.checkpoint_minutes
        save_at = (clock.seconds // interval + 1) * interval
        while True:
            seconds = clock.seconds
            late = stop_at is not None and time.monotonic() >= stop_at
            mine = [_progress(budget, self.step, seconds), seconds >= save_at, late]
            mine += [callback.due(self.step, seconds) for callback in self.callbacks]
            progress, must_save, is_late, *due, must_stop = ranks.largest(
                [*(mine if ranks.is_first else [0.0] * len(mine)), bool(stopped)]
            )
            display(progress, seconds, self.step)
            if must_stop:
                if self.step != self.saved:
                    self._save()
                by = stopped[0] if stopped else "a signal to another process"
                log.event(f"stopped by {by} at step {self.step:,}; go on with --resume")
                raise KeyboardInterrupt
            if progress >= 1.0:
                if self._save():
                    return True
                continue
            done = self.step - self.first
            if is_late or (stop_after is not None and done >= stop_after):
                if not self._save():
                    continue
                log.event(f"stopped after {done:,} steps, at step {self.step:,}")
                return False
            with clock.paused():
                # nothing is drawn from, or measured of, weights that are lost
                if not (self._save() if must_save else not any(due) or self._flush()):
                    continue
                if must_save:
                    save_at = (clock.seconds // interval + 1) * interval
                for callback, is_due in zip(self.callbacks, due, strict=True):
                    if is_due:
                        callback.run(self.step, clock.seconds)
            step = self.step
            with ranks.told():
                log.collect(self.health.step(step, partial(task.train_step, step, progress)))
            self.step += 1
            if self.step % self.config.log_steps == 0 and not self._flush():
                continue
            with clock.paused():
                task.save_snapshot(self.folder / "ema")

    def end(self) -> None:
        """Write the model, and what is drawn from it and said of it."""
        self.task.save_snapshot(self.folder / "ema", last=True)
        self.task.export(self.folder / "model")
        for callback in self.callbacks:
            callback.on_end(self.step)
        minutes = self.clock.seconds / 60
        model = self.folder / "model"
        self.log.event(f"done after {self.step:,} steps and {minutes:.1f} minutes: {model}")

    def _flush(self) -> bool:
        """Write a row of the log; returns whether all is well, or else goes back."""
        trouble = self.health.lost()
        if trouble is None and self.log.waiting:
            row = self.log.flush(
                self.step, self.clock.seconds, self.task.images_per_step, self.task.gauges()
            )
            with self.clock.paused():
                trouble = self.health.observe(self.flushed, self.step, row)
        self.flushed = self.step
        if trouble is not None:
            with self.clock.paused():
                self._go_back(trouble)
        return trouble is None

    def _save(self) -> bool:
        """Save a checkpoint, if all is well; or else go back, and return that it was not."""
        if not self._flush():  # never push a good checkpoint out by one that is lost
            return False
        tensors, values = self.task.state()
        values |= {"seconds": self.clock.seconds, **self.health.state()}
        keep, place = self.config.keep_checkpoints, self.folder / "checkpoints"
        well_until = self.health.well_until
        save_checkpoint(place, self.step, tensors, values, keep, self.ranks, well_until)
        self.saved, self.saved_first = self.step, min(self.step, self.saved_first)
        if not self.health.judges or self.saved_first <= well_until:
            self.begun = None
        for callback in self.callbacks:
            callback.on_checkpoint(self.step)
        return True

    def _go_back(self, trouble: Trouble) -> None:
        """Go back to the last good state and on from there otherwise, or end with a report."""
        health, task = self.health, self.task
        good, damaged = self.begun, list[str]()
        if good is None or self.saved_first <= trouble.since:
            good, place = None, self.folder / "checkpoints"
            try:
                good, damaged = newest_checkpoint(place, self.ranks, trouble.since)
            except CheckpointError as error:  # the run ends by its report, not by this alone
                damaged = [str(error)]
        for sentence in damaged:
            self.log.event(f"passed by a damaged checkpoint: {sentence}")
        samples: list[Sample] = []
        if good is not None:
            task.load_state(good)
            if trouble.lost and can_leave_out(task.data, 1):
                mine = task.faulty_samples(trouble.step)
                samples = sorted({s for each in self.ranks.gather_values(mine) for s in each})
        usable = can_leave_out(task.data, len(health.excluded | {index for index, _ in samples}))
        if good is None or health.rollbacks or not self.config.health.rollback or not usable:
            raise TrainingError(health.report(self.folder / "report.md", trouble, samples))
        factor = 1.0 if samples else self.config.health.learning_rate_factor
        done = Rollback(trouble.step, good.step, trouble.text, tuple(samples), factor)
        health.go_back(done)
        self._apply()
        self.step = self.flushed = good.step
        self._rewind(self.step)
        text = f"{trouble.text}. Gone back to step {done.to:,}, {done.remedy}"
        if done.to > trouble.since:
            text += (
                f"; that step may be bad too: all was well up to step {trouble.since:,}, and no"
                " whole checkpoint is left from before it"
            )
        self.log.warn(self.step, "rollback", text)
        self._save()  # what comes after it is not gone on with, whatever happens now

    def _rewind(self, step: int) -> None:
        """Drop what was written of later steps; -1 is before the first."""
        self.log.rewind(step, self.health.told)
        for callback in self.callbacks:
            callback.on_rewind(step)

    def _apply(self) -> None:
        """Train as the ways back say that were taken."""
        self.task.rate = self.health.rate
        excluded = frozenset(self.health.excluded)
        if excluded != self.task.order.excluded:
            self.task.batches.forget()
            self.task.order.excluded = excluded


def _in_memory(
    tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Checkpoint:
    """Return a state as a checkpoint in the processor's memory; shares stay where they are."""
    kept = {
        group: {
            name: t.detach().clone() if isinstance(t, DTensor) else t.detach().to("cpu", copy=True)
            for name, t in named.items()
        }
        for group, named in tensors.items()
    }
    return Checkpoint(0, kept, copy.deepcopy(dict(values)), Path("the start"))
