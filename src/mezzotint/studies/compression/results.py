"""What the compression study does and what it found, as typed values that lie on the disk."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document, read_yaml, to_yaml
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.studies.compression.recipes import RESOLUTION, STAGES

__all__ = [
    "CompressionStudy",
    "DiffusionResult",
    "FirstStageResult",
    "Machine",
    "Point",
    "claim",
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
        steps: Of the sampler.
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
        seeds: One UNet is trained in each latent space for each.
    """

    resolution: int = Field(default=RESOLUTION, ge=32, multiple_of=32)
    first_stage_minutes: float = Field(default=4.0, gt=0)
    diffusion_minutes: float = Field(default=4.0, gt=0)
    points: int = Field(default=4, ge=1)
    samples: int = Field(default=256, ge=8)
    steps: int = Field(default=20, ge=1)
    sampler: str = "dpmpp_2m"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)

    def scaled(self, scale: float) -> "CompressionStudy":
        """Return the study with so many times the minutes of training and the pictures."""
        data = self.to_dict()
        for key in ("first_stage_minutes", "diffusion_minutes"):
            data[key] *= scale
        data["samples"] = max(8, round(self.samples * scale))
        return CompressionStudy.from_dict(data, "study")


class Machine(Config):
    """What a run ran on: minutes mean nothing without it."""

    processor: str
    threads: int
    device: str
    precision: str


class FirstStageResult(Document):
    """One first stage: what it costs and what it keeps.

    Attributes:
        stage: Its name.
        parameters: Of encoder and decoder.
        steps: Of training.
        minutes: Of training.
        images_per_second: While training; None for the identity.
        weights: Hash of the weights.
        scores: `mezzotint.evaluation.reconstruction.ReconstructionScores` on the validation emoji.
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


def result_path(output: Path, stage: str, seed: int | None = None) -> Path:
    """Return where the result of a first stage lies, or with a seed that of a UNet on it."""
    name = stage if seed is None else f"{stage}-seed{seed}"
    return output / "runs" / f"{name}.json"


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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged; delete it to measure anew: {error}") from None
        if data.get("kind") == "diffusion":
            diffusions.append(DiffusionResult.from_dict(data, str(path)))
        else:
            first_stages.append(FirstStageResult.from_dict(data, str(path)))
    order = [stage.name for stage in STAGES]
    first_stages.sort(key=lambda result: order.index(result.stage))
    diffusions.sort(key=lambda result: (order.index(result.stage), result.seed))
    return first_stages, diffusions


def claim(study: CompressionStudy, output: Path) -> None:
    """Make the folder the study's; other seeds may be added to a study later.

    Raises:
        ConfigError: If the results there are of a study with other settings.
    """
    record = output / "study.yaml"
    if record.is_file():
        stored = CompressionStudy.from_dict(read_yaml(record), str(record))
        ours, theirs = study.to_dict(), stored.to_dict()
        different = [key for key in ours if key != "seeds" and ours[key] != theirs[key]]
        if different:
            raise ConfigError(
                f"{output}: holds results of a study with other values of {', '.join(different)};"
                " use the same ones, or another --output"
            )
        study = study.model_copy(update={"seeds": tuple({*stored.seeds, *study.seeds})})
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(record, to_yaml(study).encode())
