"""Conditions that are pictures, concatenated to the noisy latent (paper, section 4.3.2).

What is concatenated for a sample whose condition is dropped is zero all over, but for the mask of
inpainting, which is then "draw everything". Without the inputs nobody knows how large that is: so
`null` has nothing to concatenate, and the null of a batch is ``conditioner(inputs, drop)``.
Guidance does not act on these conditions: both halves of a guided batch see the same picture.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning.base import Conditioner, Conditioning, ConditionInputs
from mezzotint.conditioning.regions import RegionsConditioner
from mezzotint.config import Config, Width
from mezzotint.errors import RequestError

__all__ = [
    "HybridConditioner",
    "InpaintingConditioner",
    "InpaintingConditionerConfig",
    "LowResConditioner",
    "LowResConditionerConfig",
    "SemanticMapConditioner",
    "SemanticMapConditionerConfig",
    "main_conditioner",
    "spatial_conditioner",
]


class SemanticMapConditionerConfig(Config):
    """A learned vector per class, reduced to the latents' size.

    Attributes:
        classes: Classes that a pixel may have.
        out_channels: Channels that are concatenated.
        stages: How many times height and width are halved.
    """

    kind: Literal["semantic_map"] = "semantic_map"
    classes: Width = 182
    out_channels: Width = 3
    stages: int = Field(default=2, ge=0, le=16)


class SemanticMapConditioner(Conditioner):
    """Semantic maps ``(B, H, W)`` to ``(B, out_channels, H / 2^stages, W / 2^stages)``.

    Args:
        config: Classes and sizes.
    """

    wants_concat = "map"
    description = "a semantic map (--map, a picture whose grey values are the classes)"

    def __init__(self, config: SemanticMapConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.concat_channels = config.out_channels
        self.channel_mapper = nn.Conv2d(config.classes, config.out_channels, 1, bias=False)

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.maps``; see `Conditioner.forward`."""
        self.require(inputs.maps, inputs)
        assert inputs.maps is not None
        maps = inputs.maps.long()
        least, most = (int(value) for value in maps.aminmax())
        if least < 0 or most >= self.config.classes:
            raise RequestError(
                f"semantic_map: expected classes from 0 to {self.config.classes - 1},"
                f" got {least if least < 0 else most}"
            )
        # The convolution of a one-hot picture is a look-up, and as it mixes no pixels it may come
        # before they are averaged: the same sum with out_channels to average and not all classes.
        vectors = self.channel_mapper.weight.flatten(1).T  # (classes, out_channels)
        x = F.embedding(maps, vectors).movedim(-1, 1)
        for _ in range(self.config.stages):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
        return Conditioning(concat=_without(x, drop))

    def null(self, count: int) -> Conditioning:
        """Return the empty condition."""
        return Conditioning()


class LowResConditionerConfig(Config):
    """Small pictures, pixel by pixel.

    Attributes:
        channels: Of the pictures.
        fold: How many times as wide and as high as the latents the pictures are. The fold x fold
            pixels that fall on a latent become channels of it, so that none of them is lost.
    """

    kind: Literal["low_res"] = "low_res"
    channels: Width = 3
    fold: int = Field(default=1, ge=1, le=16)


class LowResConditioner(Conditioner):
    """Small pictures ``(B, channels, fold h, fold w)``, for super-resolution.

    With f of the first stage, pictures become f / fold times as large.

    Args:
        config: Their channels and size.
    """

    wants_concat = "low_res"
    description = "a small picture (--low-res)"

    def __init__(self, config: LowResConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.concat_channels = config.channels * config.fold**2

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.low_res``; see `Conditioner.forward`."""
        self.require(inputs.low_res, inputs)
        assert inputs.low_res is not None
        _expect_channels("low_res", inputs.low_res, self.config.channels)
        folded = F.pixel_unshuffle(inputs.low_res, self.config.fold)
        return Conditioning(concat=_without(folded, drop))

    def null(self, count: int) -> Conditioning:
        """Return the empty condition."""
        return Conditioning()


class InpaintingConditionerConfig(Config):
    """A mask and the latents of the image without what it covers.

    The defaults are those of Stable Diffusion's inpainting models. The paper's has 3 latent
    channels, ``mask_last``, a signed mask and masked pixels of -1.

    Attributes:
        latent_channels: Channels of the latents.
        order: Where the mask's channel stands.
        signed_mask: Whether the mask's values are -1 and 1 rather than 0 and 1.
        masked_value: What the image holds where it is masked before it is encoded, in -1..1.
    """

    kind: Literal["inpainting"] = "inpainting"
    latent_channels: Width = 4
    order: Literal["mask_first", "mask_last"] = "mask_first"
    signed_mask: bool = False
    masked_value: float = Field(default=0.0, ge=-1.0, le=1.0)


class InpaintingConditioner(Conditioner):
    """Mask and masked latents as ``(B, latent_channels + 1, h, w)``.

    Args:
        config: How they are put together.
    """

    wants_concat = "inpainting"
    description = "a picture and a mask (--image and --mask)"

    def __init__(self, config: InpaintingConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.concat_channels = config.latent_channels + 1

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.mask`` and ``.masked_latents``; see `Conditioner.forward`."""
        self.require(inputs.mask, inputs)
        self.require(inputs.masked_latents, inputs)
        assert inputs.mask is not None and inputs.masked_latents is not None
        latents, mask = inputs.masked_latents, inputs.mask.to(inputs.masked_latents.dtype)
        _expect_channels("masked_latents", latents, self.config.latent_channels)
        _expect_channels("mask", mask, 1)
        if mask.shape[2:] != latents.shape[2:]:
            raise RequestError(
                f"mask: is {mask.shape[3]}x{mask.shape[2]}, but the latents are"
                f" {latents.shape[3]}x{latents.shape[2]}; they must be of one size"
            )
        if drop is not None:
            mask = mask.where(~_rows(drop, mask), 1.0)
            latents = _without(latents, drop)
        if self.config.signed_mask:
            mask = 2.0 * mask - 1.0
        parts = [mask, latents] if self.config.order == "mask_first" else [latents, mask]
        return Conditioning(concat=torch.cat(parts, dim=1))

    def null(self, count: int) -> Conditioning:
        """Return the empty condition."""
        return Conditioning()


class HybridConditioner(Conditioner):
    """A condition for cross-attention and one to concatenate, as in Stable Diffusion's inpainting.

    Args:
        main: Conditions by cross-attention; it alone can be dropped.
        spatial: Conditions by concatenation.
    """

    def __init__(self, main: Conditioner, spatial: Conditioner) -> None:
        super().__init__()
        assert main.wants_concat is None and spatial.wants is None, "each has its own way in"
        self.main = main
        self.spatial = spatial
        self.wants = main.wants
        self.wants_concat = spatial.wants_concat
        self.concat_channels = spatial.concat_channels
        self.description = f"{main.description}, and {spatial.description}"

    def settings(self) -> dict[str, Any]:
        """Return the settings of both."""
        return {
            "kind": "hybrid",
            "main": self.main.settings(),
            "spatial": self.spatial.settings(),
        }

    def forward(
        self,
        inputs: ConditionInputs,
        drop: Tensor | None = None,
        drop_spatial: Tensor | None = None,
    ) -> Conditioning:
        """Condition on what both parts want; see `Conditioner.forward`.

        Args:
            inputs: What the samples are to be.
            drop: ``(B,)`` bool, true where the main part is replaced by its null.
            drop_spatial: The same of the spatial part, which guidance never drops; words of its
                boxes are left out where either is.
        """
        spatial, told = self.spatial(inputs, drop_spatial), self.main(inputs, drop)
        if isinstance(self.spatial, RegionsConditioner):
            left_out = [mask for mask in (drop, drop_spatial) if mask is not None]
            either = torch.stack(left_out).any(0) if left_out else None
            told = self.spatial.with_phrases(self.main, told, inputs, either)
            assert spatial.concat is not None and told.crossattn is not None
            spatial = replace(spatial, concat=spatial.concat.to(told.crossattn.device))
        return replace(told, concat=spatial.concat)

    def null(self, count: int) -> Conditioning:
        """Return the main part's null, without anything to concatenate.

        The null half of a guided batch shows the same picture as the other half; it is
        ``conditioner(inputs, drop)`` with everything dropped, or with other captions.
        """
        return self.main.null(count)


def main_conditioner(conditioner: Conditioner) -> Conditioner:
    """Return what conditions by cross-attention, without a companion that concatenates."""
    return conditioner.main if isinstance(conditioner, HybridConditioner) else conditioner


def spatial_conditioner(conditioner: Conditioner) -> Conditioner:
    """Return what conditions by concatenation, without a companion for cross-attention."""
    return conditioner.spatial if isinstance(conditioner, HybridConditioner) else conditioner


def _rows(drop: Tensor, like: Tensor) -> Tensor:
    return drop.to(like.device).view(-1, 1, 1, 1)


def _without(concat: Tensor, drop: Tensor | None) -> Tensor:
    """Zeros in place of what is dropped."""
    return concat if drop is None else concat.masked_fill(_rows(drop, concat), 0.0)


def _expect_channels(name: str, value: Tensor, channels: int) -> None:
    if value.ndim != 4 or value.shape[1] != channels:
        raise RequestError(f"{name}: expected (B, {channels}, h, w), got {tuple(value.shape)}")
