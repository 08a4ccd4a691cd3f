"""From requests to latents, and from latents to pixels."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.conditioning.base import Conditioning
from mezzotint.diffusion.consistency import ConsistencyFunction
from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.energy_guidance import EnergyGuidance
from mezzotint.diffusion.guidance import ClassifierFreeGuidance
from mezzotint.diffusion.inpainting import HoldKnown
from mezzotint.diffusion.samplers import Callback, Denoise, NoiseSource, SamplerInfo, get_sampler
from mezzotint.errors import RequestError
from mezzotint.generation.canvas import Canvas, lay_out
from mezzotint.generation.conditions import condition_inputs, latent_mask
from mezzotint.generation.guides import ImageEnergy, energy_of
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.request import GenerationRequest, HighRes
from mezzotint.generation.shared_steps import SharedSteps
from mezzotint.generation.tiling import denoise_in_tiles, tile_of
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.rng import SampleNoise, VariedNoise, mix

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = [
    "STRENGTHS",
    "decode_latents",
    "sample_again",
    "sample_latents",
    "to_bytes",
    "to_images",
]

STRENGTHS = {"image-to-image": 0.75}  # of tasks that say none; of others 1
_SECOND_PASS = 2  # keys the noise of the second pass apart from that of the first


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into uint8, 0 to 255; what lies outside is clipped."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn ``(B, 3, H, W)``, uint8 or in [-1, 1], into 8-bit pictures."""
    values = pixels if pixels.dtype == torch.uint8 else to_bytes(pixels)
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in values]


@torch.inference_mode()
def sample_latents(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    *,
    canvas: Canvas | None = None,
    guide: ImageEnergy | None = None,
    rng: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Condition and sample: one latent for each request, as one batch.

    Args:
        pipeline: The model and how it runs.
        requests: What to draw; they may differ in condition, inputs and seed only.
        canvas: From `mezzotint.generation.canvas.lay_out`; laid out here if not given.
        guide: From `mezzotint.generation.guides.energy_of`; made here if not given.
        rng: Where all noise comes from, the starting noise too; by default each request's seed.
        callback: Told of every step, with the sampler's state and the estimate of the clean latent.

    Returns:
        ``(B, C, h, w)`` normalised latents.

    Raises:
        RequestError: If the model cannot give what is asked.
    """
    first, model = requests[0], pipeline.model
    if canvas is None:
        canvas = lay_out(model, requests, InputPictures())
    strength = first.strength or STRENGTHS.get(first.task, 1.0)
    begun = None
    with pipeline.running():
        if canvas.image is not None:
            begun = model.encode(canvas.image.to(pipeline.execution.device)).float()
    return _sample(
        pipeline,
        requests,
        canvas,
        begun=begun,
        strength=strength,
        steps=first.steps,
        guide=guide,
        rng=rng or _noise(requests),
        callback=callback,
    )


@torch.inference_mode()
def sample_again(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    latents: Tensor,
    high_res: HighRes,
    *,
    guide: ImageEnergy | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Enlarge latents and draw the detail that the larger size has room for.

    Args:
        pipeline: The model and how it runs.
        requests: What drew the latents.
        latents: ``(B, C, h, w)`` of the first pass.
        high_res: How far to enlarge, and how much to draw anew.
        guide: As for `sample_latents`.
        callback: Told of every step.

    Returns:
        ``(B, C, round(scale h), round(scale w))`` normalised latents.
    """
    factor = pipeline.model.first_stage.factor
    height, width = (round(side * high_res.scale) for side in latents.shape[-2:])
    if high_res.upscaler == "latent":
        begun = F.interpolate(latents, (height, width), mode="bilinear")
    else:
        small = to_images(decode_latents(pipeline, latents))
        size = width * factor, height * factor
        large = [np.asarray(p.resize(size, Image.Resampling.LANCZOS), np.float32) for p in small]
        pixels = torch.from_numpy(np.stack(large) / 127.5 - 1.0).permute(0, 3, 1, 2)
        with pipeline.running():
            begun = pipeline.model.encode(pixels.to(latents.device)).float()
    canvas = Canvas(
        height=height * factor,
        width=width * factor,
        drawn_height=height * factor,
        drawn_width=width * factor,
    )
    return _sample(
        pipeline,
        requests,
        canvas,
        begun=begun,
        strength=high_res.strength,
        steps=high_res.steps or requests[0].steps,
        guide=guide,
        rng=SampleNoise([mix(request.seed, _SECOND_PASS) for request in requests]),
        callback=callback,
    )


@torch.inference_mode()
def decode_latents(pipeline: Pipeline, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Turn normalised latents ``(B, C, h, w)`` into pixels ``(B, 3, H, W)``, about [-1, 1].

    Args:
        pipeline: The model and how it runs.
        latents: What to decode.
        tiled: Whether to decode in stripes, which torch does whatever the engine is.
    """
    with pipeline.running():
        return pipeline.decode(latents, in_stripes=tiled)


def _noise(requests: Sequence[GenerationRequest]) -> SampleNoise:
    seeds, amount = [request.seed for request in requests], requests[0].variation_strength
    if not amount:
        return SampleNoise(seeds)
    return VariedNoise(seeds, [request.variation_seed or 0 for request in requests], amount)


def _sample(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    canvas: Canvas,
    *,
    begun: Tensor | None,
    strength: float,
    steps: int,
    guide: ImageEnergy | None,
    rng: NoiseSource,
    callback: Callback | None,
) -> Tensor:
    model, device = pipeline.model, pipeline.execution.device
    guide = guide or energy_of(requests[0], InputPictures(), {}, device)
    sampler, options = _sampler(pipeline, requests[0])
    sigmas = _levels(pipeline, sampler, requests[0], steps, strength)
    shape = model.latent_shape(canvas.drawn_height, canvas.drawn_width)
    shared = SharedSteps(model, requests)
    with (
        pipeline.running(),
        _fixed_weights(model, active=guide is not None),
        shared.acting(),
    ):
        denoise = _denoise(pipeline, requests, canvas, shared)
        if sampler.distilled:
            denoise = ConsistencyFunction(denoise, model.schedule)
        if guide is not None:
            denoise = _led(model, denoise, guide, canvas)
        noise = rng.normal(shape).to(device)
        # at full strength an image is still begun from, under much noise, unless a mask is filled
        from_noise = strength == 1.0 and canvas.mask is not None
        if begun is None or from_noise:
            x = noise * model.schedule.start_scale(sigmas[0])
        else:
            x = begun + sigmas[0].item() * noise
        hold = None
        if canvas.mask is not None and model.conditioner.wants_concat != "inpainting":
            assert begun is not None, "a mask is of an image"
            hold = HoldKnown(
                denoise,
                begun,
                noise,
                latent_mask(canvas.mask, shape, cover=True).to(device),
                free_level=sigmas[0].item() if from_noise else None,
            )
        counted = shared.counting(callback)
        x = sampler.function(hold or denoise, x, sigmas, rng, callback=counted, **options)
        return hold.keep(x) if hold else x


def _sampler(pipeline: Pipeline, request: GenerationRequest) -> tuple[SamplerInfo, dict[str, Any]]:
    sampler = get_sampler(request.sampler)
    options: dict[str, Any] = {"eta": request.eta} if request.eta is not None else {}
    if unknown := set(options) - set(sampler.options):
        names = ", ".join(sorted(unknown))
        raise RequestError(f"sampler {request.sampler!r} has no option {names}")
    if "multistep" in sampler.options and pipeline.model.schedule.prediction_type == "v_prediction":
        # the only other software that runs it with such networks combines what they predict
        options["multistep"] = "v_prediction"
    return sampler, options


def _levels(
    pipeline: Pipeline,
    sampler: SamplerInfo,
    request: GenerationRequest,
    steps: int,
    strength: float,
) -> Tensor:
    """The noise levels to visit: of all steps the last, as many as the strength says."""
    model = pipeline.model
    most = model.schedule_config.num_train_timesteps
    if steps > most:
        raise RequestError(
            f"steps: {steps} is more than the {most} noise levels that the model was trained on"
        )
    sigmas = sampler.sigmas(model.schedule, steps, request.spacing)
    made = max(1, int(steps * strength))
    return sigmas[steps - made :]


def _denoise(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    canvas: Canvas,
    shared: SharedSteps,
) -> Denoise:
    """The model under the condition and guidance of the requests."""
    model, first = pipeline.model, requests[0]
    inputs = condition_inputs(pipeline, requests, canvas)
    cond = model.conditioner(inputs)
    if model.unet.config.guidance_embed_dim is not None:
        # a distilled network is told the scale of guidance, and needs no second half
        scales = torch.full(
            (len(requests),), first.guidance_scale, device=pipeline.execution.device
        )
        told = Denoiser(shared.network(scales), model.schedule)
        return lambda x, sigma: told(x, sigma, cond)
    # without a condition there is nothing to be guided towards
    scale = first.guidance_scale if model.conditioner.wants is not None else 1.0
    null: Conditioning | None = None
    if scale != 1.0 and inputs.captions is not None:
        texts = [request.negative_prompt or "" for request in requests]
        null = model.conditioner(replace(inputs, captions=texts, unnamed=True))
    elif scale != 1.0:
        null = model.conditioner(inputs, torch.ones(len(requests), dtype=torch.bool))
    denoiser = Denoiser(shared.network(), model.schedule)
    if first.tiled_sampling:
        tile = tile_of(*model.latent_shape(*model.image_size)[1:])
        denoiser = partial(denoise_in_tiles, denoiser, tile=tile, overlap=tile // 4)
    guided = ClassifierFreeGuidance(
        denoiser,
        null,
        scale,
        rescale=first.guidance_rescale,
        interval=first.guidance_interval,
    )
    return lambda x, sigma: guided(x, sigma, cond)


def _led(model: LatentDiffusion, denoise: Denoise, guide: ImageEnergy, canvas: Canvas) -> Denoise:
    """Lead a denoiser by an energy of the pictures that its latents decode to."""

    def energy(latents: Tensor) -> Tensor:
        images = model.decode(latents).float()[..., : canvas.height, : canvas.width]
        # others' functions compute in the precision that they say
        with torch.autocast(images.device.type, enabled=False):
            return guide(images)

    led = EnergyGuidance[None](lambda x, sigma, _: denoise(x, sigma), energy)
    return lambda x, sigma: led(x, sigma, None)


@contextmanager
def _fixed_weights(model: LatentDiffusion, *, active: bool) -> Generator[None]:
    """Keep gradients from the weights, where only those of the image are wanted."""
    learning = [p for p in model.parameters() if active and p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
