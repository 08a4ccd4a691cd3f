"""The time-conditional UNet epsilon_theta (Rombach et al. 2022, sections 3.2 and 3.3).

Parameters are named as in the public diffusers checkpoints.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mezzotint.config import Config, Count, Depth, Width
from mezzotint.errors import RequestError
from mezzotint.models.sampling_memory import SamplingMemory
from mezzotint.models.unet_blocks import DownBlock, MidBlock, UpBlock
from mezzotint.nn.attention import AttentionBlock, SpatialTransformer
from mezzotint.nn.embeddings import TimestepEmbedding, coordinates, timestep_embedding
from mezzotint.nn.kept_context import KeptContext
from mezzotint.nn.regions import Regions

__all__ = ["UNet", "UNetConfig"]

# time, context and its mask
_Told = tuple[Tensor, Tensor | KeptContext | None, Tensor | Regions | None]
_MOST_BLOCKS = 2048  # of all levels, transformers' included; those of SDXL are 200


class UNetConfig(Config):
    """The shape of a `UNet`; the defaults are those of Stable Diffusion 1.

    Attributes:
        in_channels: Channels of the noisy latent, with those of concatenated conditions.
        out_channels: Channels of the prediction.
        sample_size: Height and width of the latents that it was trained on; only noted.
        block_out_channels: Channels of each level; every level but the last halves the size.
        layers_per_block: ResBlocks of a level on the way down; one more on the way up.
        attention_levels: Whether a level has attention, one flag each. The middle always has.
        cross_attention_dim: Width of the context tokens; null makes the attention plain
            self-attention.
        num_attention_heads: Number of heads, the same at every level.
        attention_head_dim: Width of one head instead, which sets their number at each level.
        transformer_layers_per_block: Transformer blocks of each attention.
        use_linear_projection: Linear layers in and out of the transformers, as in Stable
            Diffusion 2, in place of convolutions of size 1.
        resnet_time_scale_shift: Whether time is added to the features ("default") or scales and
            shifts them after normalisation.
        resblock_updown: Change resolution by ResBlocks in place of convolutions.
        downsample_padding: 1 pads every side, 0 only right and bottom.
        num_class_embeds: Number of class labels, a null among them, if it is told classes.
        coordinate_channels: Sines and cosines of where a position lies between top and bottom and
            between left and right, that are concatenated to the input; a multiple of 4, 0 for
            none. Without them a network knows places by the padding of its edges alone (Liu et al.
            2018, arXiv 1807.03247).
        vector_dim: Width of a vector that is added to the time embedding through an MLP.
        guidance_embed_dim: Width of the embedding of the guidance scale in a distilled model.
        norm_num_groups: Groups of every group normalisation.
        norm_eps: Epsilon of the ResBlocks' normalisations.
        dropout: Dropout inside ResBlocks.
        flip_sin_to_cos: Time embedding has cosines first.
        freq_shift: See `timestep_embedding`.
    """

    in_channels: Width = 4
    out_channels: Width = 4
    sample_size: Width | None = None
    block_out_channels: tuple[Width, ...] = Field(
        (320, 640, 1280, 1280), min_length=1, max_length=16
    )
    layers_per_block: Depth = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    cross_attention_dim: Width | None = 768
    num_attention_heads: PositiveInt | None = 8
    attention_head_dim: PositiveInt | None = None
    transformer_layers_per_block: Depth = 1
    use_linear_projection: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resblock_updown: bool = False
    downsample_padding: Literal[0, 1] = 1
    num_class_embeds: Count | None = None
    coordinate_channels: int = Field(0, ge=0, le=256, multiple_of=4)
    vector_dim: Width | None = None
    guidance_embed_dim: Width | None = None
    norm_num_groups: PositiveInt = 32
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    flip_sin_to_cos: bool = True
    freq_shift: int = Field(0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels = self.block_out_channels
        if len(self.attention_levels) != len(channels):
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} flags, but block_out_channels"
                f" has {len(channels)} levels; give one flag a level"
            )
        if (self.num_attention_heads is None) == (self.attention_head_dim is None):
            raise ValueError(
                "exactly one of num_attention_heads and attention_head_dim must be set;"
                " set the other to null"
            )
        depth = self.transformer_layers_per_block if self.cross_attention_dim is not None else 1
        attending = sum(self.attention_levels) * depth
        blocks = (len(channels) + attending) * (2 * self.layers_per_block + 1)
        if blocks > _MOST_BLOCKS:
            raise ValueError(
                f"block_out_channels, layers_per_block and transformer_layers_per_block make"
                f" {blocks:,} blocks, expected at most {_MOST_BLOCKS:,}"
            )
        if self.num_class_embeds is not None and self.vector_dim is not None:
            raise ValueError("num_class_embeds and vector_dim exclude each other; set one to null")
        for width in channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {width} channels"
                    " in block_out_channels"
                )
        attended = {w for w, on in zip(channels, self.attention_levels, strict=True) if on}
        name = "attention_head_dim" if self.attention_head_dim else "num_attention_heads"
        divisor = self.attention_head_dim or self.num_attention_heads or 1
        for width in sorted(attended | {channels[-1]}):
            if width % divisor:
                raise ValueError(
                    f"{name} {divisor} does not divide the {width} channels of a level with"
                    " attention in block_out_channels"
                )
        return self

    def heads(self, channels: int) -> int:
        """Return the number of attention heads at a level of so many channels."""
        if self.num_attention_heads is not None:
            return self.num_attention_heads
        assert self.attention_head_dim is not None
        return channels // self.attention_head_dim

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding that every ResBlock gets."""
        return 4 * self.block_out_channels[0]

    @property
    def outputs_down(self) -> int:
        """How many outputs there are on the way down, beside that of the first convolution."""
        return len(self.block_out_channels) * (self.layers_per_block + 1) - 1


class UNet(nn.Module):
    """Predicts the noise, the velocity or the clean latent from a noisy one.

    The last convolution of every residual branch, and of the network, starts at zero (Dhariwal and
    Nichol 2021): an untrained network predicts 0, which is the mean of its target.

    Args:
        config: The shape.

    Example:
        >>> config = UNetConfig(
        ...     block_out_channels=(32, 64), attention_levels=(False, True), cross_attention_dim=16
        ... )
        >>> x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
        >>> UNet(config)(x, torch.tensor([0.0, 999.0]), context).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, time_dim = config.block_out_channels, config.time_embed_dim

        entering = config.in_channels + config.coordinate_channels
        self.conv_in = nn.Conv2d(entering, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            widths[0], time_dim, condition_dim=config.guidance_embed_dim
        )
        self.class_embedding: nn.Module | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_dim)
        elif config.vector_dim is not None:
            self.class_embedding = TimestepEmbedding(config.vector_dim, time_dim)

        self.down_blocks = nn.ModuleList()
        skips = [width := widths[0]]
        for level, out_width in enumerate(widths):
            last = level == len(widths) - 1
            self.down_blocks.append(DownBlock(config, level, width, downsample=not last))
            width = out_width
            skips += [width] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(config)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            mine = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, width, mine, upsample=level > 0))
            width = widths[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        # an untrained network predicts 0. Residual branches keep torch's start: zero there too, as
        # in the original, learned more slowly in the first thousands of steps
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each level in the backward pass: less memory, about a third more time."""
        self.gradient_checkpointing = True

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        memory: SamplingMemory | None = None,
        context_boxes: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: ``(B, in_channels, H, W)`` noisy latents, variance-preserving, any conditions to be
                concatenated already at the end of the channels.
            timestep: ``(B,)`` times, whole or fractional, 0 up to the schedule's number of steps.
            context: ``(B, M, cross_attention_dim)`` tokens, if the model cross-attends.
            context_mask: ``(B, M)`` bool, true where a token is real; absent means all are.
            vector: ``(B,)`` integer class labels, or ``(B, vector_dim)``.
            guidance: ``(B,)`` guidance scales of a distilled model, 1 meaning none.
            memory: What the calls of one sampling share.
            context_boxes: ``(B, M, 4)`` left, top, right and bottom of the part that attends to a
                token, as shares; absent means all does.

        Returns:
            ``(B, out_channels, H, W)``.

        Raises:
            RequestError: If a condition is missing, or the model has no use for one.
        """
        self.check_conditions(context, vector, guidance)
        time = self.embed(timestep, vector, guidance)
        return self.trunk(x, time, context, context_mask, memory, context_boxes)

    def trunk(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        memory: SamplingMemory | None = None,
        context_boxes: Tensor | None = None,
    ) -> Tensor:
        """Predict from a time that is embedded already: nearly all of the work of `forward`.

        Args:
            x: As for `forward`.
            time: ``(B, time_embed_dim)``, from `embed`.
            context: As for `forward`.
            context_mask: As for `forward`.
            memory: As for `forward`.
            context_boxes: As for `forward`.

        Returns:
            ``(B, out_channels, H, W)``.
        """
        mask: Tensor | Regions | None
        mask = None if context_mask is None else context_mask[:, None, None, :]  # (B, 1, 1, M)
        if context_boxes is not None:
            mask = Regions(context_boxes, context_mask)
        told = time, context if memory is None else memory.context(context), mask
        deep = None if memory is None else memory.deep

        if channels := self.config.coordinate_channels:
            places = coordinates(x.shape[-2], x.shape[-1], channels, device=x.device)
            x = torch.cat([x, places.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1)
        skips = [self.conv_in(x)]
        if deep is None or deep.kept is None:
            self._go_down(skips, told)
            h = self._run(self.mid_block, skips[-1], *told)
        else:
            assert len(deep.kept) == len(x), "what is kept is of this batch"
            self._go_down(skips, told, deep.blocks)
            h = deep.kept
        if deep is not None:
            h = deep.kept = self._go_up(h, skips, told, left=deep.blocks + 1)
        h = self._go_up(h, skips, told)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def attentions(self, level: int) -> list[SpatialTransformer | AttentionBlock]:
        """Return the attentions of a level on both ways; 0 is the finest."""
        blocks = self.down_blocks[level], self.up_blocks[-1 - level]
        return [
            module
            for block in blocks
            for module in block.modules()
            if isinstance(module, SpatialTransformer | AttentionBlock)
        ]

    def _go_down(self, skips: list[Tensor], told: _Told, most: int | None = None) -> None:
        """Add the outputs of the way down to that of the first convolution, or as many of them."""
        for block in self.down_blocks:
            left = None if most is None else most + 1 - len(skips)
            if left == 0:
                break
            _, outputs = self._run(block, skips[-1], *told, left)
            skips += outputs

    def _go_up(self, h: Tensor, skips: list[Tensor], told: _Told, left: int = 0) -> Tensor:
        """Go up until so many outputs of the way down are left, which are taken from the list."""
        layers = self.config.layers_per_block + 1
        while len(skips) > left:
            level = (len(skips) - 1) // layers
            first = (level + 1) * layers - len(skips)  # above 0 where the block was begun before
            count = min(layers - first, len(skips) - left)
            mine, skips[-count:] = skips[-count:], []
            # a size that was odd on the way down is met again exactly on the way up
            size = skips[-1].shape[-2:] if skips else None
            h = self._run(self.up_blocks[-1 - level], h, mine, *told, size, first)
        return h

    def embed(
        self, timestep: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Embed the times and what is added to them: ``(B, time_embed_dim)``; see `forward`."""
        config, dtype = self.config, self.conv_norm_out.weight.dtype
        sinusoids = timestep_embedding(
            timestep,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        scales = None
        if guidance is not None:
            assert config.guidance_embed_dim is not None
            # Meng et al. 2023 count w from 0, and embed it like a time of 1000 w (Luo et al.
            # 2023, arXiv 2310.04378)
            scales = timestep_embedding(
                1000 * (guidance - 1),
                config.guidance_embed_dim,
                flip_sin_to_cos=False,
                freq_shift=1,
            ).to(dtype)
        time = self.time_embedding(sinusoids.to(dtype), scales)
        if self.class_embedding is not None:
            time = time + self.class_embedding(vector)
        return time

    def check_conditions(
        self, context: Tensor | None, vector: Tensor | None, guidance: Tensor | None
    ) -> None:
        """Refuse conditions that are missing, or that the model has no use for; see `forward`."""
        config = self.config
        wanted = config.num_class_embeds is not None or config.vector_dim is not None
        for name, value, expected in (
            ("context (text or other tokens)", context, config.cross_attention_dim is not None),
            ("vector (class labels or a vector)", vector, wanted),
        ):
            if (value is not None) != expected:
                raise RequestError(
                    f"the model {'needs' if expected else 'has no use for'} a {name},"
                    f" but {'none' if expected else 'one'} was given"
                )
        if guidance is not None and config.guidance_embed_dim is None:
            raise RequestError("the model has no guidance embedding: it was not distilled for one")

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        function: Callable[..., Any] = block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)
