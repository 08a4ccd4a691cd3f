"""What a run says: a progress line, ``log.txt``, ``metrics.jsonl`` and TensorBoard files."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from mezzotint.training.ranks import ALONE, Ranks

__all__ = ["RunLog"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunLog:
    """Writes the log of one run.

    Args:
        folder: The run folder.
        title: Name of the run on the progress line.
        console: Where the progress line and the events are shown.
        ranks: This process among the others of the run. The first alone writes and speaks, of the
            values of all.
    """

    def __init__(self, folder: Path, title: str, console: Console, ranks: Ranks = ALONE) -> None:
        self.title, self.ranks = title, ranks
        self.console = console if ranks.is_first else Console(quiet=True)
        text = metrics = Path(os.devnull)
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            text, metrics = folder / "log.txt", folder / "metrics.jsonl"
        self._text, self._metrics = (path.open("a", encoding="utf-8") for path in (text, metrics))
        self._board = self._open_board(folder / "tensorboard") if ranks.is_first else None
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._last: tuple[int, float] | None = None
        self._shown: dict[str, float] = {}

    @staticmethod
    def _open_board(folder: Path) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard is in the extra `train`; metrics.jsonl is always there
            return None
        return SummaryWriter(str(folder))

    def event(self, text: str) -> None:
        """Say a sentence on the console and in ``log.txt``."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()
        self.console.print(f"[{self.title}] {text}", markup=False, highlight=False, soft_wrap=True)

    def collect(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values to the running averages."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def flush(self, step: int, seconds: float, images_per_step: int) -> dict[str, float]:
        """Write the averages since the last call, over all ranks, and return them."""
        if not self._sums:
            return {}
        sums = self._sums.values()
        means = self.ranks.means([float(total) / count for total, count in sums])
        averages = dict(zip(self._sums, means, strict=True))
        if self._last is not None and seconds > self._last[1]:
            steps = step - self._last[0]
            averages["images_per_second"] = steps * images_per_step / (seconds - self._last[1])
        self._last = (step, seconds)
        self._sums = {}
        self._shown = averages
        row = {"step": step, "seconds": round(seconds, 2), **averages}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in averages.items():
                self._board.add_scalar(name, value, step)
        return averages

    @contextlib.contextmanager
    def progress(self) -> Generator[Callable[[float, float, int], None]]:
        """Show a progress bar; where there is no terminal, a line every quarter of a minute."""
        if not self.console.is_terminal:
            yield self._plain_progress()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(self.title, total=1.0, note="")

            def show(progress: float, seconds: float, step: int) -> None:
                bar.update(task, completed=progress, note=self._note(progress, seconds, step))

            yield show

    def _plain_progress(self) -> Callable[[float, float, int], None]:
        last = time.monotonic()

        def show(progress: float, seconds: float, step: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 15:
                last = time.monotonic()
                note = f"{progress:4.0%}  {self._note(progress, seconds, step)}"
                self.console.print(f"[{self.title}] {note}", markup=False, highlight=False)

        return show

    def _note(self, progress: float, seconds: float, step: int) -> str:
        left = seconds / progress * (1 - progress) if progress > 0 else math.nan
        parts = [f"step {step:,}"]
        if "loss" in self._shown:
            parts.append(f"loss {self._shown['loss']:.4f}")
        if "images_per_second" in self._shown:
            parts.append(f"{self._shown['images_per_second']:.1f} images/s")
        if math.isfinite(left):
            parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def close(self) -> None:
        """Close the files; what a full disk keeps from being written is lost."""
        for file in (self._text, self._metrics, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
