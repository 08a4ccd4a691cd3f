"""A distillation as one typed value: a trained model, and how a student of few steps is taught."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mezzotint.config import Width
from mezzotint.data.degradation import DegradationConfig
from mezzotint.data.masks import MaskConfig
from mezzotint.diffusion.schedule import DISTILLED_STEPS
from mezzotint.training.base_model import BaseModelConfig, base_of
from mezzotint.training.ema import EMAConfig
from mezzotint.training.recipe import RecipeBase

__all__ = ["DistillRecipe"]

_Scale = Annotated[float, Field(ge=1, le=100)]


class DistillRecipe(RecipeBase):
    """How to distil a latent consistency model from a trained diffusion model.

    The student begins as the teacher and learns to give the end of the guided teacher's path from
    any point of it, in one step (Luo et al. 2023, arXiv 2310.04378, algorithm 1). It keeps the
    teacher's autoencoder, conditioner, schedule and what it predicts.

    Attributes:
        teacher: The model; it may be told anything.
        guidance_range: Scales of the teacher's guidance, from which one is drawn for each sample
            and told to the student; 1 is none, so that these are the paper's 2 to 14, plus 1.
            A model that is told no caption, class or layout is not guided, and has no use for it.
        guidance_embed_dim: Width of the embedding of that scale.
        huber_c: c of the loss; see `mezzotint.diffusion.loss.pseudo_huber`.
        degradation: How the small pictures of super-resolution are made.
        masks: What inpainting is to draw anew.
        condition_dropout: Probability with which the condition is replaced by its null.
        spatial_dropout: The same for what a hybrid concatenates.
        latent_variants: Augmented views per image whose latents are computed once and kept; 0
            encodes every batch anew.
        latent_cache: Folder where they are kept; ``latents/`` in the run folder if left out.
        latent_precision: In which they are kept: ``float32`` or, in half the space, ``float16``.
        cached_captions: See `mezzotint.training.finetune_recipe.FinetuneRecipe`.
        ema_decay: Of the average, which is the target network, drawn from and exported.
        guidance_scale: Of the sample grids, and of the student where a request says none.
        sample_steps: Likewise.
    """

    kind: Literal["distill"] = "distill"
    teacher: BaseModelConfig
    guidance_range: tuple[_Scale, _Scale] = (3.0, 15.0)
    guidance_embed_dim: Width = 256
    huber_c: float = Field(default=0.001, gt=0)
    degradation: DegradationConfig = DegradationConfig()
    masks: MaskConfig = MaskConfig()
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    spatial_dropout: float = Field(default=0.0, ge=0, lt=1)
    latent_variants: int = Field(default=1, ge=0)
    latent_cache: str | None = None
    latent_precision: Literal["float32", "float16"] = "float32"
    cached_captions: int = Field(default=10_000, ge=0)
    ema_decay: float | None = Field(default=0.95, ge=0, lt=1)
    guidance_scale: float = Field(default=8.0, ge=1)
    sample_steps: Annotated[int, Field(ge=1, le=DISTILLED_STEPS)] = 4

    @property
    def average(self) -> EMAConfig:
        """How the weights are averaged."""
        average = self._average()
        assert average is not None
        return average

    @field_validator("teacher", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return base_of(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range: {low:g} is above {high:g}; expected low, high")
        if not low <= self.guidance_scale <= high:
            raise ValueError(
                f"guidance_scale {self.guidance_scale:g} is outside of guidance_range {low:g} to"
                f" {high:g}, in which the student learns"
            )
        if self.ema is None and self.ema_decay is None:
            raise ValueError("one of ema and ema_decay is required: it is the target network")
        if self.ema is not None and self.ema.kind == "power":
            raise ValueError("ema: power functions are not for a target network; use another kind")
        for name in ("sharding", "compile"):
            if getattr(self.run, name):
                raise ValueError(f"run.{name} is not for distillation, which runs three networks")
        return self
