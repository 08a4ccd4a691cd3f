"""What an evaluation comes to, decided and checked before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.shipped import shipped_names
from mezzotint.engines.select import QuantizationKind
from mezzotint.errors import ConfigError, DataError, nearest
from mezzotint.evaluation.card import (
    Cost,
    EvaluationCard,
    NetworkRecord,
    Number,
    incomparable,
    versions,
)
from mezzotint.evaluation.drawing import (
    Drawing,
    DrawnPictures,
    conditions_of,
    emoji_labels,
    targets_of,
)
from mezzotint.evaluation.pictures import PictureFolder, PictureSource, near
from mezzotint.evaluation.protocol import EvaluationProtocol, Metric
from mezzotint.evaluation.reference import RealPictures, Reference, is_emoji
from mezzotint.evaluation.shards import FeaturePass, NetworkSpec
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.features import FEATURE_NETWORKS

__all__ = [
    "NO_CAPTIONS",
    "Plan",
    "check_comparable",
    "check_counts",
    "find_networks",
    "holds_model",
    "open_drawn",
    "open_pictures",
]

_EMOJI_SIDE = 64
_COPIES: Metric = "nearest_training"
NO_CAPTIONS = "only pictures that a model drew from captions can be looked up by these"


@dataclass(frozen=True)
class Plan:
    """Pictures, real pictures, and what both are seen through.

    Attributes:
        protocol: With what was overridden.
        networks: The feature networks.
        checksums: SHA-256 of their weights by name.
        evaluated: The pictures that are judged.
        reference: Those that they are compared with.
        training: Those among which copies are looked for; None if they are not.
        targets: Which real picture's caption each judged one was drawn from; or why that is not
            known, in a sentence.
        device: Where the networks stand.
    """

    protocol: EvaluationProtocol
    networks: tuple[NetworkSpec, ...]
    checksums: dict[str, str]
    evaluated: PictureSource
    reference: Reference
    training: Reference | None
    targets: list[int] | str
    device: str

    @property
    def left_out(self) -> dict[str, str]:
        """Why metrics of the protocol cannot be computed here, by metric."""
        reasons: dict[str, str] = {}
        if _COPIES in self.protocol.metrics and self.training is None:
            reasons[_COPIES] = (
                f"{self.reference.called} is held out, and no training pictures stand beside it"
            )
        if "retrieval" in self.protocol.metrics and isinstance(self.targets, str):
            reasons["retrieval"] = self.targets
        return reasons

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is computed."""
        return tuple(m for m in self.protocol.metrics if m not in self.left_out)

    def card(self, numbers: Mapping[str, Number], cost: Cost) -> EvaluationCard:
        """Return the card of numbers that were measured so."""
        return EvaluationCard(
            protocol=self.protocol,
            numbers=dict(numbers),
            left_out=self.left_out,
            networks=tuple(
                NetworkRecord(name=name, weights_sha256=sha256)
                for name, sha256 in self.checksums.items()
            ),
            evaluated=self.evaluated.record,
            reference=self.reference.pictures.record,
            training=self.training.pictures.record if self.training is not None else None,
            drawn_with=self.drawn.drawn_with if self.drawn is not None else None,
            versions=versions(),
            cost=cost,
        )

    @property
    def drawn(self) -> DrawnPictures | None:
        """The measured pictures, if a model draws them."""
        return self.evaluated if isinstance(self.evaluated, DrawnPictures) else None

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as plain values."""
        sets = {"evaluated": self.evaluated, "reference": self.reference.pictures}
        if self.training is not None:
            sets["training"] = self.training.pictures
        drawn_with = self.drawn.settings() if self.drawn is not None else None
        return {
            "protocol": self.protocol.to_dict(),
            "networks": self.checksums,
            "pictures": {name: s.record.fingerprint for name, s in sets.items()},
            "drawn_with": drawn_with,
            "versions": versions(),
        }

    def job(self, source: PictureSource, folder: Path) -> FeaturePass:
        """Return the pass of some pictures through the networks."""
        return FeaturePass(
            source=source,
            networks=self.networks,
            resize=self.protocol.resize,
            batch_size=self.protocol.batch_size,
            folder=folder,
            device=self.device,
            keep_pictures=isinstance(source, DrawnPictures),
        )


def find_networks(
    protocol: EvaluationProtocol, weights: Mapping[str, str], device: str
) -> tuple[tuple[NetworkSpec, ...], dict[str, str]]:
    """Load each network once, so that missing weights are told before anything is drawn.

    Args:
        protocol: Whose networks.
        weights: ``PATH`` or ``PATH#SHA256`` by name.
        device: Where they will stand.

    Returns:
        The networks, and the SHA-256 of the weights by name.

    Raises:
        ConfigError: If the protocol does not use one, or needs logits that one lacks.
        CheckpointError: If weights are missing or damaged.
    """
    for name in weights:
        if name not in protocol.networks:
            raise ConfigError(
                f"weights: the protocol {protocol.name} does not use {name!r};"
                f" {nearest(name, protocol.networks)}"
            )
    seen_by = FEATURE_NETWORKS[protocol.network]
    if "inception_score" in protocol.metrics and not seen_by.has_logits:
        raise ConfigError(
            f"protocol {protocol.name}: inception_score needs class logits, which the network"
            f" {protocol.network!r} has not"
        )
    specs: list[NetworkSpec] = []
    checksums: dict[str, str] = {}
    for name in protocol.networks:
        location, _, sha256 = weights.get(name, "").partition("#")
        spec = NetworkSpec(name, location or None, sha256 or None)
        specs.append(spec)
        checksums[name] = spec.load(device).weights_sha256
    return tuple(specs), checksums


def holds_model(path: Path) -> bool:
    """Whether a path is a model's, a training run's, finished or not, or a shipped model's name."""
    there = any((path / p).exists() for p in (INDEX, f"model/{INDEX}", "checkpoints"))
    return there or str(path) in shipped_names()


def open_drawn(
    model: Pipeline | str | Path,
    real: RealPictures,
    drawing: Drawing,
    protocol: EvaluationProtocol,
    *,
    caption_column: str | None,
    device: str,
    precision: str,
    engine: str = "auto",
    quantization: QuantizationKind = "none",
) -> tuple[DrawnPictures, Reference, list[int] | str]:
    """Open a model's pictures and the real ones, whose captions or classes it draws from.

    Returns:
        Both, and the targets of `Plan`.

    Raises:
        CheckpointError: If the model is missing or damaged.
        DataError: If the real pictures are, or lack what the model draws from.
        RequestError: If the model cannot draw so.
    """
    if isinstance(model, Pipeline):
        pipeline = model
    else:
        pipeline = load(model, device, precision, engine=engine, quantization=quantization)
    if not protocol.ema and not isinstance(model, Pipeline):
        raise ConfigError(
            f"protocol {protocol.name}: ema: false asks for weights that were not averaged, but"
            f" {model} holds the averaged ones; give a pipeline of the others"
        )
    reference = real.open(pipeline.model.image_size)
    count = protocol.samples
    if protocol.fewer:
        count = min(count, len(reference.pictures))
    conditions, origin, targets = None, None, NO_CAPTIONS
    wants = pipeline.model.conditioner.wants
    if wants is not None:
        data = reference.conditions(wants, caption_column, emoji_labels(pipeline))
        conditions = conditions_of(pipeline, data, count, reference.called)
        what = "captions" if wants == "caption" else "classes"
        origin = f"{what} of {reference.called}, in its proportions"
        if wants == "caption" and "retrieval" in protocol.metrics:
            targets = targets_of(data, count, reference.pictures.names)
    drawn = DrawnPictures(
        pipeline,
        drawing,
        conditions,
        origin,
        count,
        device=device,
        precision=precision,
        engine=engine,
        quantization=quantization,
    )
    return drawn, reference, targets


def open_pictures(
    folder: str | Path, real: RealPictures, resolution: int | None, limit: int
) -> tuple[PictureSource, Reference]:
    """Open a folder's pictures, or emoji, and the real ones.

    Raises:
        DataError: If either are missing, broken or of several sizes.
    """
    source: PictureSource
    if is_emoji(folder) and ":" in str(folder):
        side = resolution or _EMOJI_SIDE
        emoji = RealPictures(folder, limit=limit)
        source = emoji.open((side, side)).pictures
    else:
        path = Path(folder).expanduser()
        if not path.is_dir():
            what = "is a file" if path.is_file() else "no such model, nor folder of pictures"
            raise DataError(f"{folder}: {what}{near(path)}")
        source = PictureFolder(path, resolution=resolution, limit=limit, description=str(folder))
    record = source.record
    return source, real.open((record.height, record.width))


def check_counts(
    protocol: EvaluationProtocol,
    evaluated: PictureSource,
    reference: Reference,
    training: Reference | None,
) -> None:
    """Refuse fewer pictures than the protocol or one of its metrics needs.

    Broken pictures that were skipped count as there: they are few, and the card says how many.

    Raises:
        DataError: Saying how many there are, and how many are needed.
    """
    record = evaluated.record
    if record.count + record.broken < protocol.samples and not protocol.fewer:
        raise DataError(
            f"{record.description}: {_pictures(record.count)}, but {protocol.samples:,} are to be"
            f" measured; ask for fewer by samples (--samples {record.count})"
        )
    for name, count, real in (
        (record.description, record.count, False),
        (reference.called, len(reference.pictures), True),
    ):
        needs = {metric: protocol.needs_of(metric, real=real) for metric in protocol.metrics}
        wanting = [f"{metric} needs {least:,}" for metric, least in needs.items() if least > count]
        if wanting:
            raise DataError(f"{name}: {_pictures(count)}, but {', '.join(wanting)}")
    if training is not None and len(training.pictures) < (least := protocol.needs_of(_COPIES)):
        raise DataError(
            f"{training.called}: {_pictures(len(training.pictures))}, but {_COPIES} needs {least}"
        )


def check_comparable(before: EvaluationCard, now: EvaluationCard) -> None:
    """Refuse what could not be compared with an earlier card, before anything is computed.

    Args:
        before: The earlier card.
        now: The card to come, still without numbers.

    Raises:
        DataError: With every reason.
    """
    told = now.model_copy(update={"numbers": before.numbers})  # their names follow from the rest
    if reasons := incomparable(before, told):
        raise DataError(f"the new card could not be compared: {'; '.join(reasons)}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"
