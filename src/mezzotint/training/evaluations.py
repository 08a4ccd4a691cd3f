"""Evaluations while a model is trained: cards, numbers for the log, and the best model."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints.adapters import AdapterSet
from mezzotint.checkpoints.folder import write_atomically
from mezzotint.checkpoints.lora import read_lora
from mezzotint.data import EmojiDataConfig, FolderDataConfig
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.evaluation.card import EvaluationCard, incomparable
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.protocol import EvaluationProtocol, Metric
from mezzotint.evaluation.reference import Against, RealPictures
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.features import metric_name
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.callbacks import Model
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.log import RunLog
from mezzotint.training.oversight import EvaluationConfig
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.recipe import AutoencoderRecipe

__all__ = ["Evaluations", "Measurement"]

_HIGHER: frozenset[Metric] = frozenset(
    {"inception_score", "precision", "recall", "density", "coverage", "retrieval", "psnr", "ssim"}
)
_LOOKED_AT = 8  # real pictures before training
_PREFERRED: tuple[Metric, ...] = ("kid", "fid", "lpips")
_NAME = re.compile(r"\.?step-(\d+)(\.json)?")
# with which a better number says nothing of the model, where they differ
_DRAWING = (
    "seed",
    "steps",
    "sampler",
    "spacing",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
    "eta",
    "feature_reuse",
    "token_merging",
)


def _preferred(metrics: Sequence[Metric]) -> Metric:
    for metric in _PREFERRED:
        if metric in metrics:
            return metric
    return metrics[0]


@dataclass(frozen=True)
class Measurement:
    """How a recipe's model is measured while it is trained.

    Attributes:
        config: When, by what protocol, against what.
        protocol: By which.
        against: What the pictures are compared with.
        metric: Says which model is the best, as cards name it.
        higher: Whether more of it is better.
    """

    config: EvaluationConfig
    protocol: EvaluationProtocol
    against: Against
    metric: str
    higher: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "Measurement | None":
        """Read it off a recipe, and look whether it can be done; None if it is not wanted.

        Raises:
            ConfigError: If the protocol does not fit, or it is not said what to compare with.
            DataError: If there are no such pictures.
        """
        config, data = recipe.run.evaluation, recipe.data
        if config is None:
            return None
        protocol = config.protocol_for(first_stage=isinstance(recipe, AutoencoderRecipe))
        chosen = config.metric or _preferred(protocol.metrics)
        plain = chosen in ("rate", "psnr", "ssim")
        metric = chosen if plain else metric_name(chosen, protocol.network_of(chosen))
        against: Against | None = config.against
        if against is None and isinstance(data, EmojiDataConfig | FolderDataConfig):
            against = data
        if against is None:
            raise ConfigError(
                "run.evaluation.against: say which pictures to compare with, a folder or"
                f" emoji:SPLIT; data of kind {data.kind!r} cannot be"
            )
        # a wrong path is to be told now, not at the first evaluation
        split = protocol.reference_split
        RealPictures(against, config.split, split, limit=_LOOKED_AT).open(None)
        return cls(config, protocol, against, metric, chosen in _HIGHER)


class Evaluations:
    """Measures the averaged weights, and keeps the best model in ``best/model``.

    Each card is kept as ``evaluations/step-N.json``, the best model's beside it as
    ``best/card.json``. A step that has a card is measured. Torchrun's ranks share the drawing.

    Args:
        measurement: How, and when.
        recipe: What is trained.
        task: Writes the model.
        folder: The run folder.
        log: Where the numbers go.
        device: Where it is measured.
        ranks: This process among the others.
    """

    def __init__(
        self,
        measurement: Measurement,
        recipe: Recipe,
        task: Model,
        folder: Path,
        log: RunLog,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.measurement, self.recipe, self.task, self.folder = measurement, recipe, task, folder
        self.log, self.device, self.ranks = log, device, ranks
        self.place = folder / "evaluations"
        self._due_at: float | None = None
        self._tried: int | None = None

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is time to measure, or was when the run was stopped."""
        config = self.measurement.config
        if config.every_steps is not None:
            return step > 0 and step % config.every_steps == 0 and not self._is_measured(step)
        assert config.every_minutes is not None
        interval = 60 * config.every_minutes
        if self._due_at is None:
            # at whole multiples, whatever stopped and continued the run in between
            self._due_at = (seconds // interval + 1) * interval
            return self._work(step).exists() and not self._is_measured(step)
        if seconds < self._due_at:
            return False
        self._due_at = (seconds // interval + 1) * interval
        if self.ranks.is_first:  # by this it is known to a run that is stopped before it is done
            self._work(step).mkdir(parents=True, exist_ok=True)
        return True

    def run(self, step: int, seconds: float) -> None:
        """Measure the averaged weights as they stand."""
        work = self._work(step)
        self._remove(work / "model")
        self.task.export(work / "model")
        self.ranks.wait()
        self._measure(work / "model", step)

    def on_rewind(self, step: int) -> None:
        """Drop the cards of later steps: they are of another training."""
        self._tried = None
        found = self.place.iterdir() if self.ranks.is_first and self.place.is_dir() else ()
        for path in found:
            if (named := _NAME.fullmatch(path.name)) and int(named[1]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.ranks.wait()

    def on_checkpoint(self, step: int) -> None:
        """Nothing."""

    def on_end(self, step: int) -> None:
        """Measure the model that was written, if it was not measured yet."""
        if not self.ranks.of_first(self._is_measured(step)):
            self._measure(self.folder / "model", step)

    def _is_measured(self, step: int) -> bool:
        return step == self._tried or self._card(step).is_file()

    def _card(self, step: int) -> Path:
        return self.place / f"step-{step:07d}.json"

    def _work(self, step: int) -> Path:
        """Where the model and its pictures are while it is measured."""
        return self.place / f".step-{step:07d}"

    def _remove(self, place: Path) -> None:
        if self.ranks.is_first:
            shutil.rmtree(place, ignore_errors=True)
        self.ranks.wait()

    def _measure(self, model: Path, step: int) -> None:
        self._tried = step
        config = self.measurement.config
        options: dict[str, Any] = {}
        if not isinstance(self.recipe, AutoencoderRecipe | DecoderRecipe):
            scale = config.guidance_scale
            options = {
                "steps": config.steps or self.recipe.sample_steps,
                "guidance_scale": self.recipe.guidance_scale if scale is None else scale,
                "spacing": "trailing",
                "work": self._work(step) / "work",
            }
            self._remove(self._work(step) / "work")
        try:
            card = evaluate(
                self._whole(model),
                self.measurement.against,
                self.measurement.protocol,
                samples=config.samples,
                split=config.split,
                device=str(self.device),
                **options,
            )
            if self.ranks.is_first:
                self._keep(card, model, step)
        except MezzotintError as error:
            # it costs the run nothing but its numbers
            self.log.warn(step, "evaluation", f"step {step:,} cannot be evaluated: {error}")
        finally:
            self.ranks.wait()  # the others read from it what the first has found
            self._remove(self._work(step))

    def _whole(self, model: Path) -> Path | Pipeline:
        """What is measured: the model, or of a LoRA its base on which it acts."""
        recipe = self.recipe
        if not isinstance(recipe, FinetuneRecipe) or recipe.method != "lora":
            return model
        base, adapter = recipe.base, read_lora(model)
        pipeline = load(
            Path(base.model).expanduser(),
            str(self.device),
            config=None if base.config is None else Path(base.config).expanduser(),
            family=base.family,
            prediction=base.prediction,
            weights=base.weights,
        )
        both = f"{pipeline.model_hash} {adapter.sha256}"
        pipeline.model_hash = hashlib.sha256(both.encode()).hexdigest()
        pipeline.model.image_size = (recipe.data.resolution, recipe.data.resolution)
        AdapterSet(pipeline.model).apply(adapter)
        return pipeline

    def _keep(self, card: EvaluationCard, model: Path, step: int) -> None:
        values = {f"evaluation/{name}": number.value for name, number in card.numbers.items()}
        self.log.numbers(step, values)
        metric = self.measurement.metric
        value = values.get(f"evaluation/{metric}")
        if value is None:
            why = card.left_out.get(metric.partition("_")[0], "it is not measured")
            self.log.warn(step, "best", f"no best model is kept by {metric}: {why}")
        else:
            self._compare(card, model, step, value)
        card.write(self._card(step))  # after all that a killed process would have to do again

    def _compare(self, card: EvaluationCard, model: Path, step: int, value: float) -> None:
        best, higher = self._best(card), self.measurement.higher
        said = f"step {step:,}: {self.measurement.metric} {value:.4g}"
        if best is not None and not (value > best if higher else value < best):
            self.log.event(f"{said}; the best was {best:.4g}")
            return
        self.log.event(f"{said}, the best so far, is kept in {self.folder / 'best'}")
        self._replace_best(card, model, step, value)

    def _best(self, card: EvaluationCard) -> float | None:
        """The best value so far; None if there is none that a card can be compared with."""
        folder = self.folder / "best"
        if not folder.exists():
            return None
        try:
            record = json.loads((folder / "best.json").read_text(encoding="utf-8"))
            reasons = _unlike(EvaluationCard.read(folder / "card.json"), card)
            if record["metric"] != self.measurement.metric:
                reasons = [f"metric ({record['metric']} against {self.measurement.metric})"]
            value = float(record["value"])
        except (OSError, ValueError, KeyError, TypeError, MezzotintError) as error:
            reasons, value = [f"its record cannot be read: {error}"], 0.0
        if not reasons:
            return value
        self.log.event(
            f"the best model until now does not count: it was measured otherwise,"
            f" {'; '.join(reasons)}"
        )
        return None

    def _replace_best(self, card: EvaluationCard, model: Path, step: int, value: float) -> None:
        """Put a model in the place of the best one; a whole one is there but for an instant."""
        best, new = self.folder / "best", self.folder / ".best.tmp"
        old = self.folder / ".best.old"
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(model, new / "model")
        card.write(new / "card.json")
        record = {"step": step, "metric": self.measurement.metric, "value": value}
        write_atomically(new / "best.json", (json.dumps(record, indent=1) + "\n").encode())
        if best.exists():
            best.rename(old)
        new.rename(best)
        shutil.rmtree(old, ignore_errors=True)


def _unlike(old: EvaluationCard, new: EvaluationCard) -> list[str]:
    """Why the numbers of two models cannot say which is the better one."""
    reasons = incomparable(old, new)
    if old.drawn_with is not None and new.drawn_with is not None:
        for name in _DRAWING:
            a, b = getattr(old.drawn_with, name), getattr(new.drawn_with, name)
            if a != b:
                reasons.append(f"{name} ({a} against {b})")
    return reasons
