"""A programme of two tiny stages, and how a test trains it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tools.train_shipped import programme as programme_module
from tools.train_shipped.programme import Programme, run_piece

from mezzotint.training import run as run_module

CPU = torch.device("cpu")
DATA = {
    "kind": "portraits",
    "concepts": ["red-apple", "fox", "key", "star"],
    "resolution": 16,
    "count": 16,
}
COMMON = {
    "data": DATA,
    "batch_size": 4,
    "ema_decay": 0.9,
    "precision": "float32",
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3},
}
AUTOENCODER = {
    "kind": "autoencoder",
    "name": "tiny-autoencoder",
    "model": {
        "kind": "kl",
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_attention": False,
    },
    "loss": {"perceptual": 0.0, "adversarial": None, "kl": 0.1},
    "normalization": "channel",
    "budget": {"max_steps": 3},
    **COMMON,
}
TEXT = {
    "kind": "diffusion",
    "name": "tiny-text-to-image",
    "first_stage": {"kind": "trained", "path": "autoencoder"},
    "unet": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "attention_levels": [False, True],
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "norm_num_groups": 4,
    },
    "conditioning": {
        "kind": "text",
        "width": 8,
        "layers": 1,
        "heads": 2,
        "max_length": 12,
        "vocab_size": 128,
    },
    "schedule": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "sample_steps": 2,
    "budget": {"max_steps": 6},
    **COMMON,
}


def train(programme: Programme, steps: int | None = None) -> bool:
    """A piece of so many steps of each stage that it reaches, in place of so many minutes."""
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:

            def few(*given: Any, stop_minutes: float, **told: Any) -> Path:
                return run_module.train(*given, stop_after=steps, **told)

            patch.setattr(programme_module, "train", few)
        return run_piece(programme, time.time() + 600, CPU, processes=1)


def weights(programme: Programme) -> dict[str, torch.Tensor]:
    """Of the UNet, as they are shipped."""
    half = programme.work / "text-to-image" / "half"
    return load_file(half / "unet" / "diffusion_pytorch_model.safetensors")
