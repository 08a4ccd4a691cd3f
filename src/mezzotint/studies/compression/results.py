"""What the compression study does and what it found, as typed values that lie on the disk."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document, read_yaml, to_yaml
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.studies.compression.recipes import RESOLUTION, STAGES, find_stage
from mezzotint.studies.machine import Machine

__all__ = [
    "CompressionStudy",
    "DiffusionResult",
    "FirstStageResult",
    "Point",
    "claim",
    "first_stage_result",
    "read_results",
    "result_path",
    "write_result",
]


class CompressionStudy(Document):
    """What the study does; written beside the results, which belong to it alone.

    Attributes:
        resolution: Side of the emoji in pixels.
        first_stage_minutes: Of training for each first stage.
        diffusion_minutes: Of training for each UNet.
        points: How often in that time its pictures are measured, evenly spaced.
        samples: Pictures drawn for each of these.
        reference_samples: Training emoji that they are compared with, evenly spread; None is all.
        steps: Of the sampler.
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
        seeds: One UNet is trained in each latent space for each.
    """

    resolution: int = Field(default=RESOLUTION, ge=32, multiple_of=32)
    first_stage_minutes: float = Field(default=3.5, gt=0)
    diffusion_minutes: float = Field(default=2.5, gt=0)
    points: int = Field(default=3, ge=1)
    samples: int = Field(default=192, ge=8)
    reference_samples: int | None = Field(default=None, ge=8)
    steps: int = Field(default=12, ge=1)
    sampler: str = "dpmpp_2m"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(seeds)))

    def scaled(self, scale: float) -> "CompressionStudy":
        """Return the study with so many times the minutes of training and the pictures."""
        data = self.to_dict()
        for key in ("first_stage_minutes", "diffusion_minutes"):
            data[key] *= scale
        data["samples"] = max(8, round(self.samples * scale))
        return CompressionStudy.from_dict(data, "study")


class FirstStageResult(Document):
    """One first stage: what it costs and what it keeps.

    Attributes:
        stage: Its name.
        parameters: Of encoder and decoder.
        steps: Of training.
        minutes: Of training.
        images_per_second: While training; None for the identity.
        weights: Hash of the weights.
        scores: `mezzotint.evaluation.reconstruction.ReconstructionScores` on the validation emoji;
            the PSNR of the identity, which is infinite, is None.
        machine: What it was trained on.
    """

    kind: Literal["first_stage"] = "first_stage"
    stage: str
    parameters: int
    steps: int
    minutes: float
    images_per_second: float | None
    weights: str
    scores: dict[str, Any]
    machine: Machine


class Point(Config):
    """The quality of a model after so much training."""

    step: int
    minutes: float
    card: EvaluationCard


class DiffusionResult(Document):
    """One UNet in the latent space of one first stage.

    Attributes:
        stage: The first stage's name.
        seed: Of the UNet's training.
        first_stage_weights: Hash of the first stage that it was trained on.
        parameters: Of the UNet.
        gflops: Of one call of the UNet for one picture, multiplications and additions.
        images_per_second: While training.
        sampling_seconds: For one picture at the study's steps, decoding included.
        points: In the order of training.
        machine: What it was trained on.
    """

    kind: Literal["diffusion"] = "diffusion"
    stage: str
    seed: int
    first_stage_weights: str
    parameters: int
    gflops: float
    images_per_second: float
    sampling_seconds: float
    points: tuple[Point, ...]
    machine: Machine


def result_path(output: Path, stage: str, seed: int | None = None, weights: str = "") -> Path:
    """Return where a result lies.

    Args:
        output: Folder of the results.
        stage: Name of the first stage.
        seed: Of the UNet on it; None is the first stage itself.
        weights: Hash of a first stage that had to be trained once more, beside the first.
    """
    parts = [stage, f"seed{seed}" if seed is not None else "", weights[:6]]
    return output / "runs" / f"{'-'.join(part for part in parts if part)}.json"


def first_stage_result(output: Path, stage: str, weights: str) -> Path:
    """Return where the result of a first stage with certain weights lies, or shall lie."""
    path = result_path(output, stage)
    if path.is_file():
        found = _read_result(path)
        if isinstance(found, FirstStageResult) and found.weights != weights:
            return result_path(output, stage, weights=weights)
    return path


def write_result(path: Path, result: FirstStageResult | DiffusionResult) -> None:
    """Write one result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())


def read_results(output: Path) -> tuple[list[FirstStageResult], list[DiffusionResult]]:
    """Read what a study has found so far, in the order of the study.

    Raises:
        CheckpointError: If a file is damaged.
        ConfigError: If a file holds something else.
    """
    first_stages: list[FirstStageResult] = []
    diffusions: list[DiffusionResult] = []
    for path in sorted((output / "runs").glob("*.json")):
        result = _read_result(path)
        if isinstance(result, DiffusionResult):
            diffusions.append(result)
        else:
            first_stages.append(result)
    order = [stage.name for stage in STAGES]
    first_stages.sort(key=lambda result: order.index(result.stage))
    diffusions.sort(key=lambda result: (order.index(result.stage), result.seed))
    return first_stages, diffusions


def _read_result(path: Path) -> FirstStageResult | DiffusionResult:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged; delete it to measure anew: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: damaged; delete it to measure anew")
    kind = DiffusionResult if data.get("kind") == "diffusion" else FirstStageResult
    result = kind.from_dict(cast(dict[str, Any], data), str(path))
    find_stage(result.stage)
    return result


def claim(study: CompressionStudy, folder: Path) -> None:
    """Make a folder of results or of training runs the study's; seeds may be added to it later.

    Raises:
        ConfigError: If what is there belongs to a study with other settings.
    """
    record = folder / "study.yaml"
    if record.is_file():
        stored = CompressionStudy.from_dict(read_yaml(record), str(record))
        ours, theirs = study.to_dict(), stored.to_dict()
        different = [key for key in ours if key != "seeds" and ours[key] != theirs[key]]
        if different:
            raise ConfigError(
                f"{folder}: belongs to a study with other values of {', '.join(different)};"
                " use the same ones, or other folders for --output and --work"
            )
        seeds = tuple(sorted({*stored.seeds, *study.seeds}))
        study = study.model_copy(update={"seeds": seeds})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, to_yaml(study).encode())
