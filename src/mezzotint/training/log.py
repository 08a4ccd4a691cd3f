"""What a run says: a progress line, ``log.txt``, ``metrics.jsonl`` and TensorBoard files."""

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from mezzotint.data import Fault
from mezzotint.errors import TrainingError
from mezzotint.training.gauges import derive
from mezzotint.training.ranks import ALONE, Ranks

__all__ = ["WANDB_ID", "RunLog"]

WANDB_ID = "wandb-id"  # in the run folder: by which a run goes on that was stopped
_NO_BOARD = (
    "TensorBoard is not installed: the numbers go to metrics.jsonl alone; for both,"
    " pip install 'mezzotint[train]'"
)

# beside loss and speed; of the rest, `metrics.jsonl` and TensorBoard tell
_SHOWN = {
    "peak_share": "{:.0%} of peak",
    "gradient_norm": "gradient {:.2g}",
    "codes_used": "{:.0%} of codes",
    "discriminator_gap": "gap {:.2f}",
    "ema_distance": "EMA {:.1%} apart",
}


_TOLD = 5  # of what another rank skips between two rows; of the rest, the number


def _open_tracker(project: str, title: str, folder: Path, ranks: Ranks) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise TrainingError(
            f"run.wandb: {project}: the package wandb is not installed ({error}); install it with"
            " pip install wandb, or leave run.wandb out"
        ) from None
    if not ranks.is_first:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / WANDB_ID
    if not name.is_file():
        name.write_text(secrets.token_hex(8), encoding="utf-8")
    known = name.read_text(encoding="utf-8")
    return wandb.init(project=project, name=title, dir=str(folder), id=known, resume="allow")


def _kept(path: Path, step: int, told: Container[str]) -> Iterator[str]:
    """The whole lines of ``metrics.jsonl`` up to a step, and the warnings that were told."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                stays = row["step"] <= step or row.get("warning") in told
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # a process was killed in the middle of it
            if stays and line.endswith("\n"):
                yield line


def _plain(total: Tensor | float, count: int) -> list[float]:
    if isinstance(total, Tensor) and total.ndim:
        return [value / count for value in total.tolist()]
    return [float(total) / count]


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
        wandb: A project of Weights & Biases that the numbers go to as well.

    Attributes:
        peak_seconds: Seconds that a step would take at the processor's peak, once they are known.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        console: Console,
        ranks: Ranks = ALONE,
        wandb: str | None = None,
    ) -> None:
        self.title, self.ranks = title, ranks
        self.console = console if ranks.is_first else Console(quiet=True)
        text = metrics = Path(os.devnull)
        # before any file is opened: it may not be installed
        self._tracker = None if wandb is None else _open_tracker(wandb, title, folder, ranks)
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            text, metrics = folder / "log.txt", folder / "metrics.jsonl"
        self._text, self._metrics = (path.open("a", encoding="utf-8") for path in (text, metrics))
        self.folder = folder
        self._board: Any = None
        self._purge_step: int | None = None
        self._open_board = self._find_board() if ranks.is_first else None
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._last: tuple[int, float] | None = None
        self._shown: dict[str, float] = {}
        self._untold: list[str] = []
        self.peak_seconds: float | None = None

    def _find_board(self) -> Callable[..., Any] | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard is in the extra `train`; metrics.jsonl is always there
            self.event(_NO_BOARD)
            return None
        return SummaryWriter

    def event(self, text: str) -> None:
        """Say a sentence on the console and in ``log.txt``."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()
        self.console.print(f"[{self.title}] {text}", markup=False, highlight=False, soft_wrap=True)

    def skipped(self, fault: Fault) -> None:
        """Say what is skipped of the data; other ranks than the first say it by `flush`.

        Any thread may call it.
        """
        sentence = f"skipped {fault.name}: {fault.reason}"
        if self.ranks.is_first:
            self.event(sentence)
        else:
            self._untold.append(sentence)

    def _tell_others(self) -> None:
        """Say what the other ranks skip; all must call it."""
        if not self.ranks.several:
            return
        count = len(self._untold)  # a thread may add to it meanwhile
        mine = self._untold[: min(count, _TOLD)]
        del self._untold[:count]
        for rank, (sentences, total) in enumerate(self.ranks.gather_values((mine, count))):
            for sentence in sentences:
                self.event(f"rank {rank} {sentence}")
            if total > len(sentences):
                self.event(f"rank {rank} skipped {total - len(sentences):,} more")

    def collect(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values to the running averages."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    @property
    def waiting(self) -> bool:
        """Whether anything was collected since the last call of `flush`."""
        return bool(self._sums)

    def flush(
        self,
        step: int,
        seconds: float,
        images_per_step: int,
        gauges: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write the averages since the last call, over all ranks, and return them.

        Args:
            step: Steps done.
            seconds: Time spent in training.
            images_per_step: Images that a step sees.
            gauges: What stands beside the averages, the same in all ranks.
        """
        if not self._sums:
            return {}
        self._tell_others()
        lists = {name: _plain(total, count) for name, (total, count) in self._sums.items()}
        flat = iter(self.ranks.means([value for values in lists.values() for value in values]))
        averages = derive({name: [next(flat) for _ in values] for name, values in lists.items()})
        averages |= gauges or {}
        if self._last is not None and seconds > self._last[1]:
            rate = (step - self._last[0]) / (seconds - self._last[1])
            averages["images_per_second"] = rate * images_per_step
            if self.peak_seconds is not None:
                averages["peak_share"] = rate * self.peak_seconds
        self._last = (step, seconds)
        self._sums = {}
        self._shown = averages
        self.numbers(step, {"seconds": round(seconds, 2), **averages}, averages)
        return averages

    def numbers(
        self, step: int, row: Mapping[str, float | str], told: Mapping[str, float] | None = None
    ) -> None:
        """Write a row of ``metrics.jsonl``, and its numbers for TensorBoard and W&B.

        Args:
            step: Steps done.
            row: By name.
            told: The numbers; by default the whole row.
        """
        self._metrics.write(json.dumps({"step": step, **row}) + "\n")
        self._metrics.flush()
        numbers = row if told is None else told
        if self._open_board is not None and numbers:
            if self._board is None:
                board = str(self.folder / "tensorboard")
                self._board = self._open_board(board, purge_step=self._purge_step)
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None and numbers:
            # its own steps may only rise, and after a way back ours do not
            self._tracker.log({"training_step": step, **numbers})

    def warn(self, step: int, name: str, text: str) -> None:
        """Say a warning on the console, in ``log.txt`` and in ``metrics.jsonl``."""
        self.event(f"warning: {text}")
        self.numbers(step, {"warning": name, "text": text}, {})

    def rewind(self, step: int, told: Container[str] = ()) -> None:
        """Forget what was collected, and drop the rows of later steps: they will come again.

        What W&B has of them stays there.

        Args:
            step: Where the training goes on; -1 is before the first row.
            told: Names of warnings that stay, for they will not be given again.
        """
        self._sums, self._last = {}, None
        if not self.ranks.is_first:
            return
        self._metrics.close()
        path = self.folder / "metrics.jsonl"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_kept(path, step, told))
        temporary.replace(path)
        self._metrics = path.open("a", encoding="utf-8")
        if self._board is not None:
            self._board.close()
        self._board, self._purge_step = None, step + 1  # TensorBoard drops what it has of these

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
        for name, form in _SHOWN.items():
            if name in self._shown:
                parts.append(form.format(self._shown[name]))
        if math.isfinite(left):
            parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def close(self) -> None:
        """Close the files; what a full disk keeps from being written is lost."""
        if self._tracker is not None:
            self._tracker.finish()
        for file in (self._text, self._metrics, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
