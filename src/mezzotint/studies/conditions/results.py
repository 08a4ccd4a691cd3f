"""What the study of conditions keeps of each model."""

import json
import math
from pathlib import Path
from typing import Any, cast

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document
from mezzotint.errors import CheckpointError
from mezzotint.studies.machine import Machine

__all__ = [
    "PICTURE",
    "ConditionResult",
    "GuidedResult",
    "MeasuredGap",
    "read_guided",
    "read_result",
    "write_result",
]


PICTURE = ".webp"  # of the sheets, which lie beside the results


class MeasuredGap(Config):
    """One measure of a model: with its condition, without it, and of real pictures.

    Attributes:
        name: What is measured.
        null: Of what the same model drew when its condition was the null.
        drawn: Of what it drew under the condition.
        real: Of the real pictures that the conditions were taken from.
    """

    name: str
    null: float
    drawn: float
    real: float

    @property
    def closed(self) -> float:
        """The share of the gap between the null and real pictures that the condition closes.

        It is not a number where there is no gap.
        """
        gap = self.real - self.null
        return (self.drawn - self.null) / gap if gap else math.nan


class ConditionResult(Document):
    """A trained model and its measures.

    Attributes:
        condition: Its name in the study.
        recipe: What trained it.
        initial: The condition of the model whose weights it began from, if it did.
        parameters: Of UNet and conditioner.
        steps: Of training.
        minutes: Of training.
        pictures: Held-out examples that were asked for.
        gaps: Each is to be closed by half at least.
        further: Other numbers, by what they are.
        machine: That trained and measured.
    """

    condition: str
    recipe: str
    initial: str | None = None
    parameters: int
    steps: int
    minutes: float
    pictures: int
    gaps: tuple[MeasuredGap, ...]
    further: dict[str, float] = {}
    machine: Machine


class GuidedResult(Document):
    """What an unconditional model does when it is led to small pictures.

    Attributes:
        side: Of the small pictures, in pixels.
        steps: Of the sampler.
        sampler: Its name.
        targets: How many.
        each: Pictures led to each.
        chance_psnr: Of the small pictures to each other, in dB.
        guided_psnr: Of what was led, made small, to its target.
        least_guided_psnr: The least of these.
        real_psnr: The same where the targets are held-out real pictures.
        between_guided: Mean perceptual distance of two pictures that were led to one target.
        to_true_draw: Mean perceptual distance of these to the picture that the target came from.
        between_plain: Mean perceptual distance of two pictures that nothing led.
        machine: That measured.
    """

    side: int
    steps: int
    sampler: str
    targets: int
    each: int
    chance_psnr: float
    guided_psnr: float
    least_guided_psnr: float
    real_psnr: float
    between_guided: float
    to_true_draw: float
    between_plain: float
    machine: Machine

    @property
    def diversity_left(self) -> float:
        """The share of the diversity that is left of what the target allows."""
        return self.between_guided / self.to_true_draw


def write_result(path: Path, result: ConditionResult | GuidedResult) -> None:
    """Write one result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())


def read_result(path: Path) -> ConditionResult:
    """Read a result of a condition.

    Raises:
        CheckpointError: If the file is damaged.
        ConfigError: If it holds something else.
    """
    return ConditionResult.from_dict(_read(path), str(path))


def read_guided(path: Path) -> GuidedResult:
    """Read the result of leading an unconditional model; raises as `read_result`."""
    return GuidedResult.from_dict(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged; delete it to measure anew: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: damaged; delete it to measure anew")
    return cast(dict[str, Any], data)
