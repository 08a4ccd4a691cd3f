"""What a batch of requests says, as the model's conditioner reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.conditioning.base import ConditionInputs, TextOptions
from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.layout import LayoutConditioner, read_layout
from mezzotint.conditioning.prompts import split_adapters
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    main_conditioner,
)
from mezzotint.generation.canvas import Canvas
from mezzotint.generation.request import GenerationRequest

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = ["condition_inputs", "latent_mask", "plain_prompt"]


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
    masked, mask = _inpainting(pipeline, canvas)
    device = pipeline.execution.device
    return ConditionInputs(
        count=len(requests),
        captions=captions,
        text=TextOptions(emphasis=first.emphasis, clip_skip=first.clip_skip),
        labels=labels,
        layouts=layouts,
        maps=None if canvas.maps is None else canvas.maps.to(device),
        low_res=None if canvas.low_res is None else canvas.low_res.to(device),
        masked_latents=masked,
        mask=mask,
    )


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


def _inpainting(pipeline: Pipeline, canvas: Canvas) -> tuple[Tensor | None, Tensor | None]:
    """The latents of the image without what is to be drawn, and the mask, for models told both."""
    conditioner = pipeline.model.conditioner
    spatial = conditioner.spatial if isinstance(conditioner, HybridConditioner) else conditioner
    if not isinstance(spatial, InpaintingConditioner):
        return None, None
    assert canvas.image is not None and canvas.mask is not None, "the request has both"
    model, device = pipeline.model, pipeline.execution.device
    masked = torch.where(canvas.mask >= 0.5, spatial.config.masked_value, canvas.image)
    shape = model.latent_shape(canvas.drawn_height, canvas.drawn_width)
    mask = latent_mask(canvas.mask, shape, cover=False)
    if not mask.flatten(1).any(1).all():  # a mask of a few pixels falls between the latents
        mask = latent_mask(canvas.mask, shape, cover=True)
    return model.encode(masked.to(device)).float(), mask.to(device)
