"""LoRA files for the tiny models, as other software writes them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
DOWN = "lora_unet_down_blocks_0_downsamplers_0_conv"
TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"
SHAPES = {QUERY: (32, 32), CONV: (32, 32, 3, 3), DOWN: (32, 32, 3, 3), TEXT: (96, 64)}
ALPHA = 3.0


def kohya(rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for key, (out, into, *kernel) in SHAPES.items():
        found[f"{key}.lora_down.weight"] = torch.randn(rank, into, *kernel, generator=generator)
        shape = (out, rank, *[1 for _ in kernel])
        found[f"{key}.lora_up.weight"] = torch.randn(shape, generator=generator)
        found[f"{key}.alpha"] = torch.tensor(ALPHA)
    return found


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "ink", **metadata: str) -> Path:
    save_file(tensors, path := folder / f"{name}.safetensors", metadata)
    return path
