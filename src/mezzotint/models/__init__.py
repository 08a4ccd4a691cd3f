"""Networks: first stages, the UNet, and what their training needs."""

from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "IdentityFirstStage",
    "IdentityFirstStageConfig",
    "UNet",
    "UNetConfig",
    "VQModel",
    "VQModelConfig",
]
