"""The points of a sampling study: what is asked, how one is measured, and how it is kept."""

import io
import json
import time
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.config import Config, Document
from mezzotint.data import DataConfig, ImageData
from mezzotint.device import precision_name, threads
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import ConfigError, DataError, nearest
from mezzotint.evaluation.distributions import Estimate, kid, precision_recall
from mezzotint.evaluation.drawing import spread
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.metrics import retrieval
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.generate import GeneratedImage, generate_each
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.request import GenerationRequest
from mezzotint.models.features import load_features

__all__ = ["Bench", "Key", "MeasuredPoint", "PointSettings", "SamplingStudy"]

Key = tuple[str, int, float]
"""Sampler, number of steps and guidance scale of a point."""

NETWORK = "mobilenet-v2"
_BATCH = 32  # pictures that the feature network sees at once
_LEAST = 4  # pictures that precision and recall can be had from
_MOST_REAL = 2000  # pictures of a larger data set that are compared with, evenly spread
_SHOWN = 4  # pictures of each point that are kept to be looked at
_SIDE_SHOWN = 192  # at most, of these four together

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingStudy(Document):
    """What a study of sampling measures; written beside its results.

    Attributes:
        model: What the user called it.
        data: What the pictures are compared with, and whose captions or classes are drawn.
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
    data: DataConfig
    samples: Annotated[int, Field(ge=_LEAST)] = 192
    seed: Annotated[int, Field(ge=0)] = 0
    samplers: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(SAMPLERS)
    steps: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 5, 10, 20, 50)
    guidance_scale: Scale = 3.0
    scales: tuple[Scale, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    scale_sampler: str = "ddim"
    scale_steps: Count = 20

    @field_validator("samplers")
    @classmethod
    def _samplers_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            _check_sampler(name)
        return names

    @field_validator("scale_sampler")
    @classmethod
    def _sampler_exists(cls, name: str) -> str:
        _check_sampler(name)
        return name

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


def _check_sampler(name: str) -> None:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; {nearest(name, SAMPLERS)}")


class PointSettings(Config):
    """All that decides the numbers of one point."""

    sampler: str
    steps: int
    guidance_scale: float
    samples: int
    seed: int
    model_hash: str
    data_fingerprint: str
    precision: str
    device: str
    network: str


class MeasuredPoint(Document):
    """One sampler at one number of steps and one guidance scale.

    Attributes:
        settings: What decided the numbers.
        kid: Unbiased kernel distance to the real pictures, on MobileNetV2.
        kid_standard_error: By the jackknife.
        precision: Share of the drawn pictures that are among the real ones (arXiv 1904.06991).
        recall: Share of the real pictures that are among the drawn ones.
        retrieval: Share of the drawn pictures whose nearest real one bears their caption; only of
            text-conditional models.
        seconds_per_image: From condition to pixels, drawn in batches.
        network_calls: Of the UNet, for each batch; under guidance each has both halves.
        threads: Of the processor.
    """

    settings: PointSettings
    kid: float
    kid_standard_error: float
    precision: float
    recall: float
    retrieval: float | None
    seconds_per_image: float
    network_calls: int
    threads: int

    @property
    def kid_estimate(self) -> Estimate:
        """KID and its standard error."""
        return Estimate(self.kid, self.kid_standard_error)


class Bench:
    """Measures points of a study, and keeps each in a file of its own.

    Args:
        pipeline: The model.
        data: The real pictures.
        study: What is measured.
        folder: Of the study; points go into its ``points/``.

    Raises:
        DataError: If the data lack what the model draws from, or are too few.
        RequestError: If the data have a class that the model does not know.

    Attributes:
        fields: What each picture is drawn from: its prompt or class, and its seed.
    """

    def __init__(
        self, pipeline: Pipeline, data: ImageData, study: SamplingStudy, folder: Path
    ) -> None:
        if len(data) < _LEAST:
            raise DataError(
                f"data: {len(data)} images are too few to compare with; give at least {_LEAST}"
            )
        self.pipeline, self.study, self.folder = pipeline, study, folder / "points"
        self._data = data
        self._chosen = evenly(_MOST_REAL, len(data))
        self._captions = [data.describe(k)[0] for k in self._chosen]
        self._named = spread(study.samples, len(self._chosen))
        self.fields = self._fields()
        self._network = load_features(NETWORK).to(pipeline.execution.device)
        self._real: Tensor | None = None
        self._warm = False

    def settings(self, key: Key) -> PointSettings:
        """Return what decides the numbers of a point."""
        sampler, steps, scale = key
        return PointSettings(
            sampler=sampler,
            steps=steps,
            guidance_scale=scale,
            samples=self.study.samples,
            seed=self.study.seed,
            model_hash=self.pipeline.model_hash,
            data_fingerprint=self._data.fingerprint,
            precision=precision_name(self.pipeline.execution.precision),
            device=self.pipeline.execution.device.type,
            network=NETWORK,
        )

    def path(self, key: Key) -> Path:
        """Return the file of a point; its pictures lie beside it as PNG."""
        sampler, steps, scale = key
        return self.folder / f"{sampler}-{steps}-{scale:g}.json"

    def find(self, key: Key) -> MeasuredPoint | None:
        """Return a point that is measured already.

        Raises:
            ConfigError: If its file is damaged, or it was measured under other settings.
        """
        path = self.path(key)
        if not path.is_file() or not path.with_suffix(".png").is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{path}: damaged; remove it and it is measured again") from None
        point = MeasuredPoint.from_dict(data, str(path))
        before, now = point.settings.to_dict(), self.settings(key).to_dict()
        different = [f"{k} ({before[k]}, now {now[k]})" for k in now if before[k] != now[k]]
        if different:
            raise ConfigError(
                f"{path}: was measured with another {', another '.join(different)}; go on with the"
                " same settings, or choose another --output"
            )
        return point

    def measure(self, key: Key) -> MeasuredPoint:
        """Draw the pictures of a point, judge them, and keep the result."""
        drawn, seconds, calls = self._draw(key)
        features = self._features(torch.stack([_bytes(d.image) for d in drawn]))
        real = self._real_features()
        found = kid(features, real)
        precision, recall = precision_recall(features, real)
        point = MeasuredPoint(
            settings=self.settings(key),
            kid=found.value,
            kid_standard_error=found.standard_error,
            precision=precision,
            recall=recall,
            retrieval=self._retrieval(features, real),
            seconds_per_image=seconds / len(drawn),
            network_calls=calls,
            threads=threads(),
        )
        path, png = self.path(key), io.BytesIO()
        _sample([d.image for d in drawn[:_SHOWN]]).save(png, format="PNG")
        write_atomically(path.with_suffix(".png"), png.getvalue())
        write_atomically(path, (json.dumps(point.to_dict(), indent=1) + "\n").encode())
        return point

    def pictures(self, key: Key) -> Image.Image:
        """Return the first four pictures of a measured point, as one."""
        with Image.open(self.path(key).with_suffix(".png")) as image:
            return image.convert("RGB")

    def requests(self, key: Key) -> list[GenerationRequest]:
        """Return what draws the pictures of a point."""
        sampler, steps, scale = key
        how = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
        return [self.pipeline.request(**how, **fields) for fields in self.fields]

    def _fields(self) -> list[dict[str, Any]]:
        conditioner, seed = self.pipeline.model.conditioner, self.study.seed
        seeds = [{"seed": seed + k} for k in range(self.study.samples)]
        if conditioner.wants is None:
            return seeds
        names = self._data.class_names
        given: list[dict[str, Any]] = []
        for caption, label in map(self._data.describe, self._chosen):
            if conditioner.wants == "caption":
                if caption is None:
                    raise DataError(
                        "data: there are no captions, and the model draws from them; give data"
                        " that have some by --against"
                    )
                given.append({"prompt": caption})
            else:
                if names is None or label is None:
                    raise DataError(
                        "data: there are no classes, and the model draws from them; sort the"
                        " pictures into a sub-folder per class"
                    )
                given.append({"class_label": names[label]})
        return [given[row] | s for row, s in zip(self._named, seeds, strict=True)]

    def _draw(self, key: Key) -> tuple[list[GeneratedImage], float, int]:
        """Pictures, seconds for all of them, and network calls for each batch."""
        requests = self.requests(key)
        if not self._warm:  # the first pictures pay for what later ones find prepared
            generate_each(self.pipeline, [r.model_copy(update={"steps": 1}) for r in requests])
            self._warm = True
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        hook = self.pipeline.model.unet.register_forward_hook(count)
        try:
            begun = time.perf_counter()
            drawn = generate_each(self.pipeline, requests)
            seconds = time.perf_counter() - begun
        finally:
            hook.remove()
        batches = -(-len(drawn) // max(_batch_size(item) for item in drawn))
        return drawn, seconds, calls // batches

    def _features(self, images: Tensor) -> Tensor:
        device = self.pipeline.execution.device
        return torch.cat(
            [self._network.extract(part.to(device))[0].cpu() for part in images.split(_BATCH)]
        )

    def _real_features(self) -> Tensor:
        if self._real is None:
            images = torch.stack([self._data.load(k).image for k in self._chosen])
            self._real = self._features(images)
        return self._real

    def _retrieval(self, features: Tensor, real: Tensor) -> float | None:
        if self.pipeline.model.conditioner.wants != "caption":
            return None
        found = retrieval(features, real).tolist()
        right = [
            self._captions[f] == self._captions[n] for f, n in zip(found, self._named, strict=True)
        ]
        return sum(right) / len(right)


def _bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _batch_size(drawn: GeneratedImage) -> int:
    assert drawn.request.resolved is not None
    return drawn.request.resolved.batch_size


def _sample(images: list[Image.Image]) -> Image.Image:
    sheet = image_grid(images, columns=2)
    if max(sheet.size) > _SIDE_SHOWN:
        sheet.thumbnail((_SIDE_SHOWN, _SIDE_SHOWN), Image.Resampling.LANCZOS)
    return sheet
