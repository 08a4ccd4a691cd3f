"""First stages: the encoder E and decoder D (Rombach et al. 2022, section 3.1 and appendix G).

Parameters are named as in the public diffusers checkpoints.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from mezzotint.config import Config, Count, Width
from mezzotint.errors import RequestError
from mezzotint.models.encoder_decoder import ConvolutionalConfig, Decoder, Encoder
from mezzotint.models.regularizers import DiagonalGaussian, Quantization, VectorQuantizer
from mezzotint.models.striped import decode_in_stripes

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "IdentityFirstStage",
    "IdentityFirstStageConfig",
    "VQModel",
    "VQModelConfig",
]


class AutoencoderKLConfig(ConvolutionalConfig):
    """The shape of an `AutoencoderKL`; the defaults are Stable Diffusion's."""

    kind: Literal["kl"] = "kl"


class AutoencoderKL(nn.Module):
    """An autoencoder whose posterior is held near the standard normal (KL-reg.).

    Args:
        config: The shape.

    Attributes:
        factor: f, how many times smaller a latent is than its image.
        in_channels: Channels of an image.
        latent_channels: Channels of a latent.

    Example:
        >>> import torch
        >>> config = AutoencoderKLConfig(block_out_channels=(32, 32, 64))
        >>> first_stage = AutoencoderKL(config)
        >>> z = first_stage.encode(torch.zeros(1, 3, 32, 32)).mode()
        >>> z.shape, first_stage.decode(z).shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 3, 32, 32]))
    """

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.in_channels = config.in_channels
        self.latent_channels = channels = config.latent_channels
        self.encoder = Encoder(config, 2 * channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Return the posterior q(z|x), its moments ``(B, latent_channels, H/f, W/f)``.

        Args:
            x: ``(B, in_channels, H, W)`` images in -1..1.

        Raises:
            RequestError: If f does not divide H and W.
        """
        _check_size(x, self.factor)
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Return images ``(B, out_channels, H, W)``, near -1..1 but not clamped.

        Args:
            z: ``(B, latent_channels, H/f, W/f)`` latents as `encode` gives them.
            in_stripes: See `mezzotint.models.striped`: less memory, for large images.
        """
        return _decode(self.decoder, self.post_quant_conv(z), in_stripes)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight


class VQModelConfig(ConvolutionalConfig):
    """The shape of a `VQModel`; the defaults are the paper's for f = 4.

    Attributes:
        codebook_size: Number of codes.
        embedding_dim: Length of a code; null means ``latent_channels``.
        commitment_weight: Weight beta of the term that holds the encoder to its codes.
    """

    kind: Literal["vq"] = "vq"
    latent_channels: Width = 3
    block_out_channels: tuple[Width, ...] = Field((128, 256, 512), min_length=1)
    codebook_size: Count = 8192
    embedding_dim: Width | None = None
    commitment_weight: float = Field(0.25, ge=0)

    @property
    def code_channels(self) -> int:
        """Channels of the latents, which is the length of a code."""
        return self.embedding_dim or self.latent_channels


class VQModel(nn.Module):
    """An autoencoder whose decoder begins with a vector quantiser (VQ-reg.).

    Args:
        config: The shape.

    Attributes:
        factor: f, how many times smaller a latent is than its image.
        in_channels: Channels of an image.
        latent_channels: Channels of a latent as `encode` gives it, the length of a code.

    Example:
        >>> import torch
        >>> config = VQModelConfig(block_out_channels=(32, 64), codebook_size=16)
        >>> first_stage = VQModel(config)
        >>> z = first_stage.encode(torch.zeros(1, 3, 8, 8))
        >>> first_stage.quantize(z).indices.shape, first_stage.decode(z).shape
        (torch.Size([1, 4, 4]), torch.Size([1, 3, 8, 8]))
    """

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.in_channels = config.in_channels
        self.latent_channels = config.code_channels
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.quantize = VectorQuantizer(
            config.codebook_size, config.code_channels, config.commitment_weight
        )
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Return continuous latents ``(B, latent_channels, H/f, W/f)``, before the quantiser.

        Args:
            x: ``(B, in_channels, H, W)`` images in -1..1.

        Raises:
            RequestError: If f does not divide H and W.
        """
        _check_size(x, self.factor)
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Quantise continuous latents and decode them.

        Args:
            z: ``(B, latent_channels, H/f, W/f)``.
            in_stripes: See `mezzotint.models.striped`: less memory, for large images.

        Returns:
            Images ``(B, out_channels, H, W)``, near -1..1 but not clamped.
        """
        quantization: Quantization = self.quantize(z)
        return self.decode_quantized(quantization.z_q, in_stripes=in_stripes)

    def decode_quantized(self, z_q: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Decode latents ``(B, latent_channels, H/f, W/f)`` that are codes already."""
        return _decode(self.decoder, self.post_quant_conv(z_q), in_stripes)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight


class IdentityFirstStageConfig(Config):
    """The shape of an `IdentityFirstStage`.

    Attributes:
        in_channels: Channels of an image.
    """

    kind: Literal["identity"] = "identity"
    in_channels: Width = 3

    @property
    def factor(self) -> int:
        """1: a latent is as large as its image."""
        return 1


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion over pixels, LDM-1 of the paper.

    Args:
        config: The shape.
    """

    def __init__(self, config: IdentityFirstStageConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.in_channels = self.latent_channels = config.in_channels

    def encode(self, x: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` as they are."""
        return x

    def decode(self, z: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Return images ``(B, C, H, W)`` as they are."""
        return z


def _decode(decoder: Decoder, h: Tensor, in_stripes: bool) -> Tensor:
    return decode_in_stripes(decoder, h) if in_stripes else decoder(h)


def _check_size(x: Tensor, f: int) -> None:
    height, width = x.shape[-2:]
    if height % f == 0 and width % f == 0:
        return
    below = max(height // f, 1) * f, max(width // f, 1) * f
    above = -(-height // f) * f, -(-width // f) * f
    choices = " or ".join(f"{h}x{w}" for h, w in dict.fromkeys((below, above)))
    raise RequestError(
        f"the image's size {height}x{width} (height x width) is not divisible by the first stage's"
        f" f = {f}; nearest: {choices}"
    )
