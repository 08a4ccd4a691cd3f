"""Pipelines of the public architectures with random weights, written as diffusers does."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["build", "liven", "stable_diffusion"]


def stable_diffusion(work: Path, *, tiny: bool) -> Path:
    """Return the folder of Stable Diffusion 1.5 with random weights, written if it is not there."""
    folder = work / ("sd1-tiny" if tiny else "sd1")
    if not (folder / "model_index.json").is_file():
        build("sd1", folder, tiny=tiny)
    return folder


def build(kind: str, folder: Path, *, tiny: bool = False) -> None:
    """Write a pipeline of random float16 weights as diffusers does.

    Args:
        kind: ``sd1``, ``sd2-v`` or ``sd1-inpainting``.
        folder: Of the pipeline.
        tiny: A few narrow layers, for pictures of 64 pixels, in place of the published shape.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    from mezzotint.checkpoints.tokenizer_files import write_clip_tokenizer
    from mezzotint.conditioning.vocabularies import clip_tokenizer

    second, inpainting = kind.startswith("sd2"), kind.endswith("inpainting")
    text = CLIPTextModel(_text_config(second, tiny))
    parts: dict[str, nn.Module] = {
        "text_encoder": text,
        "unet": diffusers.UNet2DConditionModel(
            in_channels=9 if inpainting else 4,
            cross_attention_dim=text.config.hidden_size,
            use_linear_projection=second,
            **_unet_shape(second, tiny),
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 64) if tiny else (128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if tiny else 2,
            sample_size=64 if tiny else 768 if second else 512,
        ),
    }
    for seed, part in enumerate(parts.values()):
        liven(part, seed)
        part.half().eval()
    with torch.no_grad():
        # a posterior without variance: its sample is its mode, whoever draws it
        quant = parts["vae"].quant_conv
        assert isinstance(quant, nn.Conv2d) and quant.bias is not None
        quant.weight[4:], quant.bias[4:] = 0, -60
    words = folder.with_name(f"{folder.name}-tokenizer")
    write_clip_tokenizer(clip_tokenizer(), words, pad_token_id=0 if second else 49407)
    name = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    getattr(diffusers, name)(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(words),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if second else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _text_config(second: bool, tiny: bool) -> Any:
    from transformers import CLIPTextConfig

    shape: dict[str, int] = {
        "hidden_size": 1024 if second else 768,
        "intermediate_size": 4096 if second else 3072,
        "num_hidden_layers": 23 if second else 12,
        "num_attention_heads": 16 if second else 12,
        "projection_dim": 512 if second else 768,
    }
    if tiny:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 32,
        }
    return CLIPTextConfig(
        **shape,
        hidden_act="gelu" if second else "quick_gelu",
        pad_token_id=0 if second else 49407,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def _unet_shape(second: bool, tiny: bool) -> dict[str, Any]:
    if not tiny:
        heads = [5, 10, 20, 20] if second else 8
        return {"sample_size": 96 if second else 64, "attention_head_dim": heads}
    return {
        "sample_size": 8,
        "attention_head_dim": [4, 8] if second else 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


@torch.no_grad()
def liven(module: nn.Module, seed: int) -> None:
    """Random weights at which every part matters; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise * (1.0 / value[0].numel()) ** 0.5)
        else:
            value.copy_(noise * 0.1 + (1.0 if "norm" in name and "weight" in name else 0.0))
