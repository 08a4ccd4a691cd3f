"""What the study of objectives keeps of each model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.studies.machine import Machine

__all__ = [
    "ObjectiveResult",
    "Point",
    "read_results",
    "require_same",
    "PICTURE",
    "result_path",
    "write_result",
]

PICTURE = ".webp"  # of the sheets, which lie beside the results


class Point(Config):
    """What a model draws in so many steps.

    Attributes:
        steps: Of the sampler.
        guidance_scale: 1 is none.
        kid: Of MobileNetV2's features, against the real pictures.
        class_accuracy: Share of the pictures that show the class that was asked for.
        retrieval: Share whose features are nearest to the mean features of that class.
    """

    steps: int
    guidance_scale: float
    kid: float
    class_accuracy: float
    retrieval: float


class ObjectiveResult(Document):
    """A trained model and its measures.

    Attributes:
        objective: Its name in the study.
        overrides: Of the recipe ``emoji-class``, by the objective.
        settings: Further overrides, the same for every model of the study.
        seed: Of the training.
        budget: What every model of the study was given: ``3,000 steps``.
        steps: Of training.
        minutes: Of training.
        pictures: Held-out examples whose classes were asked for.
        sampler: That drew.
        points: Without guidance in more and more steps, and with it.
        real_class_accuracy: Of the held-out examples themselves.
        real_retrieval: Of the same.
        machine: That trained and measured.
    """

    objective: str
    overrides: tuple[str, ...]
    settings: tuple[str, ...] = ()
    seed: int
    budget: str
    steps: int
    minutes: float
    pictures: int
    sampler: str
    points: tuple[Point, ...]
    real_class_accuracy: float
    real_retrieval: float
    machine: Machine


def result_path(output: Path, objective: str, seed: int) -> Path:
    """Return where a result lies."""
    return output / f"{objective}-seed{seed}.json"


def write_result(path: Path, result: ObjectiveResult) -> None:
    """Write one result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())


def read_results(output: Path) -> list[ObjectiveResult]:
    """Read what the study has found so far, by name and seed.

    Raises:
        CheckpointError: If a file is damaged.
        ConfigError: If a file holds something else.
    """
    return sorted(
        (_read(path) for path in output.glob("*-seed*.json")),
        key=lambda result: (result.objective, result.seed),
    )


def require_same(
    output: Path,
    results: Sequence[ObjectiveResult],
    budget: str,
    pictures: int,
    settings: Sequence[str],
) -> None:
    """Refuse to lay models of unequal means beside one another.

    Raises:
        ConfigError: If a result had another budget or settings, or was measured by other pictures.
    """
    wanted = _means(budget, pictures, settings)
    for result in results:
        if (found := _means(result.budget, result.pictures, result.settings)) != wanted:
            raise ConfigError(
                f"{output}: {result.objective}, seed {result.seed}, has {found}, not {wanted}; use"
                " the same ones, or another --output"
            )


def _means(budget: str, pictures: int, settings: Sequence[str]) -> str:
    return " and ".join([budget, f"{pictures} pictures", *settings])


def _read(path: Path) -> ObjectiveResult:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged; delete it to measure anew: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: damaged; delete it to measure anew")
    return ObjectiveResult.from_dict(cast(dict[str, Any], data), str(path))
