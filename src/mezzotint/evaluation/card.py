"""The card beside a number: all that one must know to believe it, repeat it or compare it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field

import mezzotint
from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document
from mezzotint.errors import DataError
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.generation.request import FeatureReuse

__all__ = [
    "Cost",
    "Difference",
    "DrawnWith",
    "EvaluationCard",
    "NetworkRecord",
    "Number",
    "PictureRecord",
    "compare",
    "incomparable",
    "versions",
]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Number(Config):
    """A measured value and how sure it is; no standard error where the protocol tells none."""

    value: Finite
    standard_error: Finite | None = None


class NetworkRecord(Config):
    """A feature network and the SHA-256 of the weights that it had."""

    name: str
    weights_sha256: str


class PictureRecord(Config):
    """A set of pictures.

    Attributes:
        description: What the user called them.
        fingerprint: Hash of their content, size and order; for pictures that a model drew, of all
            that decided them.
        count: How many were measured.
        available: How many there were to choose from.
        height: In pixels, as measured.
        width: In pixels, as measured.
        split: The part of a data set that they are.
        converted: How many were not plain 8-bit RGB, by kind: ``grey``, ``transparent``
            (composited on white), ``other``.
        broken: How many could not be read and were skipped.
    """

    description: str
    fingerprint: str
    count: Count
    available: Count
    height: Count
    width: Count
    split: str | None = None
    converted: dict[str, int] = {}
    broken: Count = 0


class DrawnWith(Config):
    """What a model's pictures were drawn with; picture k has ``seed + k``.

    Attributes:
        model: What the user called it.
        model_hash: Of every weight of the model.
        task: What it draws from.
        conditions: Where captions or classes came from, in words; None for an unconditional model.
        seed: Of the first picture.
        last_seed: Of the last one.
        steps: Steps of the sampler.
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
        spacing: Of its noise levels.
        guidance_scale: 1 is no guidance.
        guidance_rescale: In [0, 1].
        guidance_interval: Noise levels outside which there was no guidance; None is everywhere.
        eta: Fresh noise of the DDIM family; None is the sampler's default.
        feature_reuse: In which steps deep features were those of another; None is in no step.
        token_merging: The share of tokens that were merged.
        precision: What was computed in.
        engine: What ran the networks.
        quantization: What large weights of the UNet were rounded to, if they were.
        decoder: The sha256 of a small decoder in place of the model's own.
        device: torch's name for the kind of device.
    """

    model: str
    model_hash: str
    task: str
    conditions: str | None
    seed: int
    last_seed: int
    steps: int
    sampler: str
    spacing: str
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None = None
    eta: float | None
    feature_reuse: FeatureReuse | None = None
    token_merging: float = 0.0
    precision: str
    engine: str = "torch"
    quantization: str = "none"
    decoder: str | None = None
    device: str


class Cost(Config):
    """What one picture took one process.

    Attributes:
        pictures_seconds: To draw it, or to read it from its file; for a first stage all of it.
        features_seconds: To see it through the feature networks.
        processes: How many shared the work.
        threads: Of the processor, that all of them had together.
    """

    pictures_seconds: Seconds | None = None
    features_seconds: Seconds | None = None
    processes: int = 1
    threads: int = 1


class EvaluationCard(Document):
    """Numbers and their protocol, networks, pictures and versions.

    Attributes:
        protocol: Whole, with what was overridden.
        numbers: By name; a name says the feature network unless it is the canonical one.
        left_out: Why a metric of the protocol has no number, by metric.
        networks: Those that the pictures were seen through.
        evaluated: The pictures that are judged.
        reference: The real ones that they are compared with.
        training: Those that nearest_training looks among, if it was asked for.
        drawn_with: If a model drew them.
        versions: Of mezzotint, torch, numpy, torchmetrics and pillow.
        cost: What it took.
    """

    protocol: EvaluationProtocol
    numbers: dict[str, Number]
    left_out: dict[str, str] = {}
    networks: tuple[NetworkRecord, ...]
    evaluated: PictureRecord
    reference: PictureRecord
    training: PictureRecord | None = None
    drawn_with: DrawnWith | None = None
    versions: dict[str, str]
    cost: Cost = Cost()

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            CheckpointError: If it cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            DataError: If there is no such file, or it is no card.
            ConfigError: If it is a card with wrong or newer values.
        """
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such card") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not the JSON of an evaluation card: {error}") from None
        if not isinstance(data, dict) or "protocol" not in data or "numbers" not in data:
            raise DataError(f"{path}: not an evaluation card: it has no protocol and numbers")
        return cls.from_dict(data, str(path))


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    found = {"mezzotint": mezzotint.__version__, "torch": torch.__version__}
    for name in ("numpy", "torchmetrics", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Difference:
    """How far one card's number is above another's.

    Attributes:
        value: The second minus the first.
        standard_error: Of this difference, the two errors taken as independent; None if one of
            them is not known.
    """

    value: float
    standard_error: float | None


def compare(a: EvaluationCard, b: EvaluationCard) -> dict[str, Difference]:
    """Return how far the numbers of ``b`` are above those of ``a``.

    Args:
        a: A card.
        b: Another of the same protocol, networks, counts and reference pictures; models, samplers,
            guidance and seeds may differ, for that is what one compares.

    Raises:
        DataError: If the two are not comparable, with every reason.
    """
    reasons = incomparable(a, b)
    if reasons:
        raise DataError(f"the two cards are not comparable: {'; '.join(reasons)}")
    result: dict[str, Difference] = {}
    for name, first in a.numbers.items():
        second = b.numbers[name]
        errors = (first.standard_error, second.standard_error)
        known = [e for e in errors if e is not None]
        error = sum(e * e for e in known) ** 0.5 if len(known) == 2 else None
        result[name] = Difference(second.value - first.value, error)
    return result


def incomparable(a: EvaluationCard, b: EvaluationCard) -> list[str]:
    """Return every reason why the numbers of two cards do not mean the same; none if they do."""
    pairs: list[tuple[str, object, object]] = []
    first, second = a.protocol.to_dict(), b.protocol.to_dict()
    pairs += [
        (f"protocol.{key}", first.get(key), second.get(key))
        # the samples that were really measured are counted below
        for key in first
        if key not in ("description", "format_version", "samples", "fewer")
    ]
    weights = [{n.name: n.weights_sha256 for n in card.networks} for card in (a, b)]
    pairs += [
        (f"weights of {name}", _short(weights[0][name]), _short(weights[1][name]))
        for name in weights[0]
        if name in weights[1]
    ]
    pairs.append(("count of pictures", a.evaluated.count, b.evaluated.count))
    pairs.append(("size of pictures", _size(a.evaluated), _size(b.evaluated)))
    pairs += _of_pictures("reference", a.reference, b.reference)
    if a.training is not None and b.training is not None:
        pairs += _of_pictures("training pictures", a.training, b.training)
    pairs.append(("numbers", _names(a.numbers), _names(b.numbers)))
    return [f"{what} ({x} against {y})" for what, x, y in pairs if x != y]


def _of_pictures(
    what: str, a: PictureRecord, b: PictureRecord
) -> Iterable[tuple[str, object, object]]:
    yield f"count of {what}", a.count, b.count
    yield f"size of {what}", _size(a), _size(b)
    said = [
        f"{r.description}{f':{r.split}' if r.split else ''} {_short(r.fingerprint)}" for r in (a, b)
    ]
    if a.fingerprint != b.fingerprint:
        yield what, said[0], said[1]


def _size(record: PictureRecord) -> str:
    return f"{record.width} x {record.height}"


def _short(digest: str) -> str:
    return digest[:12]


def _names(numbers: Mapping[str, Number]) -> str:
    return ", ".join(sorted(numbers))
