"""What a batch is told while it is trained on: from a data set to what the conditioner reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from mezzotint.conditioning.base import Box, ConditionInputs, Region
from mezzotint.conditioning.build import ConditioningConfig, main_config, spatial_config
from mezzotint.conditioning.layout import LayoutConditionerConfig
from mezzotint.conditioning.regions import RegionsConditionerConfig
from mezzotint.conditioning.spatial import (
    LowResConditionerConfig,
    SemanticMapConditionerConfig,
)
from mezzotint.data import ShardStream
from mezzotint.data.base import Description, Example
from mezzotint.data.degradation import DegradationConfig, degrade
from mezzotint.data.latents import load_view
from mezzotint.data.masks import MaskConfig, draw_mask
from mezzotint.errors import ConfigError, DataError
from mezzotint.generation.conditions import inpainting_inputs
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.orders import TrainingData
from mezzotint.training.pixel_task import to_pixels

__all__ = ["ConditionMaker", "Told", "check_data", "check_degradation"]

T = TypeVar("T")

_MOST_KEPT = 512 << 20  # bytes of pictures and maps that are kept, so as not to be made again


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What one sample is told; whatever its conditioner doesn't want is absent.

    Attributes:
        caption: In words.
        label: Index of a class.
        boxes: A layout.
        regions: A layout in words.
        map: ``(H, W)`` uint8 classes of pixels.
        low_res: ``(3, h, w)`` uint8 small picture.
        image: ``(3, H, W)`` uint8 picture to be inpainted.
        mask: ``(1, H, W)``, 1 where it is to be drawn.
    """

    caption: str | None = None
    label: int | None = None
    boxes: tuple[Box, ...] | None = None
    regions: tuple[Region, ...] | None = None
    map: Tensor | None = None
    low_res: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None


class ConditionMaker:
    """Makes the conditions of samples of a data set.

    Args:
        model: Its conditioner says what is wanted.
        data: The samples.
        seed: Keys the views of cached latents; see `mezzotint.data.latents.load_view`.
        degradation: How small pictures are made, for super-resolution.
        masks: What is to be drawn anew, for inpainting.
        tokens: Of all captions, if a frozen text encoder was asked before.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        data: TrainingData,
        *,
        seed: int,
        degradation: DegradationConfig,
        masks: MaskConfig,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.data, self.tokens = model, data, tokens
        self.degradation, self.masks = degradation, masks
        self.wants, self.wants_concat = model.conditioner.wants, model.conditioner.wants_concat
        self.needs_picture = self.wants_concat in ("low_res", "inpainting")
        most = max(256, _MOST_KEPT // (4 * model.image_size[0] * model.image_size[1]))
        self._view = lru_cache(maxsize=most)(lambda k, view: self._load_view(k, view, seed))
        self._plain = lru_cache(maxsize=most)(
            lambda k: data.describe(k, None, with_map=self.wants_concat == "map")
        )

    def of_view(self, index: int, view: int, generator: torch.Generator) -> Told:
        """Return what a sample is told, of which the latents of a view are cached.

        Args:
            index: Of the sample.
            view: Of the cache.
            generator: Decides caption, degradation and mask.
        """
        caption = self.data.describe(index, generator).caption
        # another view than the plain one may have moved or mirrored where things are
        placed = self.wants == "layout" or self.wants_concat in ("map", "regions")
        moved = view and placed
        known = self._view(index, view) if self.needs_picture or moved else self._plain(index)
        return self._tell(known, caption, generator)

    def _load_view(self, index: int, view: int, seed: int) -> Example:
        assert not isinstance(self.data, ShardStream), "nothing of a stream is cached"
        return load_view(self.data, index, view, seed)

    def of_example(self, example: Example, generator: torch.Generator) -> Told:
        """Return what a sample is told, of which the picture was just loaded.

        Args:
            example: The sample.
            generator: Decides degradation and mask.
        """
        return self._tell(example, example.caption, generator)

    def _tell(
        self, known: Example | Description, caption: str | None, generator: torch.Generator
    ) -> Told:
        image = known.image if isinstance(known, Example) else None
        low_res = mask = None
        if self.wants_concat == "low_res":
            assert image is not None
            low_res = degrade(image, self.degradation, generator)
        elif self.wants_concat == "inpainting":
            assert image is not None
            mask = draw_mask(self.masks, image.shape[1], image.shape[2], generator)
        return Told(
            caption=caption or "" if self.wants == "caption" else None,
            label=known.label if self.wants == "label" else None,
            boxes=known.boxes if self.wants == "layout" else None,
            regions=self._regions(known) if self.wants_concat == "regions" else None,
            map=known.map if self.wants_concat == "map" else None,
            low_res=low_res,
            image=image if mask is not None else None,
            mask=mask,
        )

    def _regions(self, known: Example | Description) -> tuple[Region, ...]:
        names = self.data.class_names or ()
        return tuple(
            Region(names[box.label].replace("-", " "), box.left, box.top, box.right, box.bottom)
            for box in known.boxes or ()
        )

    @torch.no_grad()
    def inputs(
        self, told: Sequence[Told], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> ConditionInputs:
        """Put the samples of a batch together; pictures to be inpainted are encoded.

        Args:
            told: Of each sample.
            device: Of the model.
            dtype: Of its weights.
        """
        masked = mask = None
        if self.wants_concat == "inpainting":
            images = to_pixels(_stack([t.image for t in told]), torch.device("cpu")).to(dtype)
            masked, mask = inpainting_inputs(
                self.model, images, _stack([t.mask for t in told]), device
            )
            masked, mask = masked.to(dtype), mask.to(dtype)
        maps = low_res = None
        if self.wants_concat == "map":
            maps = _stack([t.map for t in told]).to(device)
        if self.wants_concat == "low_res":
            low_res = to_pixels(_stack([t.low_res for t in told]), device).to(dtype)
        return ConditionInputs(
            count=len(told),
            captions=_all([t.caption for t in told]),
            tokens=self.tokens,
            labels=_all([t.label for t in told]),
            layouts=_all([t.boxes for t in told]),
            regions=_all([t.regions for t in told]),
            latent_size=self.model.latent_shape(*self.model.image_size)[1:],
            maps=maps,
            low_res=low_res,
            masked_latents=masked,
            mask=mask,
        )


def _all(values: Sequence[T | None]) -> list[T] | None:
    """The values if the conditioner wants them, in which case each sample has one."""
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values))
    return present or None


def _stack(values: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([value for value in values if value is not None])


def check_data(data: TrainingData, conditioning: ConditioningConfig) -> None:
    """Say what data lack of what a conditioning wants, by their first sample.

    Raises:
        ConfigError: If a semantic map has fewer classes than the data, or a layout less room.
        DataError: If the data lack something.
    """
    main, spatial = main_config(conditioning), spatial_config(conditioning)
    wants = None if main is None else main.kind
    maps = isinstance(spatial, SemanticMapConditionerConfig)
    known = data.describe(0, None, with_map=maps)
    if wants in ("text", "bert") and known.caption is None:
        raise DataError(
            f"the recipe's conditioning is {wants}, but the images have no captions: give"
            " data.caption_column, or use conditioning.kind=class or none"
        )
    if wants == "class" and (known.label is None or data.class_names is None):
        raise DataError(
            "the recipe's conditioning is class, but the images have no classes: give them"
            " sub-folders or data.class_column, or use conditioning.kind=none"
        )
    if wants == "layout" and known.boxes is None:
        raise DataError(
            "the recipe's conditioning is layout, but the images have no boxes: use data.kind=coco"
            " or scenes"
        )
    if isinstance(spatial, RegionsConditionerConfig):
        if known.boxes is None or data.class_names is None:
            raise DataError(
                "the recipe's conditioning is boxes with words, but the images have no boxes or no"
                " names of classes: use data.kind=coco or scenes"
            )
        most = getattr(getattr(data, "config", None), "max_objects", 0)
        if most > spatial.max_objects:
            raise ConfigError(
                f"data.max_objects is {most}, but the conditioning has room for"
                f" {spatial.max_objects} boxes"
            )
    if isinstance(main, LayoutConditionerConfig):
        room = (main.max_length - 2) // 3
        most = getattr(getattr(data, "config", None), "max_objects", 0)
        if most > room:
            raise ConfigError(
                f"data.max_objects is {most}, but a layout has room for {room}: three tokens an"
                f" object and two more, so make conditioning.max_length {3 * most + 2}"
            )
    if maps and known.map is None:
        raise DataError(
            "the recipe's conditioning is a semantic map, but the images have none: use"
            " data.kind=maps or scenes"
        )
    if isinstance(spatial, SemanticMapConditionerConfig) and data.class_names is not None:
        needed = len(data.class_names) + 1  # 0 is what is of no class
        if spatial.classes < needed:
            raise ConfigError(
                f"the semantic map's classes are {spatial.classes}, but the data's maps need"
                f" {needed}"
            )


def check_degradation(
    conditioning: ConditioningConfig, degradation: DegradationConfig, factor: int
) -> None:
    """Raise a ConfigError if small pictures would be made of another size than is wanted.

    Args:
        conditioning: Of the recipe.
        degradation: Of the recipe.
        factor: f of the first stage.
    """
    spatial = spatial_config(conditioning)
    if not isinstance(spatial, LowResConditionerConfig):
        return
    if degradation.factor * spatial.fold != factor:
        raise ConfigError(
            f"degradation.factor {degradation.factor} times the conditioner's fold {spatial.fold}"
            f" must be the first stage's f, {factor}"
        )
