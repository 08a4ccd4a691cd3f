"""What a batch of requests says, as the model's conditioner reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.conditioning.base import ConditionInputs, Region, TextOptions
from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.layout import LayoutConditioner, read_layout
from mezzotint.conditioning.prompts import split_adapters
from mezzotint.conditioning.spatial import (
    InpaintingConditioner,
    main_conditioner,
    spatial_conditioner,
)
from mezzotint.errors import RequestError
from mezzotint.generation.canvas import Canvas
from mezzotint.generation.request import GenerationRequest
from mezzotint.latent_diffusion import LatentDiffusion

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = ["condition_inputs", "inpainting_inputs", "latent_mask", "plain_prompt"]


def plain_prompt(pipeline: Pipeline, prompt: str) -> str:
    """Return a prompt without the adapters that it asks for, where the model can have any."""
    if isinstance(main_conditioner(pipeline.model.conditioner), ClipConditioner):
        return split_adapters(prompt)[0]
    return prompt


def condition_inputs(
    pipeline: Pipeline, requests: Sequence[GenerationRequest], canvas: Canvas
) -> ConditionInputs:
    """Gather what the model's conditioner wants.

    Args:
        pipeline: The model and how it runs.
        requests: One per sample.
        canvas: Their pictures.

    Raises:
        RequestError: If a class is unknown.
    """
    conditioner = pipeline.model.conditioner
    main, first = main_conditioner(conditioner), requests[0]
    captions = labels = layouts = None
    if conditioner.wants == "caption":
        captions = [plain_prompt(pipeline, request.prompt or "") for request in requests]
    if isinstance(main, ClassConditioner):
        labels = [main.index_of(r.class_label) for r in requests if r.class_label is not None]
    if isinstance(main, LayoutConditioner):
        layouts = [
            read_layout(main, [box.to_dict() for box in request.layout or ()])
            for request in requests
        ]
    device = pipeline.execution.device
    regions = size = None
    if conditioner.wants_concat == "regions":
        regions = [_regions(request) for request in requests]
        size = pipeline.model.latent_shape(canvas.drawn_height, canvas.drawn_width)[1:]
    masked = mask = None
    if isinstance(spatial_conditioner(conditioner), InpaintingConditioner):
        assert canvas.image is not None and canvas.mask is not None, "the request has both"
        masked, mask = inpainting_inputs(pipeline.model, canvas.image, canvas.mask, device)
    return ConditionInputs(
        count=len(requests),
        captions=captions,
        text=TextOptions(emphasis=first.emphasis, clip_skip=first.clip_skip),
        labels=labels,
        layouts=layouts,
        regions=regions,
        latent_size=size,
        maps=None if canvas.maps is None else canvas.maps.to(device),
        low_res=None if canvas.low_res is None else canvas.low_res.to(device),
        masked_latents=masked,
        mask=mask,
    )


def _regions(request: GenerationRequest) -> tuple[Region, ...]:
    """The boxes of a request, whose labels are words."""
    found: list[Region] = []
    for number, each in enumerate(request.layout or ()):
        if not isinstance(each.label, str) or not each.label.strip():
            raise RequestError(
                f"layout[{number}].label: expected words for what the box shows, got {each.label!r}"
            )
        found.append(Region(each.label, *each.box))
    return tuple(found)


def latent_mask(mask: Tensor, shape: tuple[int, int, int], *, cover: bool) -> Tensor:
    """Bring a mask to the size of latents.

    Args:
        mask: ``(B, 1, H, W)`` in 0..1; from 0.5 on it counts.
        shape: ``(C, h, w)`` of a latent.
        cover: Draw every latent of which a pixel is to be drawn, so that none of them shows what
            was there. Otherwise its first pixel decides, as inpainting models were trained.

    Returns:
        ``(B, 1, h, w)``, 0 or 1.
    """
    hard = (mask >= 0.5).float()
    if cover:
        return F.adaptive_max_pool2d(hard, shape[1:])
    return F.interpolate(hard, shape[1:], mode="nearest")


def inpainting_inputs(
    model: LatentDiffusion, image: Tensor, mask: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prepare what an inpainting model is told.

    Args:
        model: Its conditioner says what stands where the image is masked.
        image: ``(B, 3, H, W)`` in -1..1.
        mask: ``(B, 1, H, W)`` in 0..1; from 0.5 on it is drawn.
        device: Where the first stage is.

    Returns:
        ``(B, C, h, w)`` latents of the image without what is to be drawn, and the mask
        ``(B, 1, h, w)``, 0 or 1.
    """
    spatial = spatial_conditioner(model.conditioner)
    assert isinstance(spatial, InpaintingConditioner)
    masked = torch.where(mask >= 0.5, spatial.config.masked_value, image)
    shape = model.latent_shape(*image.shape[-2:])
    small = latent_mask(mask, shape, cover=False)
    if not small.flatten(1).any(1).all():  # a mask of a few pixels falls between the latents
        small = latent_mask(mask, shape, cover=True)
    return model.encode(masked.to(device)).float(), small.to(device)
