"""First stages: the encoder E and decoder D (Rombach et al. 2022, section 3.1 and appendix G).

Parameters are named as in the public diffusers checkpoints.
"""

from typing import Any, Literal, Self, cast

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.config import Config, parse
from mezzotint.errors import RequestError
from mezzotint.models.regularizers import DiagonalGaussian, Quantization, VectorQuantizer
from mezzotint.nn.attention import AttentionBlock
from mezzotint.nn.resnet import Downsample, ResnetBlock, Upsample

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "IdentityFirstStage",
    "IdentityFirstStageConfig",
    "VQModel",
    "VQModelConfig",
]

EPS = 1e-6  # of every normalisation of the published autoencoders

# channels of each level over those of the first, as in the configurations published with the paper
MULTIPLIERS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (1, 2),
    4: (1, 2, 4),
    8: (1, 2, 4, 4),
    16: (1, 1, 2, 2, 4),
    32: (1, 1, 2, 2, 4, 4),
}


class _ConvolutionalConfig(Config):
    """What both autoencoders' encoders and decoders share.

    Attributes:
        in_channels: Channels of an image.
        out_channels: Channels of a reconstruction.
        latent_channels: Channels of a latent.
        block_out_channels: Channels of each level; every level but the last halves the size, so
            f = 2 ** (levels - 1).
        layers_per_block: ResBlocks of a level of the encoder; the decoder has one more.
        attention_levels: Whether a level has attention, one flag each; null means none has.
        mid_attention: Whether the coarsest features pass through attention.
        norm_num_groups: Groups of every group normalisation.
        dropout: Dropout inside ResBlocks.
    """

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    latent_channels: PositiveInt = 4
    block_out_channels: tuple[PositiveInt, ...] = Field((128, 256, 512, 512), min_length=1)
    layers_per_block: PositiveInt = 2
    attention_levels: tuple[bool, ...] | None = None
    mid_attention: bool = True
    norm_num_groups: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _widths_of_factor(cls, data: Any) -> Any:
        """Let a recipe say ``factor`` and ``base_channels`` in place of ``block_out_channels``."""
        if not isinstance(data, dict) or "factor" not in data:
            return data
        fields = dict(cast(dict[str, Any], data))
        if fields.pop("block_out_channels", None) is not None:
            raise ValueError("factor and block_out_channels both say the levels; keep one")
        f, base = fields.pop("factor"), fields.pop("base_channels", 128)
        if f not in MULTIPLIERS:
            choices = ", ".join(str(choice) for choice in MULTIPLIERS)
            raise ValueError(
                f"factor: f must be a power of two up to 32, got {f}; choose from: {choices}"
            )
        return fields | {"block_out_channels": [base * m for m in MULTIPLIERS[f]]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.block_out_channels)
        if levels > 6:
            raise ValueError(
                f"block_out_channels has {levels} levels, which is f = {2 ** (levels - 1)};"
                " the most is 6, f = 32"
            )
        if self.attention_levels is not None and len(self.attention_levels) != levels:
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} flags, but block_out_channels"
                f" has {levels} levels; give one flag a level"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {width} channels"
                    " in block_out_channels"
                )
        return self

    @property
    def factor(self) -> int:
        """The factor f by which a latent is smaller than its image, in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return self.attention_levels is not None and self.attention_levels[level]

    @classmethod
    def for_factor(cls, f: int, *, base_channels: int = 128, **fields: Any) -> Self:
        """Build the configuration of an f with the paper's widths.

        Args:
            f: 1, 2, 4, 8, 16 or 32.
            base_channels: Channels of the first level.
            fields: Any other field.

        Raises:
            ConfigError: If ``f`` is none of these, or a field is wrong.
        """
        return parse(cls, {"factor": f, "base_channels": base_channels, **fields}, cls.__name__)


class AutoencoderKLConfig(_ConvolutionalConfig):
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
        self.encoder = _Encoder(config, 2 * channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = _Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Return the posterior q(z|x), its moments ``(B, latent_channels, H/f, W/f)``.

        Args:
            x: ``(B, in_channels, H, W)`` images in -1..1.

        Raises:
            RequestError: If f does not divide H and W.
        """
        _check_size(x, self.factor)
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``(B, out_channels, H, W)``, near -1..1 but not clamped.

        Args:
            z: ``(B, latent_channels, H/f, W/f)`` latents as `encode` gives them.
        """
        return self.decoder(self.post_quant_conv(z))

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight


class VQModelConfig(_ConvolutionalConfig):
    """The shape of a `VQModel`; the defaults are the paper's for f = 4.

    Attributes:
        codebook_size: Number of codes.
        embedding_dim: Length of a code; null means ``latent_channels``.
        commitment_weight: Weight beta of the term that holds the encoder to its codes.
    """

    kind: Literal["vq"] = "vq"
    latent_channels: PositiveInt = 3
    block_out_channels: tuple[PositiveInt, ...] = Field((128, 256, 512), min_length=1)
    codebook_size: PositiveInt = 8192
    embedding_dim: PositiveInt | None = None
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
        self.encoder = _Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.quantize = VectorQuantizer(
            config.codebook_size, config.code_channels, config.commitment_weight
        )
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = _Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Return continuous latents ``(B, latent_channels, H/f, W/f)``, before the quantiser.

        Args:
            x: ``(B, in_channels, H, W)`` images in -1..1.

        Raises:
            RequestError: If f does not divide H and W.
        """
        _check_size(x, self.factor)
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Quantise continuous latents and decode them.

        Args:
            z: ``(B, latent_channels, H/f, W/f)``.

        Returns:
            Images ``(B, out_channels, H, W)``, near -1..1 but not clamped.
        """
        quantization: Quantization = self.quantize(z)
        return self.decode_quantized(quantization.z_q)

    def decode_quantized(self, z_q: Tensor) -> Tensor:
        """Decode latents ``(B, latent_channels, H/f, W/f)`` that are codes already."""
        return self.decoder(self.post_quant_conv(z_q))

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
    in_channels: PositiveInt = 3

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

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` as they are."""
        return z


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


def _resnet(config: _ConvolutionalConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, groups=config.norm_num_groups, eps=EPS, dropout=config.dropout
    )


def _attention(config: _ConvolutionalConfig, channels: int) -> AttentionBlock:
    return AttentionBlock(channels, heads=1, groups=config.norm_num_groups, eps=EPS)


class _Level(nn.Module):
    """ResBlocks of one resolution, then a change of resolution."""

    def __init__(
        self,
        config: _ConvolutionalConfig,
        level: int,
        in_channels: int,
        layers: int,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for layer in range(layers):
            self.resnets.append(_resnet(config, channels if layer else in_channels, channels))
            if config.attends(level):
                self.attentions.append(_attention(config, channels))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if resample == "down":
            self.downsamplers.append(Downsample(channels, padding=0))
        elif resample == "up":
            self.upsamplers.append(Upsample(channels))

    def forward(self, h: Tensor) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions:
                h = self.attentions[layer](h)
        for resampler in (*self.downsamplers, *self.upsamplers):
            h = resampler(h)
        return h


class _MidBlock(nn.Module):
    """The coarsest features: ResBlock, attention, ResBlock."""

    def __init__(self, config: _ConvolutionalConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, channels)] * config.mid_attention)

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class _Encoder(nn.Module):
    """Images ``(B, C, H, W)`` to ``(B, out_channels, H/f, W/f)``."""

    def __init__(self, config: _ConvolutionalConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                config,
                level,
                widths[max(level - 1, 0)],
                config.layers_per_block,
                "down" if level < len(widths) - 1 else None,
            )
            for level in range(len(widths))
        )
        self.mid_block = _MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class _Decoder(nn.Module):
    """Latents ``(B, latent_channels, h, w)`` to images ``(B, out_channels, fh, fw)``."""

    def __init__(self, config: _ConvolutionalConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(
            _Level(
                config,
                level,
                widths[min(level + 1, last)],
                config.layers_per_block + 1,
                "up" if level else None,
            )
            for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
