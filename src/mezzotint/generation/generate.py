"""From a request to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

import mezzotint
from mezzotint.conditioning.base import Conditioning, ConditionInputs
from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.device import autocast, precision_name, threads
from mezzotint.diffusion.guidance import ClassifierFreeGuidance
from mezzotint.diffusion.samplers import Callback, NoiseSource, get_sampler
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest, Resolved
from mezzotint.rng import SampleNoise

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = [
    "GeneratedImage",
    "decode_latents",
    "generate",
    "generate_each",
    "sample_latents",
    "to_bytes",
    "to_images",
]

Progress = Callable[[int, int], None]
_PIXELS_AT_ONCE = 16 * 256 * 256  # a default batch that keeps the decoder within a few hundred MB


@dataclass(frozen=True)
class GeneratedImage:
    """A picture and the request that draws it again.

    Attributes:
        image: 8-bit RGB.
        request: With ``resolved`` filled in.
    """

    image: Image.Image
    request: GenerationRequest


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into uint8, 0 to 255; what lies outside is clipped."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into 8-bit pictures; what lies outside is clipped."""
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in to_bytes(pixels)]


def generate(
    pipeline: Pipeline,
    request: GenerationRequest,
    *,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[GeneratedImage]:
    """Draw the pictures of a request.

    Args:
        pipeline: The model and how it runs.
        request: What to draw; image k uses ``seed + k`` and a noise stream of its own.
        batch_size: Pictures drawn at once.
        on_progress: Called with (steps done, steps in all) over all batches.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    alone = request.model_copy(update={"num_images": 1})
    rows = [alone.model_copy(update={"seed": request.seed + k}) for k in range(request.num_images)]
    drawn = generate_each(pipeline, rows, batch_size=batch_size, on_progress=on_progress)
    results: list[GeneratedImage] = []
    for k, item in enumerate(drawn):
        assert item.request.resolved is not None
        resolved = item.request.resolved.model_copy(update={"image_index": k})
        results.append(
            GeneratedImage(item.image, request.model_copy(update={"resolved": resolved}))
        )
    return results


def generate_each(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    *,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[GeneratedImage]:
    """Draw one picture of each request, together; they may differ in condition and seed only.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
    _check_task(pipeline, requests)
    height, width = _size(pipeline, requests[0])
    count = batch_size or max(1, _PIXELS_AT_ONCE // (height * width))
    count = min(count, len(requests))
    starts = range(0, len(requests), count)
    results: list[GeneratedImage] = []
    for number, start in enumerate(starts):
        rows = requests[start : start + count]

        def report(step: int, total: int, *_: Tensor, number: int = number) -> None:
            if on_progress is not None:
                on_progress(number * total + step + 1, len(starts) * total)

        pixels = decode_latents(pipeline, sample_latents(pipeline, rows, callback=report))
        for row, (image, request) in enumerate(zip(to_images(pixels), rows, strict=True)):
            resolved = _resolved(pipeline, len(rows), row)
            update = {
                "resolved": resolved,
                "width": width,
                "height": height,
                "model": request.model or pipeline.name,
            }
            results.append(GeneratedImage(image, request.model_copy(update=update)))
    return results


def _check_task(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        if request.task != pipeline.task:
            raise RequestError(
                f"{pipeline.name}: the model wants {pipeline.model.conditioner.description}; its"
                f" task is {pipeline.task!r}, not {request.task!r}"
            )


def _size(pipeline: Pipeline, request: GenerationRequest) -> tuple[int, int]:
    height, width = pipeline.model.image_size
    return request.height or height, request.width or width


def _resolved(pipeline: Pipeline, batch_size: int, row: int) -> Resolved:
    return Resolved(
        model_hash=pipeline.model_hash,
        precision=precision_name(pipeline.execution.precision),
        engine="torch",
        device=str(pipeline.execution.device),
        threads=threads(),
        batch_size=batch_size,
        batch_row=row,
        image_index=0,
        mezzotint_version=mezzotint.__version__,
        torch_version=torch.__version__,
    )


def _inputs(pipeline: Pipeline, rows: Sequence[GenerationRequest]) -> ConditionInputs:
    conditioner = pipeline.model.conditioner
    if conditioner.wants == "caption":
        return ConditionInputs(count=len(rows), captions=[r.prompt or "" for r in rows])
    if isinstance(conditioner, ClassConditioner):
        labels = [conditioner.index_of(r.class_label) for r in rows if r.class_label is not None]
        return ConditionInputs(count=len(rows), labels=labels)
    return ConditionInputs(count=len(rows))


def _null(pipeline: Pipeline, rows: Sequence[GenerationRequest]) -> Conditioning:
    if any(r.negative_prompt for r in rows):
        texts = [r.negative_prompt or "" for r in rows]
        return pipeline.model.conditioner(ConditionInputs(count=len(rows), captions=texts))
    return pipeline.model.conditioner.null(len(rows))


@torch.inference_mode()
def sample_latents(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    *,
    rng: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Condition and sample: one latent for each request, as one batch.

    Args:
        pipeline: The model and how it runs.
        requests: What to draw; they may differ in condition and seed only.
        rng: Where all noise comes from, the starting noise too; by default each request's seed.
        callback: Told of every step, with the sampler's state and the estimate of the clean latent.

    Returns:
        ``(B, C, h, w)`` normalised latents.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    _check_task(pipeline, requests)
    first, model, execution = requests[0], pipeline.model, pipeline.execution
    sampler = get_sampler(first.sampler)
    options = {"eta": first.eta} if first.eta is not None else {}
    if unknown := set(options) - set(sampler.options):
        raise RequestError(f"sampler {first.sampler!r} has no option {', '.join(sorted(unknown))}")
    if first.steps > model.schedule_config.num_train_timesteps:
        raise RequestError(
            f"steps: {first.steps} is more than the {model.schedule_config.num_train_timesteps}"
            " noise levels that the model was trained on"
        )
    sigmas = sampler.sigmas(model.schedule, first.steps, first.spacing)
    shape = model.latent_shape(*_size(pipeline, first))
    if rng is None:
        rng = SampleNoise([r.seed for r in requests])
    # without a condition there is nothing to be guided towards
    scale = first.guidance_scale if model.conditioner.wants is not None else 1.0
    with autocast(execution):
        cond = model.conditioner(_inputs(pipeline, requests))
        guided = ClassifierFreeGuidance(
            model.denoiser,
            _null(pipeline, requests) if scale != 1.0 else None,
            scale,
            rescale=first.guidance_rescale,
        )
        noise = rng.normal(shape).to(execution.device)
        x = noise * model.schedule.start_scale(sigmas[0])
        return sampler.function(
            lambda x, sigma: guided(x, sigma, cond), x, sigmas, rng, callback=callback, **options
        )


@torch.inference_mode()
def decode_latents(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Turn normalised latents ``(B, C, h, w)`` into pixels ``(B, 3, H, W)``, about [-1, 1]."""
    with autocast(pipeline.execution):
        return pipeline.model.decode(latents)
