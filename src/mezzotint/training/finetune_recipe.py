"""A fine-tuning run as one typed value: a trained model, and how much of it is trained on."""

import re
import string
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from mezzotint.config import Config
from mezzotint.data.degradation import DegradationConfig
from mezzotint.data.masks import MaskConfig
from mezzotint.diffusion.loss import Deviation, Weighting
from mezzotint.diffusion.times import TimesConfig, UniformTimesConfig
from mezzotint.training.base_model import BaseModelConfig, base_of
from mezzotint.training.ema import EMAConfig
from mezzotint.training.recipe import RecipeBase

__all__ = [
    "FinetuneRecipe",
    "LoraSettings",
    "PriorConfig",
    "TokenConfig",
]

_FIRST_STAGES = ("first_stage", "autoencoder", "vae")
_FIELDS = {"caption", "token"}
_WORD = re.compile(r"[^\s()\[\]{}:\\]+")


class LoraSettings(Config):
    """W + (alpha / r) B A in place of W, of which A and B are trained (arXiv 2106.09685).

    Attributes:
        rank: r, the rows of A and the columns of B.
        alpha: The strength; the rank if left out, and then the factor is 1.
        dropout: Probability with which an input of A is left out.
        target_modules: The UNet's layers by the ends of their names; by default the projections of
            every attention.
        conditioner_target_modules: The same of the conditioner, if it is among ``components``.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1
    )
    conditioner_target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class TokenConfig(Config):
    """A new word, whose vectors alone are trained (Gal et al. 2022, arXiv 2208.01618).

    Attributes:
        word: As it will stand in prompts, such as ``<my-cat>``.
        initial: Words whose vectors it begins with.
        vectors: How many it stands for; by default as many as ``initial`` has tokens. More repeat
            them, fewer are the first of them.
    """

    word: str
    initial: str = Field(min_length=1)
    vectors: int | None = Field(default=None, ge=1, le=64)

    @field_validator("word")
    @classmethod
    def _one_word(cls, word: str) -> str:
        if not _WORD.fullmatch(word):
            raise ValueError(
                f"word {word!r}: expected one word without blanks, brackets, colons or \\"
            )
        return word


class PriorConfig(Config):
    """Prior preservation (Ruiz et al. 2022, arXiv 2208.12242, equation 2), as in DreamBooth.

    Beside every picture of the data the model sees one that it drew itself before training, so
    that it forgets nothing of the class for the sake of the subject.

    Attributes:
        prompt: Of the pictures that the base model draws, into the run folder's ``prior/``.
        count: How many.
        weight: lambda, the weight of their loss beside that of the data.
        steps: Noise levels that drawing visits.
        guidance_scale: Of drawing.
    """

    prompt: str = Field(min_length=1)
    count: int = Field(default=100, ge=1)
    weight: float = Field(default=1.0, gt=0)
    steps: int = Field(default=25, ge=1)
    guidance_scale: float = Field(default=3.0, ge=0)


class FinetuneRecipe(RecipeBase):
    """How to train a trained latent diffusion model further; its autoencoder stays as it is.

    Attributes:
        base: The model; its schedule, what it predicts and what it is told stay too.
        method: ``full``: all weights of the components; ``lora``: low-rank changes of them, written
            as an adapter; ``textual_inversion``: the vectors of a new word, written as an
            embedding.
        components: What is trained: ``unet``, ``conditioner`` (text encoder, class embedding, …) or
            both; not for textual inversion.
        lora: Of the method of this name.
        token: Of textual inversion.
        caption_templates: What is said of the pictures, one of them chosen by chance each time;
            ``{caption}`` is the data's own caption and ``{token}`` the new word. By default the
            caption, and for textual inversion ``a photo of {token}``.
        prior: Prior preservation; only for models that want a prompt.
        degradation: How the small pictures of super-resolution are made.
        masks: What inpainting is to draw anew.
        condition_dropout: Probability with which the condition is replaced by its null.
        spatial_dropout: The same for what a hybrid concatenates.
        times: How often each time is trained: ``uniform`` or ``logit_normal``.
        weighting: ``simple`` or ``min_snr``; see `mezzotint.diffusion.loss.loss_weight`.
        deviation: ``squared`` or ``absolute`` error of the prediction.
        latent_variants: Augmented views per image whose latents are computed once and kept; 0
            encodes every batch anew.
        latent_cache: Folder where they are kept; ``latents/`` in the run folder if left out.
        latent_precision: In which they are kept: ``float32`` or, in half the space, ``float16``.
        cached_captions: Most captions that a CLIP or BERT text encoder is asked for once, if it is
            not trained; what it gives is kept beside the latents, likewise. 0, and data that can
            say more, ask it anew in every batch.
        conditioner_learning_rate: The conditioner's; the UNet's if left out.
        guidance_scale: Of the sample grids drawn while training.
        sample_steps: Noise levels that they visit.
    """

    kind: Literal["finetune"] = "finetune"
    base: BaseModelConfig
    method: Literal["full", "lora", "textual_inversion"] = "lora"
    components: tuple[Literal["unet", "conditioner"], ...] = Field(
        default=("unet",), min_length=1, max_length=2
    )
    lora: LoraSettings | None = None
    token: TokenConfig | None = None
    caption_templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    prior: PriorConfig | None = None
    degradation: DegradationConfig = DegradationConfig()
    masks: MaskConfig = MaskConfig()
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    spatial_dropout: float = Field(default=0.0, ge=0, lt=1)
    times: TimesConfig = UniformTimesConfig()
    weighting: Weighting = "simple"
    deviation: Deviation = "squared"
    latent_variants: int = Field(default=1, ge=0)
    latent_cache: str | None = None
    latent_precision: Literal["float32", "float16"] = "float32"
    cached_captions: int = Field(default=10_000, ge=0)
    conditioner_learning_rate: float | None = Field(default=None, gt=0)
    guidance_scale: float = Field(default=3.0, ge=0)
    sample_steps: Annotated[int, Field(ge=1)] = 25

    @property
    def average(self) -> EMAConfig | None:
        """How the weights are averaged, if they are."""
        return self._average()

    @property
    def templates(self) -> tuple[str, ...]:
        """The captions' templates."""
        told = "a photo of {token}" if self.method == "textual_inversion" else "{caption}"
        return self.caption_templates or (told,)

    @field_validator("base", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return base_of(value)

    @field_validator("components", mode="before")
    @classmethod
    def _never_the_first_stage(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            listed = cast("list[Any]", value)
            if wrong := [name for name in listed if name in _FIRST_STAGES]:
                raise ValueError(
                    f"{wrong[0]!r} cannot be fine-tuned with the rest: the UNet's latents would"
                    " move while it learns them; train it alone by a recipe of kind 'autoencoder'"
                )
            if len(set(listed)) < len(listed):
                raise ValueError("the same component stands there twice")
        return value

    @field_validator("caption_templates")
    @classmethod
    def _known_fields(cls, templates: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for template in templates or ():
            try:
                fields = {name for _, name, _, _ in string.Formatter().parse(template)} - {None}
            except ValueError as error:
                raise ValueError(f"template {template!r}: {error}") from None
            if not fields <= _FIELDS:
                raise ValueError(
                    f"template {template!r}: expected no fields but {{caption}} and {{token}}"
                )
        return templates

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneRecipe":
        inversion = self.method == "textual_inversion"
        if inversion != (self.token is not None):
            raise ValueError(
                "token: is required by method 'textual_inversion'"
                if inversion
                else f"token: is for method 'textual_inversion', not {self.method!r}"
            )
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"lora: is for method 'lora', not {self.method!r}")
        if inversion and self.components != ("unet",):
            raise ValueError("components: textual inversion trains nothing but the token")
        if self.run.sharding and self.method != "full":
            raise ValueError(f"run.sharding is for method 'full'; {self.method!r} trains little")
        if self.method != "full" and self.ema is not None and self.ema.kind == "power":
            raise ValueError(
                f"ema: power functions are for method 'full'; of what {self.method!r} trains no"
                " average is made afterwards"
            )
        if inversion and self.run.evaluation is not None:
            raise ValueError(
                "run.evaluation: draws from the captions of real pictures, which do not say the new"
                " word; leave it out"
            )
        if self.prior is not None and getattr(self.data, "buckets", None) is not None:
            raise ValueError(
                "data.buckets: the pictures of a prior are squares; leave one of them out"
            )
        with_token = [t for t in self.templates if "{token}" in t]
        if inversion and len(with_token) < len(self.templates):
            raise ValueError("caption_templates: each needs {token}, which is what is trained")
        if with_token and not inversion:
            raise ValueError("caption_templates: {token} is for method 'textual_inversion'")
        return self
