"""A model of two classes with random weights, whose networks a test chooses."""

from pathlib import Path

import torch
from torch import nn

from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from mezzotint.models.unet import UNet, UNetConfig


def write_two_classes(
    path: Path, unet: UNetConfig, first_stage: AutoencoderKLConfig, side: int = 16
) -> Path:
    """Save a model of fruit and tools on ``side`` x ``side`` pixels, told in a width of 48."""
    torch.manual_seed(0)
    network = UNet(unet)
    nn.init.normal_(network.conv_out.weight, std=0.05)
    model = LatentDiffusion(
        AutoencoderKL(first_stage),
        network,
        ClassConditioner(ClassConditionerConfig(width=48, class_names=("fruit", "tool"))),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (side, side),
    )
    save_model(model, path)
    return path
