"""The points of a sampling study: what is asked, how one is measured, and how it is kept."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import Field, field_validator, model_validator

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Document
from mezzotint.data import EmojiDataConfig, FolderDataConfig
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import ConfigError, nearest
from mezzotint.evaluation.card import DrawnWith, EvaluationCard, Number, PictureRecord
from mezzotint.evaluation.drawing import Drawing, DrawnPictures
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.plan import check_counts, open_drawn
from mezzotint.evaluation.protocol import EvaluationProtocol, Metric
from mezzotint.evaluation.reference import RealPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.request import GenerationRequest
from mezzotint.generation.sampling import decode_latents, sample_latents, to_images
from mezzotint.models.features import metric_name
from mezzotint.studies.machine import Machine, this_machine

__all__ = ["Bench", "Key", "MeasuredPoint", "SamplingStudy"]

Key = tuple[str, int, float]
"""Sampler, number of steps and guidance scale of a point."""

_DEFAULT_SAMPLERS = tuple(name for name, info in SAMPLERS.items() if not info.distilled)
_NETWORK = "mobilenet-v2"
_LEAST = 4  # pictures that precision and recall can be had from
_SHOWN = 4  # pictures of each point that are kept to be looked at
_SIDE_SHOWN = 192  # at most, of these four together

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingStudy(Document):
    """What a study of sampling measures; written beside its results.

    Attributes:
        model: What the user called it.
        data: What the pictures are compared with, and whose captions or classes are drawn: what
            `evaluate` takes as ``against``.
        samples: Pictures drawn for each point; picture k is drawn from ``seed + k``.
        seed: Of the first picture.
        samplers: Names of `mezzotint.diffusion.samplers.SAMPLERS`.
        steps: Numbers of steps, at each of which every sampler is measured.
        guidance_scale: At which steps are varied; 1 is no guidance.
        scales: Guidance scales; not for unconditional models.
        scale_sampler: With which scales are varied.
        scale_steps: Its number of steps.
    """

    model: str
    data: str | Annotated[EmojiDataConfig | FolderDataConfig, Field(discriminator="kind")]
    samples: Annotated[int, Field(ge=_LEAST)] = 192
    seed: Annotated[int, Field(ge=0)] = 0
    samplers: Annotated[tuple[str, ...], Field(min_length=1)] = _DEFAULT_SAMPLERS
    steps: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 5, 10, 20, 50)
    guidance_scale: Scale = 3.0
    scales: tuple[Scale, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    scale_sampler: str = "ddim"
    scale_steps: Count = 20

    @field_validator("samplers", "scale_sampler")
    @classmethod
    def _samplers_exist(cls, value: Any) -> Any:
        for name in (value,) if isinstance(value, str) else value:
            if name not in SAMPLERS:
                raise ValueError(f"unknown sampler {name!r}; {nearest(name, SAMPLERS)}")
        return value

    @model_validator(mode="after")
    def _no_repetition(self) -> Self:
        for name in ("samplers", "steps", "scales"):
            values: tuple[Any, ...] = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a value stands there twice")
        return self

    def by_steps(self) -> list[Key]:
        """Return the points at which steps are varied, sampler by sampler."""
        return [(s, n, self.guidance_scale) for s in self.samplers for n in sorted(self.steps)]

    def by_scale(self) -> list[Key]:
        """Return the points at which the guidance scale is varied."""
        return [(self.scale_sampler, self.scale_steps, g) for g in sorted(self.scales)]

    def of_strips(self) -> Key:
        """Return how the report's strips are drawn."""
        return self.scale_sampler, self.scale_steps, self.guidance_scale

    def protocol(self, *, captions: bool) -> EvaluationProtocol:
        """Return how a point is measured; retrieval only where there are ``captions``."""
        metrics: tuple[Metric, ...] = ("kid", "precision", "recall")
        if captions:
            metrics += ("retrieval",)
        return EvaluationProtocol(
            name="sampling-study",
            description="many points of few pictures each: KID first, whose estimate is unbiased",
            metrics=metrics,
            network=_NETWORK,
            resize="bicubic-antialias",
            samples=self.samples,
            reference_samples=10_000,
            kid_subsets=None,
        )


class MeasuredPoint(Document):
    """One sampler at one number of steps and one guidance scale.

    Attributes:
        card: The numbers, and all that decided them.
        network_calls: Of the UNet, for each batch; under guidance each has both halves.
        machine: What drew the pictures.
    """

    card: EvaluationCard
    network_calls: int
    machine: Machine

    @property
    def drawn_with(self) -> DrawnWith:
        """How the pictures were drawn."""
        assert self.card.drawn_with is not None, "a model drew them"
        return self.card.drawn_with

    @property
    def kid(self) -> Number:
        """Unbiased kernel distance to the real pictures, with its standard error."""
        return self.card.numbers[metric_name("kid", _NETWORK)]

    @property
    def kid_error(self) -> float:
        """The standard error of KID."""
        return self.kid.standard_error or 0.0

    def share(self, metric: str) -> float | None:
        """Return ``precision``, ``recall`` or ``retrieval``; None if it was not measured."""
        number = self.card.numbers.get(metric_name(metric, _NETWORK))
        return None if number is None else number.value

    @property
    def seconds_per_image(self) -> float:
        """From condition to pixels, drawn in batches."""
        assert self.card.cost.pictures_seconds is not None, "the pictures were drawn"
        return self.card.cost.pictures_seconds


class Bench:
    """Measures points of a study, and keeps each in a file of its own.

    Args:
        pipeline: The model.
        study: What is measured.
        folder: Of the study; points go into its ``points/``.

    Raises:
        DataError: If the data lack what the model draws from, or are too few.
        RequestError: If the data have a class that the model does not know.

    Attributes:
        protocol: How each point is measured.
        reference: The real pictures.
        machine: What draws.
    """

    def __init__(self, pipeline: Pipeline, study: SamplingStudy, folder: Path) -> None:
        self.pipeline, self.study, self.folder = pipeline, study, folder / "points"
        self.machine = this_machine(pipeline.execution)
        self.protocol = study.protocol(captions=pipeline.model.conditioner.wants == "caption")
        # of one step: these are drawn only to warm up, and know the conditions of all others
        self._first, self.reference, _ = open_drawn(
            pipeline,
            RealPictures(
                study.data,
                default_split=self.protocol.reference_split,
                limit=self.protocol.reference_samples,
            ),
            Drawing(seed=study.seed, steps=1),
            self.protocol,
            caption_column=None,
            device=self.machine.device,
            precision="auto",
        )
        check_counts(self.protocol, self._first, self.reference, None)
        self._warm = False

    def path(self, key: Key) -> Path:
        """Return the file of a point; its pictures lie beside it as PNG."""
        sampler, steps, scale = key
        return self.folder / f"{sampler}-{steps}-{scale:g}.json"

    def drawn_with(self, key: Key) -> DrawnWith:
        """Return how the pictures of a point are drawn.

        Raises:
            RequestError: If the model cannot draw so.
        """
        how, first = Drawing.from_dict(self._how(key)), self._first
        source = first.drawn_with.conditions
        return DrawnPictures(self.pipeline, how, first.conditions, source, len(first)).drawn_with

    def find(self, key: Key) -> MeasuredPoint | None:
        """Return a point that is measured already.

        Raises:
            ConfigError: If its file is damaged, or it was measured under other settings or on
                another machine.
            RequestError: If the model cannot draw so.
        """
        drawn_with, path = self.drawn_with(key), self.path(key)
        if not path.is_file() or not path.with_suffix(".png").is_file():
            return None
        try:
            data: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: damaged; remove it and it is measured again") from None
        point = MeasuredPoint.from_dict(data, str(path))
        card, real = point.card, self.reference.pictures.record
        before = _settings(card.protocol, point.drawn_with, card.reference, point.machine)
        now = _settings(self.protocol, drawn_with, real, self.machine)
        different = [f"{k} ({before[k]}, now {now[k]})" for k in now if before[k] != now[k]]
        if different:
            raise ConfigError(
                f"{path}: was measured with another {', another '.join(different)}; go on with the"
                " same settings on the same machine, or choose another --output"
            )
        return point

    def measure(self, key: Key) -> MeasuredPoint:
        """Draw the pictures of a point, judge them, and keep the result."""
        if not self._warm:  # the first pictures pay for what later ones find prepared
            self._first.read(0, min(self.protocol.batch_size, self.study.samples))
            self._warm = True
        images, calls = self._draw_shown(key)
        # not in the cache: what was begun there on another machine would bring its seconds along
        with TemporaryDirectory() as work:
            card = evaluate(
                self.pipeline,
                self.study.data,
                self.protocol,
                device=str(self.pipeline.execution.device),
                work=work,
                **self._how(key),
            )
        point = MeasuredPoint(card=card, network_calls=calls, machine=self.machine)
        path, png = self.path(key), io.BytesIO()
        _sheet(images).save(png, format="PNG")
        write_atomically(path.with_suffix(".png"), png.getvalue())
        write_atomically(path, (json.dumps(point.to_dict(), indent=1) + "\n").encode())
        return point

    def pictures(self, key: Key) -> Image.Image:
        """Return the first four pictures of a measured point, as one."""
        with Image.open(self.path(key).with_suffix(".png")) as image:
            return image.convert("RGB")

    def requests(self, key: Key) -> list[GenerationRequest]:
        """Return what draws the first four pictures of a point."""
        name = "prompt" if self.pipeline.task == "text-to-image" else "class_label"
        conditions: Sequence[str | None] = self._first.conditions or [None] * _SHOWN
        return [
            self.pipeline.request(
                **self._how(key) | {"seed": self.study.seed + k, name: conditions[k]}
            )
            for k in range(_SHOWN)
        ]

    def _how(self, key: Key) -> dict[str, Any]:
        sampler, steps, scale = key
        seed = self.study.seed
        return {"sampler": sampler, "steps": steps, "guidance_scale": scale, "seed": seed}

    def _draw_shown(self, key: Key) -> tuple[list[Image.Image], int]:
        """The first four pictures, and the network calls that their one batch takes."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        hook = self.pipeline.model.unet.register_forward_hook(count)
        try:
            latents = sample_latents(self.pipeline, self.requests(key))
        finally:
            hook.remove()
        parts = latents.split(1)  # large pictures together would take much memory
        return [to_images(decode_latents(self.pipeline, part))[0] for part in parts], calls


def _settings(
    protocol: EvaluationProtocol, drawn_with: DrawnWith, real: PictureRecord, machine: Machine
) -> dict[str, Any]:
    """What decides the numbers and the seconds of a point, by name."""
    in_words = ("description", "format_version", "model", "conditions", "last_seed")
    values = protocol.to_dict() | drawn_with.to_dict() | machine.to_dict()
    decisive = {name: value for name, value in values.items() if name not in in_words}
    return decisive | {"data": real.fingerprint}


def _sheet(images: list[Image.Image]) -> Image.Image:
    sheet = image_grid(images, columns=2)
    if max(sheet.size) > _SIDE_SHOWN:
        sheet.thumbnail((_SIDE_SHOWN, _SIDE_SHOWN), Image.Resampling.LANCZOS)
    return sheet
