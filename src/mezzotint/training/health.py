"""The health of a run: gauges over time, warnings, and one way back from a loss that is lost."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.device import Execution
from mezzotint.training.gauges import counted, peak_flops
from mezzotint.training.log import RunLog
from mezzotint.training.oversight import HealthConfig
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.symptoms import READ, Facts, Symptom, Window, needed, symptoms_of

__all__ = ["Health", "Rollback", "Sample", "Trouble"]

Sample = tuple[int, str]  # its index in the data, and what messages call it

# a window has at least so many of both: fewer would be ruled by chance
_STEPS, _IMAGES = 10, 64
_LAST = {"codes_used", "codes_perplexity", "vectors_per_code", "ema_distance", "learning_rate"}
_SAFER = (
    "no single sample causes it: lower optimizer.learning_rate, or set precision=float32 (or"
    " bfloat16 in place of float16)"
)
_REPORTED = 10  # rows of the report
_GAUGES = ("loss", "unexplained", "gradient_norm", "learning_rate", "latent_std", "psnr")


@dataclass(frozen=True)
class Trouble:
    """Why a run cannot go on as it does.

    Attributes:
        step: Steps done before the one that shows it.
        since: Up to this step all was well.
        text: What happened, in words.
        remedy: What to change in the recipe, in words.
        lost: Whether the loss or its gradient is no number.
    """

    step: int
    since: int
    text: str
    remedy: str
    lost: bool = False


@dataclass(frozen=True)
class Rollback:
    """A way back that was taken; part of every later checkpoint.

    Attributes:
        step: Where the trouble showed itself.
        to: The step that it went back to.
        text: Why.
        samples: Those that are left out since.
        learning_rate_factor: What the learning rate is multiplied by since.
    """

    step: int
    to: int
    text: str
    samples: tuple[Sample, ...] = ()
    learning_rate_factor: float = 1.0

    @property
    def remedy(self) -> str:
        """What was done, in words."""
        if self.samples:
            return f"without {names_of(self.samples)}"
        return f"with {self.learning_rate_factor:g} times the learning rate"

    def plain(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**vars(self), "samples": [list(sample) for sample in self.samples]}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Rollback":
        """Take back what `plain` gave."""
        samples = tuple((int(index), str(name)) for index, name in values["samples"])
        known: dict[str, Any] = {**values, "samples": samples}
        return cls(**known)


def names_of(samples: Sequence[Sample]) -> str:
    """Name samples as messages do, the first eight of them."""
    named = ", ".join(f"{name} (image {index})" for index, name in samples[:8])
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return f"{named}{more}"


class Health:
    """Watches a run; on all ranks alike, from averages over all of them.

    Args:
        config: What is done.
        log: Where warnings go.
        execution: Device and precision.
        images_per_step: Images that a step sees.
        facts: Of the recipe; None says nothing but that a loss is no number.
        before: What the recipe and its data show before the first step.
        compiled: Whether torch compiles the network, whose arithmetic then cannot be counted.
        ranks: This process among the others.

    Attributes:
        rollbacks: The ways back that were taken.
        told: The names of the warnings that were given.
    """

    def __init__(
        self,
        config: HealthConfig,
        log: RunLog,
        execution: Execution,
        *,
        images_per_step: int,
        facts: Facts | None = None,
        before: Sequence[Symptom] = (),
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.log, self.facts, self.ranks = config, log, facts, ranks
        self.before = before
        self.execution, self.images_per_step, self.compiled = execution, images_per_step, compiled
        self.rollbacks: list[Rollback] = []
        self.told: set[str] = set()
        self._begun = 0  # where the training began, or went on, of which the windows tell
        self._steps: list[tuple[int, Tensor | float, Tensor | float]] = []
        self._rows: deque[Mapping[str, float]] = deque(maxlen=_REPORTED)
        self._windows: list[Window] = []
        self._open: list[tuple[int, Mapping[str, float]]] = []
        self._to_count = False
        self._counted: frozenset[str] = frozenset()  # the values of the step that was counted

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        seen = {
            "windows": [vars(window) for window in self._windows],
            "open": [[count, values] for count, values in self._open],
            "told": sorted(self.told),
            "begun": self._begun,
        }
        return {"rollbacks": [rollback.plain() for rollback in self.rollbacks], "seen": seen}

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Take back what `state` gave at a step; older checkpoints have ``rollbacks`` alone."""
        self.rollbacks = [Rollback.of(values) for values in state.get("rollbacks", ())]
        seen = state.get("seen", {})
        self._windows = [Window(**values) for values in seen.get("windows", ())]
        self._open = [(count, values) for count, values in seen.get("open", ())]
        self.told, self._begun = set(seen.get("told", ())), seen.get("begun", step)

    def begin(self) -> None:
        """Say what was seen before the first step, if it was not said when the run began."""
        for symptom in self.before:
            self.warn(symptom, 0)

    @property
    def judges(self) -> bool:
        """Whether anything but a loss that is no number is seen to be bad."""
        return self.facts is not None

    @property
    def well_until(self) -> int:
        """The last step that nothing seen later can show to have been bad.

        `Trouble.since` is never before it: the error may have risen in the last two windows.
        """
        if len(self._windows) > 1:
            return self._windows[-2].last
        return self._windows[0].last if self._windows else self._begun

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return math.prod(rollback.learning_rate_factor for rollback in self.rollbacks)

    @property
    def excluded(self) -> set[int]:
        """The samples that are left out."""
        return {index for rollback in self.rollbacks for index, _ in rollback.samples}

    def warn(self, symptom: Symptom, step: int) -> None:
        """Say what is wrong, if it was not said before and warnings are wanted."""
        if self.config.warnings and symptom.name not in self.told:
            self.told.add(symptom.name)
            self.log.warn(step, symptom.name, symptom.text)

    def step(
        self, number: int, work: Callable[[], Mapping[str, Tensor | float]]
    ) -> Mapping[str, Tensor | float]:
        """Do a step, and keep its loss and gradient until they are looked at.

        Its arithmetic is counted once, and again when something joins it; not before the first row
        of the log, so that a run of few steps is not delayed by it.

        Args:
            number: Steps done before it.
            work: Does it; returns its values for the log.
        """
        if self._to_count:
            values, flops = counted(work)
            self.log.peak_seconds = flops / peak_flops(self.execution)
            self._counted, self._to_count = frozenset(values), False
        else:
            values = work()
            joined = bool(self._rows) and not self._counted.issuperset(values)
            self._to_count = joined and self.config.arithmetic and not self.compiled
        kept = [values["loss"], values.get("gradient_norm", 0.0)]
        loss, norm = (v.detach() if isinstance(v, Tensor) else v for v in kept)
        self._steps.append((number, loss, norm))
        return values

    def lost(self) -> Trouble | None:
        """Return at which step since the last call the loss was first no number."""
        steps, self._steps = self._steps, []
        if not steps:
            return None
        numbers = torch.stack([_scalar(v) for _, *pair in steps for v in pair]).view(-1, 2)
        finite = torch.isfinite(numbers)
        # a scaled gradient that overflows is what its scaler is there for
        if self.execution.precision is torch.float16:
            finite = finite[:, :1]
        bad = (~finite.all(dim=1)).nonzero().flatten().tolist()
        mine = float(steps[bad[0]][0]) if bad else math.inf
        first = -self.ranks.largest([-mine])[0]
        if math.isinf(first):
            return None
        text = f"step {int(first) + 1:,}: the loss or its gradient is no longer a number"
        return Trouble(int(first), int(first), text, _SAFER, lost=True)

    def observe(self, first: int, last: int, values: Mapping[str, float]) -> Trouble | None:
        """Look at a row of the log.

        Args:
            first: Steps done before those that it averages.
            last: Steps done after them.
            values: The row.

        Returns:
            What makes it useless to go on, if anything does.
        """
        self._rows.append({"step": last, **values})
        if self.facts is None or "unexplained" not in values or last <= first:
            return None
        self._open.append((last - first, {k: v for k, v in values.items() if k in READ}))
        steps = sum(count for count, _ in self._open)
        if steps < _STEPS or steps * self.images_per_step < _IMAGES:
            return None
        self._windows.append(Window(last - steps, last, _averaged(self._open)))
        self._windows, self._open = needed(self._windows), []
        for symptom in symptoms_of(self._windows, self.facts):
            self.warn(symptom, last)
            if symptom.diverged:
                return Trouble(last, symptom.since, symptom.text, symptom.remedy)
        return None

    def go_back(self, rollback: Rollback) -> None:
        """Note a way back, and look at the training anew from there."""
        self.rollbacks.append(rollback)
        self._windows, self._open, self._steps = [], [], []
        self._begun = rollback.to

    def report(self, path: Path, trouble: Trouble, samples: Sequence[Sample]) -> str:
        """Write what happened, what was seen before, what was tried and what to change.

        Returns:
            The same in a sentence.
        """
        change = _change(trouble, samples)
        lines = [f"# Training stopped at step {trouble.step:,}", "", f"{trouble.text}.", ""]
        lines += ["## What was tried", ""]
        for done in self.rollbacks:
            lines += [f"- {done.text}. Gone back to step {done.to:,}, {done.remedy}."]
        if not self.rollbacks:
            why = "" if self.config.rollback else ": run.health.rollback is false"
            lines += [f"Nothing{why}."]
        lines += ["", "## What to change", "", f"{change[0].upper()}{change[1:]}.", ""]
        lines += ["## Gauges before it", "", *_table(list(self._rows)), ""]
        if self.ranks.is_first:
            path.write_text("\n".join(lines), encoding="utf-8")
        tried = "; ".join(f"{d.remedy} from step {d.to:,}" for d in self.rollbacks)
        before = f" Tried before: {tried}." if tried else ""
        return f"{trouble.text}.{before} {change[0].upper()}{change[1:]}; see {path}"


def _scalar(value: Tensor | float) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensor.float().reshape(())


def _averaged(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Averages over rows, each weighed by its steps; of a count that goes on, the last."""
    names = {name for _, values in rows for name in values}
    averaged: dict[str, float] = {}
    for name in names:
        told = [(count, values[name]) for count, values in rows if name in values]
        if name in _LAST:
            averaged[name] = told[-1][1]
        else:
            averaged[name] = sum(c * v for c, v in told) / sum(c for c, _ in told)
    return averaged


def _change(trouble: Trouble, samples: Sequence[Sample]) -> str:
    if samples:
        return (
            f"the loss of {names_of(samples)} alone is no number with weights that are good for"
            " others: mend or remove these samples, and delete the folder latents/ of the run if"
            " there is one"
        )
    return f"{trouble.remedy}, and start anew with another --output"


def _table(rows: Sequence[Mapping[str, float]]) -> list[str]:
    names = ["step", *(name for name in _GAUGES if any(name in row for row in rows))]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        cells = [f"{row[n]:.4g}" if n in row else "" for n in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if rows else ["None yet."]
