"""Tiny pipelines of diffusers with random weights, and what they draw from given noise."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from benchmarks.random_models import liven
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mezzotint.checkpoints.tokenizer_files import write_clip_tokenizer
from mezzotint.conditioning.vocabularies import clip_tokenizer
from mezzotint.rng import SampleNoise

SEED, STEPS, MOST = 7, 10, 2  # of 255, anywhere
KINDS = ("sd1", "sd2", "sd2-v", "sd1-inpainting", "sd2-inpainting")

# the schedulers of the public folders: leading, one on, and the end at the first level
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "leading"},
}


def scheduler(name: str, prediction: str = "epsilon") -> Any:
    settings = {**SCHEDULE, **SCHEDULERS[name], "prediction_type": prediction}
    return getattr(diffusers, name)(**settings)


def text_model(kind: str) -> CLIPTextModel:
    second = kind.startswith("sd2")
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu" if second else "quick_gelu",
            projection_dim=32,
            pad_token_id=0 if second else 49407,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def unet(kind: str) -> diffusers.UNet2DConditionModel:
    second = kind.startswith("sd2")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if "inpainting" in kind else 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=[4, 8] if second else 8,
        use_linear_projection=second,
        norm_num_groups=32,
    )


def autoencoder() -> diffusers.AutoencoderKL:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )
    liven(vae, 3)
    with torch.no_grad():
        # a posterior without variance: its sample is its mode, whoever draws it
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -60
    return vae


def tokenizer(folder: Path, kind: str) -> CLIPTokenizer:
    pad = 0 if kind.startswith("sd2") else 49407
    write_clip_tokenizer(clip_tokenizer(), folder, pad_token_id=pad)
    return CLIPTokenizer.from_pretrained(folder)


def stable_diffusion(kind: str, folder: Path) -> diffusers.DiffusionPipeline:
    """Build a pipeline and save it as a folder, as diffusers does."""
    networks = {"text_encoder": text_model(kind), "unet": unet(kind)}
    for seed, network in enumerate(networks.values()):
        liven(network, seed)
        network.eval()
    name = "StableDiffusionInpaintPipeline" if "inpainting" in kind else "StableDiffusionPipeline"
    prediction = "v_prediction" if kind == "sd2-v" else "epsilon"
    pipeline = getattr(diffusers, name)(
        **networks,
        vae=autoencoder().eval(),
        tokenizer=tokenizer(folder.with_name(f"{folder.name}-tokenizer"), kind),
        scheduler=scheduler("PNDMScheduler", prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@contextmanager
def noise_is(noise: Tensor) -> Iterator[None]:
    """Let the pipelines that begin from pictures draw this noise."""
    modules = (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint)
    before = [module.randn_tensor for module in modules]
    try:
        for module in modules:
            module.randn_tensor = lambda shape, **_: noise.expand(shape).clone()
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.randn_tensor = function


def bytes_of(pictures: Any) -> np.ndarray:
    """What a pipeline gives as floating-point numbers, as 8 bits."""
    return (np.asarray(pictures) * 255).round().astype(int)


def photograph(size: int = 64) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size]
    values = np.stack([x * 255 // size, y * 255 // size, (x + 2 * y) * 3 % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def mask(size: int = 64) -> Image.Image:
    """White where to draw, along the borders of latents."""
    picture = Image.new("L", (size, size), 0)
    picture.paste(255, (16, 8, 48, 40))
    return picture


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())


def noise(side: int, channels: int = 3) -> Tensor:
    return SampleNoise([SEED]).normal((channels, side, side))


def differ(image: Image.Image, reference: np.ndarray) -> int:
    assert reference.std() > 5  # what is grey all over would be alike for any network
    return int(abs(np.asarray(image, dtype=int) - reference).max())
