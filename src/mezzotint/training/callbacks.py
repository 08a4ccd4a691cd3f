"""What is done beside training, at intervals: sheets of samples, and evaluations."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.data import EmojiDataConfig, FolderDataConfig
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.protocol import Metric
from mezzotint.evaluation.reference import Against, RealPictures
from mezzotint.models.features import metric_name
from mezzotint.training.finetune_recipe import Recipe
from mezzotint.training.log import RunLog
from mezzotint.training.oversight import EvaluationConfig
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe

__all__ = ["Callback", "Evaluations", "Model", "SampleSheets"]

_HIGHER: frozenset[Metric] = frozenset(
    {"inception_score", "precision", "recall", "density", "coverage", "retrieval", "psnr", "ssim"}
)
_LOOKED_AT = 8  # real pictures before training
_PREFERRED: tuple[Metric, ...] = ("kid", "fid", "lpips")


def _preferred(metrics: Sequence[Metric]) -> Metric:
    for metric in _PREFERRED:
        if metric in metrics:
            return metric
    return metrics[0]


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

    def on_checkpoint(self, step: int) -> None:
        """Nothing."""

    def on_end(self, step: int) -> None:
        """Draw one."""
        self.task.draw_samples(self.folder / f"step-{step:07d}.png")


class Evaluations:
    """Measures the averaged weights, and keeps the best model in ``best/model``.

    Each card is kept as ``evaluations/step-N.json``, the best model's beside it as
    ``best/card.json``. Torchrun's ranks share the drawing.

    Args:
        config: When, by what protocol, against what.
        recipe: What is trained.
        task: Writes the model.
        folder: The run folder.
        log: Where the numbers go.
        device: Where it is measured.
        ranks: This process among the others.

    Raises:
        ConfigError: If the protocol does not fit, or it is not said what to compare with.
        DataError: If there are no such pictures.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        recipe: Recipe,
        task: Model,
        folder: Path,
        log: RunLog,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.recipe, self.task, self.folder = config, recipe, task, folder
        self.log, self.device, self.ranks = log, device, ranks
        first_stage = isinstance(recipe, AutoencoderRecipe)
        self.protocol = config.protocol_for(first_stage=first_stage)
        chosen = config.metric or _preferred(self.protocol.metrics)
        self.higher = chosen in _HIGHER
        plain = chosen in ("rate", "psnr", "ssim")
        network = self.protocol.network_of(chosen)
        self.metric = chosen if plain else metric_name(chosen, network)
        data = recipe.data
        if config.against is None and not isinstance(data, EmojiDataConfig | FolderDataConfig):
            raise ConfigError(
                "run.evaluation.against: say which pictures to compare with, a folder or"
                f" emoji:SPLIT; data of kind {data.kind!r} cannot be"
            )
        # a wrong path is to be told now, not at the first evaluation
        split = self.protocol.reference_split
        RealPictures(self.against, config.split, split, limit=_LOOKED_AT).open(None)
        self._due_at: float | None = None
        self._measured: int | None = None

    @property
    def against(self) -> Against:
        """What the pictures are compared with."""
        if self.config.against is not None:
            return self.config.against
        assert isinstance(self.recipe.data, EmojiDataConfig | FolderDataConfig)
        return self.recipe.data

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is time to measure."""
        config = self.config
        if self._measured is None:
            self._measured = step  # where a run begins, or goes on, is not measured
        if config.every_steps is not None:
            return step % config.every_steps == 0 and step != self._measured
        assert config.every_minutes is not None
        interval = 60 * config.every_minutes
        if self._due_at is None:
            # at whole multiples, whatever stopped and continued the run in between
            self._due_at = (seconds // interval + 1) * interval
        if seconds < self._due_at:
            return False
        self._due_at = (seconds // interval + 1) * interval
        return True

    def run(self, step: int, seconds: float) -> None:
        """Measure the averaged weights as they stand."""
        place = self.folder / "evaluations" / ".model"
        self._remove(place)
        self.task.export(place)
        self.ranks.wait()
        self._measure(place, step)
        self._remove(place)

    def on_checkpoint(self, step: int) -> None:
        """Nothing."""

    def on_end(self, step: int) -> None:
        """Measure the model that was written, if it was not just measured."""
        self.ranks.wait()
        if step != self._measured:
            self._measure(self.folder / "model", step)

    def _remove(self, place: Path) -> None:
        if self.ranks.is_first:
            shutil.rmtree(place, ignore_errors=True)
        self.ranks.wait()

    def _measure(self, model: Path, step: int) -> None:
        self._measured = step
        config, work = self.config, self.folder / "evaluations" / ".work"
        options: dict[str, Any] = {}
        if isinstance(self.recipe, DiffusionRecipe):
            scale = config.guidance_scale
            options = {
                "steps": config.steps or self.recipe.sample_steps,
                "guidance_scale": self.recipe.guidance_scale if scale is None else scale,
                "spacing": "trailing",
                "work": work,
            }
            self._remove(work)
        try:
            card = evaluate(
                model,
                self.against,
                self.protocol,
                samples=config.samples,
                split=config.split,
                device=str(self.device),
                **options,
            )
        except MezzotintError as error:
            # it costs the run nothing but its numbers
            self.log.warn(step, "evaluation", f"step {step:,} cannot be evaluated: {error}")
            return
        finally:
            self._remove(work)
        if self.ranks.is_first:
            self._keep(card, model, step)
        self.ranks.wait()

    def _keep(self, card: EvaluationCard, model: Path, step: int) -> None:
        card.write(self.folder / "evaluations" / f"step-{step:07d}.json")
        values = {f"evaluation/{name}": number.value for name, number in card.numbers.items()}
        self.log.numbers(step, values)
        value = values.get(f"evaluation/{self.metric}")
        if value is None:
            why = card.left_out.get(self.metric.partition("_")[0], "it is not measured")
            self.log.warn(step, "best", f"no best model is kept by {self.metric}: {why}")
            return
        best = self._best()
        better = best is None or (value > best if self.higher else value < best)
        said = f"step {step:,}: {self.metric} {value:.4g}"
        if not better:
            self.log.event(f"{said}; the best was {best:.4g}")
            return
        self.log.event(f"{said}, the best so far, is kept in {self.folder / 'best'}")
        self._replace_best(card, model, step, value)

    def _best(self) -> float | None:
        try:
            record = json.loads((self.folder / "best" / "best.json").read_text(encoding="utf-8"))
            return float(record["value"]) if record["metric"] == self.metric else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _replace_best(self, card: EvaluationCard, model: Path, step: int, value: float) -> None:
        """Put a model in the place of the best one; a whole one is there but for an instant."""
        best, new = self.folder / "best", self.folder / ".best.tmp"
        old = self.folder / ".best.old"
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(model, new / "model")
        card.write(new / "card.json")
        record = {"step": step, "metric": self.metric, "value": value}
        write_atomically(new / "best.json", (json.dumps(record, indent=1) + "\n").encode())
        if best.exists():
            best.rename(old)
        new.rename(best)
        shutil.rmtree(old, ignore_errors=True)
