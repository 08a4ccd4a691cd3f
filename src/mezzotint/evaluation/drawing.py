"""Pictures that a model draws to be measured: picture k from seed + k and the k-th condition."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.config import Config
from mezzotint.data.base import ImageData
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.device import precision_name
from mezzotint.diffusion.samplers import get_sampler
from mezzotint.engines.select import QuantizationKind
from mezzotint.errors import ConfigError, DataError, RequestError
from mezzotint.evaluation.card import DrawnWith, PictureRecord
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.request import FeatureReuse, GenerationRequest

__all__ = ["Drawing", "DrawnPictures", "conditions_of", "emoji_labels", "spread", "targets_of"]


class Drawing(Config):
    """How a model draws the pictures that are measured; see `GenerationRequest` for the fields.

    What is None takes the default of `GenerationRequest`.
    """

    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    spacing: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    eta: float | None = None
    feature_reuse: FeatureReuse | None = None
    token_merging: float | None = None


class DrawnPictures:
    """Pictures drawn by a model.

    Args:
        model: A pipeline, or the folder of a model, which each process loads for itself.
        drawing: How.
        conditions: One caption or class name a picture; None for an unconditional model.
        source: Where the conditions are from, in words.
        count: How many pictures.
        device: See `mezzotint.generation.pipeline.load`.
        precision: See there.
        engine: See there.
        quantization: See there.

    Raises:
        RequestError: If the model cannot draw so.
    """

    def __init__(
        self,
        model: Pipeline | str,
        drawing: Drawing,
        conditions: Sequence[str] | None,
        source: str | None,
        count: int,
        *,
        device: str = "auto",
        precision: str = "auto",
        engine: str = "auto",
        quantization: QuantizationKind = "none",
    ) -> None:
        self._pipeline: Pipeline | None = model if isinstance(model, Pipeline) else None
        self._how_to_load = (
            (model.name if isinstance(model, Pipeline) else model),
            device,
            precision,
            engine,
            quantization,
            model.decoder.path if isinstance(model, Pipeline) and model.decoder else None,
        )
        self._drawing, self.conditions, self._source = drawing, conditions, source
        self._count = count
        first = self._request(0)
        check_steps(self.pipeline, first)
        spacing = first.spacing or get_sampler(first.sampler).default_spacing
        self.drawn_with = DrawnWith(
            model=self.pipeline.name,
            model_hash=self.pipeline.model_hash,
            task=self.pipeline.task,
            conditions=source,
            seed=first.seed,
            last_seed=first.seed + count - 1,
            steps=first.steps,
            sampler=first.sampler,
            spacing=spacing,
            guidance_scale=first.guidance_scale,
            guidance_rescale=first.guidance_rescale,
            guidance_interval=first.guidance_interval,
            eta=first.eta,
            feature_reuse=first.feature_reuse,
            token_merging=first.token_merging,
            precision=precision_name(self.pipeline.execution.precision),
            engine=self.pipeline.engine.name,
            quantization=self.pipeline.quantization,
            decoder=self.pipeline.decoder.sha256 if self.pipeline.decoder else None,
            device=self.pipeline.execution.device.type,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pipeline": None}

    def __len__(self) -> int:
        return self._count

    @property
    def pipeline(self) -> Pipeline:
        """The model, loaded at first use in each process."""
        if self._pipeline is None:
            model, device, precision, engine, quantization, decoder = self._how_to_load
            self._pipeline = load(
                model,
                device,
                precision,
                engine=engine,
                quantization=quantization,
                decoder=decoder,
            )
        return self._pipeline

    @property
    def record(self) -> PictureRecord:
        """What the card says of them."""
        content = json.dumps([self.settings(), self.conditions], sort_keys=True)
        height, width = self.pipeline.model.image_size
        return PictureRecord(
            description=self.drawn_with.model,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
            count=self._count,
            available=self._count,
            height=height,
            width=width,
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides them beside the conditions, as plain values."""
        values = self.drawn_with.to_dict()
        return {k: v for k, v in values.items() if k not in ("model", "conditions")}

    def read(self, start: int, stop: int) -> Tensor:
        """Draw pictures; see `mezzotint.evaluation.pictures.PictureSource.read`."""
        drawn = generate_each(self.pipeline, [self._request(k) for k in range(start, stop)])
        pixels = [torch.from_numpy(np.array(d.image)).permute(2, 0, 1) for d in drawn]
        return torch.stack(pixels)

    def _request(self, k: int) -> GenerationRequest:
        fields = self._drawing.to_dict() | {"seed": self._drawing.seed + k}
        if self.conditions is not None:
            name = "prompt" if self.pipeline.task == "text-to-image" else "class_label"
            fields[name] = self.conditions[k]
        return self.pipeline.request(**fields)


def check_steps(pipeline: Pipeline, request: GenerationRequest) -> None:
    """Refuse, before anything is computed, what could be refused at the first batch only."""
    most = pipeline.model.schedule_config.num_train_timesteps
    if request.steps > most:
        raise RequestError(
            f"steps: {request.steps} is more than the {most} noise levels that the model was"
            " trained on"
        )
    sampler = get_sampler(request.sampler)
    sampler.sigmas(pipeline.model.schedule, request.steps, request.spacing)
    if request.eta is not None and "eta" not in sampler.options:
        raise RequestError(f"eta: the sampler {request.sampler!r} has no such option")


def spread(count: int, available: int) -> list[int]:
    """Choose indices so that each comes as often as any other, the rest evenly spread.

    So captions and classes are drawn in the proportions of the data, whose order is often by class.

    Example:
        >>> spread(7, 3)
        [0, 1, 2, 0, 1, 2, 0]
        >>> spread(2, 4)
        [0, 2]
    """
    whole, rest = divmod(count, available)
    return list(range(available)) * whole + (evenly(rest, available) if rest else [])


def emoji_labels(pipeline: Pipeline) -> str:
    """Return which of the emoji's labels a model of classes was trained on, or ``group``."""
    conditioner = pipeline.model.conditioner
    if isinstance(conditioner, ClassConditioner):
        for labels in ("group", "subgroup", "concept"):
            config = EmojiDataConfig.from_dict({"labels": labels, "split": "all"})
            if set(conditioner.config.class_names) <= set(EmojiData(config).class_names):
                return labels
    return "group"


def conditions_of(pipeline: Pipeline, data: ImageData, count: int, called: str) -> list[str]:
    """Return captions or class names for pictures, in the proportions of a data set.

    Args:
        pipeline: A text- or class-conditional model.
        data: Whose captions or classes they are.
        count: How many pictures.
        called: What messages call the data.

    Raises:
        DataError: If the data lack what the model wants.
        RequestError: If the data have a class that the model does not know.
    """
    conditioner = pipeline.model.conditioner
    described = {k: data.describe(k) for k in set(spread(count, len(data)))}
    if conditioner.wants == "caption":
        captions = {k: d.caption for k, d in described.items() if d.caption is not None}
        if len(captions) < len(described):
            raise DataError(f"{called}: has no captions, and the model draws from them")
        return [captions[k] for k in spread(count, len(data))]
    names = data.class_names
    labels = {k: d.label for k, d in described.items() if d.label is not None}
    if names is None or len(labels) < len(described):
        raise DataError(
            f"{called}: has no classes, and the model draws from them; sort the pictures into a"
            " sub-folder per class"
        )
    if not isinstance(conditioner, ClassConditioner):
        raise ConfigError(
            f"{pipeline.name}: wants {conditioner.description}, which data cannot give"
        )
    for label in set(labels.values()):
        conditioner.index_of(names[label])
    return [names[labels[k]] for k in spread(count, len(data))]


def targets_of(data: ImageData, count: int, names: Sequence[str]) -> list[int] | str:
    """Return which real picture's caption each picture is drawn from.

    Args:
        data: Whose captions they are; see `conditions_of`.
        count: How many pictures.
        names: What the real pictures are called that drawn ones are compared with.

    Returns:
        Their positions in ``names``; or why there are none, in a sentence.
    """
    chosen = spread(count, len(data))
    captions = [data.describe(k).caption for k in range(len(data))]
    if len(set(captions)) < len(captions):
        return "several of the reference's pictures have the same caption"
    places = {name: place for place, name in enumerate(names)}
    found = {k: places.get(data.load(k).name) for k in set(chosen)}
    targets = [place for k in chosen if (place := found[k]) is not None]
    if len(targets) < count:
        return "captions are drawn from whose pictures are not among those compared with"
    return targets
