"""The training of a small decoder as one typed value."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mezzotint.config import Config, Width
from mezzotint.models.perceptual import PerceptualConfig
from mezzotint.models.small_decoder import SmallDecoderConfig
from mezzotint.training.ema import EMAConfig
from mezzotint.training.recipe import AdversarialConfig, RecipeBase, TrainedFirstStage

__all__ = ["DecoderLossConfig", "DecoderRecipe"]


class DecoderLossConfig(Config):
    """What a small decoder's pictures are compared with, and how.

    Attributes:
        l1: Weight of the mean absolute error.
        l2: Weight of the mean squared error.
        perceptual: Weight of the perceptual distance.
        of_images: Share of the loss that compares with the images themselves; the rest compares
            with what the autoencoder's own decoder makes of the same latents.
        adversarial: A discriminator between the images and the pictures; None for none.
    """

    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    perceptual: float = Field(default=0.4, ge=0)
    of_images: float = Field(default=0.5, ge=0, le=1)
    perceptual_network: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.l1 or self.l2 or self.perceptual):
            raise ValueError("one of l1, l2 and perceptual must be above 0")
        return self


class DecoderRecipe(RecipeBase):
    """How to train a small decoder for an autoencoder that is trained.

    Attributes:
        first_stage: The autoencoder, frozen.
        width: Channels of the small decoder.
        blocks: Residual blocks of each of its levels but the finest, which has one.
        loss: What it learns from.
        patch: Train on random squares of so many pixels of each image.
    """

    kind: Literal["decoder"] = "decoder"
    first_stage: TrainedFirstStage
    width: Width = 64
    blocks: int = Field(default=3, ge=1, le=16)
    loss: DecoderLossConfig = DecoderLossConfig()
    patch: int | None = Field(default=None, ge=1)

    @property
    def average(self) -> EMAConfig | None:
        """How the weights are averaged, if they are."""
        return self._average()

    @property
    def side(self) -> int:
        """Of what is trained on, in pixels."""
        return self.patch or self.data.resolution

    def shape(self, latent_channels: int, factor: int) -> SmallDecoderConfig:
        """Return the shape of the decoder for a first stage.

        Args:
            latent_channels: Of the first stage.
            factor: Its f.
        """
        levels = factor.bit_length() - 1
        return SmallDecoderConfig(
            latent_channels=latent_channels,
            width=self.width,
            blocks=(*[self.blocks] * levels, 1),
        )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("sharding", "gradient_checkpointing"):
            if getattr(self.run, name):
                raise ValueError(f"run.{name} is for diffusion models; decoders are small")
        if self.run.evaluation is not None:
            raise ValueError(
                "run.evaluation: is not for a decoder; evaluate a model that draws with it"
            )
        if self.ema is not None and self.ema.kind == "power":
            raise ValueError("ema: power functions are not for decoders; use another kind")
        if getattr(self.data, "buckets", None) is not None:
            raise ValueError("data.buckets: a decoder is trained on squares")
        if self.side > self.data.resolution:
            raise ValueError(
                f"patch {self.patch} is larger than data.resolution {self.data.resolution}"
            )
        least = 32 if self.loss.perceptual else 1
        if self.loss.adversarial is not None:
            least = max(least, 3 * 2 ** (self.loss.adversarial.discriminator.layers - 1))
        if self.side < least:
            name = "data.resolution" if self.patch is None else "patch"
            raise ValueError(f"{name} {self.side} is too small for the loss, which needs {least}")
        return self
