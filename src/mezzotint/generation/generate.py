"""From a request to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

import mezzotint
from mezzotint.device import precision_name, threads
from mezzotint.diffusion.samplers import get_sampler
from mezzotint.errors import RequestError
from mezzotint.generation.adapters import adapters_of
from mezzotint.generation.blending import blend_in
from mezzotint.generation.canvas import back_project, lay_out
from mezzotint.generation.guides import ImageEnergy, energy_of, refuse_unknown
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.request import GenerationRequest
from mezzotint.generation.resolved import DecoderUse, ReadAs, Resolved
from mezzotint.generation.sampling import (
    decode_latents,
    sample_again,
    sample_latents,
    to_bytes,
    to_images,
)
from mezzotint.generation.tiling import seamless

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = ["GeneratedImage", "generate", "generate_each", "nth"]

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


def nth(request: GenerationRequest, index: int) -> GenerationRequest:
    """Return the request that draws image ``index`` of a request alone."""
    update: dict[str, object] = {"num_images": 1, "resolved": None}
    if request.variation_seed is None:
        update["seed"] = max(0, request.seed + index)
    else:
        update["variation_seed"] = max(0, request.variation_seed + index)
    return request.model_copy(update=update)


def generate(
    pipeline: Pipeline,
    request: GenerationRequest,
    *,
    pictures: InputPictures | None = None,
    functions: Mapping[str, ImageEnergy] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[GeneratedImage]:
    """Draw the pictures of a request.

    Args:
        pipeline: The model and how it runs.
        request: What to draw; image k uses ``seed + k`` and a noise stream of its own.
        pictures: Where its input pictures are found; by default at their paths.
        functions: The Python functions that guide it, by the names that it has for them.
        batch_size: Pictures drawn at once.
        on_progress: Called with (steps done, steps in all) over all batches.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    rows = [nth(request, k) for k in range(request.num_images)]
    drawn = generate_each(
        pipeline,
        rows,
        pictures=pictures,
        functions=functions,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    results: list[GeneratedImage] = []
    for k, item in enumerate(drawn):
        assert item.request.resolved is not None
        resolved = item.request.resolved.model_copy(update={"image_index": k})
        update = {
            "resolved": resolved,
            "width": item.request.width,
            "height": item.request.height,
            "model": item.request.model,
            "spacing": item.request.spacing,
        }
        results.append(GeneratedImage(item.image, request.model_copy(update=update)))
    return results


def generate_each(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    *,
    pictures: InputPictures | None = None,
    functions: Mapping[str, ImageEnergy] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[GeneratedImage]:
    """Draw one picture of each request, together.

    They may differ in condition, inputs, adapters, guides and seed only.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
    for request in requests:
        pipeline.check(request)
        refuse_unknown(request, functions or {})
    pictures = pictures or InputPictures()
    count = min(batch_size or _most_at_once(pipeline, requests[0], pictures), len(requests))
    batches = list(_batches(pipeline, requests, count))
    results: list[GeneratedImage] = []
    for number, rows in enumerate(batches):
        passes = 2 if rows[0].high_res is not None else 1

        def report(
            pass_: int, step: int, total: int, number: int = number, of: int = passes
        ) -> None:
            if on_progress is not None:
                done = (number * of + pass_) * total + step + 1
                on_progress(done, len(batches) * of * total)

        results += _draw(pipeline, rows, pictures, functions or {}, report)
    return results


def _draw(
    pipeline: Pipeline,
    rows: Sequence[GenerationRequest],
    pictures: InputPictures,
    functions: Mapping[str, ImageEnergy],
    report: Callable[[int, int, int], None],
) -> list[GeneratedImage]:
    """Draw one batch."""
    first, model = rows[0], pipeline.model
    canvas = lay_out(model, rows, pictures)
    adapters = adapters_of(pipeline, first)
    small = () if pipeline.decoder is None else (pipeline.decoder.decoder,)
    guide = energy_of(first, pictures, functions, pipeline.execution.device)
    with (
        pipeline.adapted(adapters) as sums,
        seamless(model.unet, model.first_stage, *small, active=first.tiling),
    ):
        latents = sample_latents(
            pipeline,
            rows,
            canvas=canvas,
            guide=guide,
            callback=lambda i, n, *_: report(0, i, n),
        )
        if first.high_res is not None:
            latents = sample_again(
                pipeline,
                rows,
                latents,
                first.high_res,
                guide=guide,
                callback=lambda i, n, *_: report(1, i, n),
            )
        pixels = decode_latents(pipeline, latents, tiled=first.tiled_decoding)
    if first.back_projection:
        assert canvas.low_res is not None, "the request says that it is for super-resolution"
        pixels = back_project(pixels.cpu(), canvas.low_res, first.back_projection)
    if first.poisson_blending:
        assert canvas.image is not None and canvas.mask is not None, "there is a mask"
        pixels = blend_in(pixels.cpu().float(), canvas.image, canvas.mask)
    finished: Tensor = to_bytes(pixels)
    if first.high_res is None:
        finished = canvas.finish(finished)
    else:
        height, width = (round(n * first.high_res.scale) for n in (canvas.height, canvas.width))
        finished = finished[..., :height, :width]
    results: list[GeneratedImage] = []
    for row, (image, request) in enumerate(zip(to_images(finished), rows, strict=True)):
        update = {
            "resolved": _resolved(pipeline, len(rows), row, sums),
            "model": request.model or pipeline.name,
            "spacing": request.spacing or get_sampler(request.sampler).default_spacing,
        }
        if request.padding is None:
            update |= {"width": canvas.width, "height": canvas.height}
        results.append(GeneratedImage(image, request.model_copy(update=update)))
    return results


def _batches(
    pipeline: Pipeline, requests: Sequence[GenerationRequest], count: int
) -> Iterator[list[GenerationRequest]]:
    """Rows that are drawn together: at most so many, and of the same adapters and guides."""
    for _, group in groupby(requests, key=lambda r: (adapters_of(pipeline, r), r.guides)):
        rows = list(group)
        for start in range(0, len(rows), count):
            yield rows[start : start + count]


def _most_at_once(pipeline: Pipeline, request: GenerationRequest, pictures: InputPictures) -> int:
    canvas = lay_out(pipeline.model, [request], pictures)
    scale = request.high_res.scale if request.high_res is not None else 1.0
    pixels = _PIXELS_AT_ONCE if not request.guides else _PIXELS_AT_ONCE // 16
    return max(1, int(pixels / (canvas.drawn_height * canvas.drawn_width * scale**2)))


def _resolved(pipeline: Pipeline, batch_size: int, row: int, sums: dict[str, str]) -> Resolved:
    small = pipeline.decoder
    return Resolved(
        model_hash=pipeline.model_hash,
        precision=precision_name(pipeline.execution.precision),
        engine=pipeline.engine.name,
        device=str(pipeline.execution.device),
        threads=threads(),
        batch_size=batch_size,
        batch_row=row,
        image_index=0,
        mezzotint_version=mezzotint.__version__,
        torch_version=torch.__version__,
        engine_version=pipeline.engine.version,
        quantization=None if pipeline.quantization == "none" else pipeline.quantization,
        decoder=DecoderUse(path=str(small.path), sha256=small.sha256) if small else None,
        adapters=sums,
        read_as=ReadAs.from_dict(pipeline.read_as),
    )
