"""What is done beside training, at intervals; sheets of samples are drawn here."""

from pathlib import Path
from typing import Protocol

__all__ = ["Callback", "Model", "SampleSheets"]


class Callback(Protocol):
    """Something that is done between steps. All ranks call the same methods in the same order.

    The clock of the run stands still meanwhile.
    """

    def due(self, step: int, seconds: float) -> bool:
        """Whether `run` is to be called now; the first rank's answer counts for all.

        Args:
            step: Steps done.
            seconds: Time spent in training.
        """
        ...

    def run(self, step: int, seconds: float) -> None:
        """Do it; arguments as in `due`."""
        ...

    def on_rewind(self, step: int) -> None:
        """Called where training begins, goes on or goes back to; at the beginning with -1."""
        ...

    def on_checkpoint(self, step: int) -> None:
        """Called after a checkpoint is saved."""
        ...

    def on_end(self, step: int) -> None:
        """Called at the end, after the model is written to ``model/``."""
        ...


class Model(Protocol):
    """What is trained, as far as callbacks use it."""

    def draw_samples(self, path: Path) -> None:
        """Draw what the model can do now into a PNG."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model with the averaged weights."""
        ...


class SampleSheets:
    """Draws sheets of samples into ``samples/``.

    Args:
        task: Draws.
        folder: The run folder.
        minutes: Of training between two sheets.
    """

    def __init__(self, task: Model, folder: Path, minutes: float) -> None:
        self.task, self.folder, self.seconds = task, folder / "samples", 60 * minutes
        self._last: float | None = None

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is time for another sheet."""
        if self._last is None:
            self._last = seconds
        return seconds - self._last > self.seconds

    def run(self, step: int, seconds: float) -> None:
        """Draw one."""
        self.on_end(step)
        self._last = seconds

    def on_rewind(self, step: int) -> None:
        """Nothing."""

    def on_checkpoint(self, step: int) -> None:
        """Nothing."""

    def on_end(self, step: int) -> None:
        """Draw one."""
        self.task.draw_samples(self.folder / f"step-{step:07d}.png")
