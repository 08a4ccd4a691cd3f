"""A training run as one typed value: data, model, conditioning, loss, optimizer, budget."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from mezzotint.conditioning.build import (
    ConditioningConfig,
    UnconditionalConfig,
    concat_channels,
    main_config,
    spatial_config,
)
from mezzotint.conditioning.regions import RegionsConditionerConfig
from mezzotint.conditioning.spatial import InpaintingConditionerConfig, LowResConditionerConfig
from mezzotint.config import Config, Document
from mezzotint.data import DataConfig
from mezzotint.data.degradation import DegradationConfig
from mezzotint.data.masks import MaskConfig
from mezzotint.diffusion.flow import AnyScheduleConfig
from mezzotint.diffusion.loss import Deviation, Weighting
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.diffusion.times import TimesConfig, UniformTimesConfig
from mezzotint.models.autoencoder import (
    AutoencoderKLConfig,
    IdentityFirstStageConfig,
    VQModelConfig,
)
from mezzotint.models.discriminator import PatchDiscriminatorConfig
from mezzotint.models.perceptual import PerceptualConfig
from mezzotint.models.unet import UNetConfig
from mezzotint.training.ema import EMAConfig, WarmupEMAConfig
from mezzotint.training.oversight import EvaluationConfig, HealthConfig

__all__ = [
    "AdversarialConfig",
    "AutoencoderLossConfig",
    "AutoencoderRecipe",
    "BudgetConfig",
    "DiffusionRecipe",
    "EncodedFirstStage",
    "OptimizerConfig",
    "RecipeBase",
    "RunConfig",
    "TrainedFirstStage",
]


class OptimizerConfig(Config):
    """AdamW and how its learning rate moves.

    Attributes:
        learning_rate: The peak; never scaled by batch size or ranks behind your back.
        schedule: ``constant`` after warm-up, or ``cosine`` to zero over the budget.
        warmup_steps: Steps of linear rise.
        gradient_clip: Largest global gradient norm; None clips nothing.
    """

    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    gradient_clip: float | None = Field(default=1.0, gt=0)


class BudgetConfig(Config):
    """When training ends: after so many steps or so many minutes of training, whichever is first.

    A budget in minutes makes the end, and a cosine learning rate, depend on the machine's speed;
    only a budget in steps alone is exactly repeatable.
    """

    max_steps: int | None = Field(default=None, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> "BudgetConfig":
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("one of max_steps and max_minutes is required")
        return self


class RunConfig(Config):
    """What a run writes, and when; and how it is carried out, which changes no result.

    Attributes:
        checkpoint_minutes: Between checkpoints.
        keep_checkpoints: How many stay.
        sample_minutes: Between sheets of samples.
        log_steps: Between rows of the log.
        sharding: Of several processes, each keeps a share of weights, averages and the optimizer's
            state (torch's ``fully_shard``) in place of all of them; only for diffusion models.
        gradient_checkpointing: Compute the UNet's levels anew in the backward pass: less memory,
            about a third more time.
        compile: Let torch compile the network; minutes at the start for less time a step.
        health: What is done about a run that goes wrong.
        evaluation: Measure the model while it is trained, and keep the best.
        wandb: A project of Weights & Biases, if its package is installed, for the log's numbers.
    """

    checkpoint_minutes: float = Field(default=5.0, gt=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    sample_minutes: float = Field(default=5.0, gt=0)
    log_steps: int = Field(default=50, ge=1)
    sharding: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    health: HealthConfig = HealthConfig()
    evaluation: EvaluationConfig | None = None
    wandb: str | None = Field(default=None, min_length=1)


class RecipeBase(Document):
    """What recipes of every kind say.

    Attributes:
        ema: The averages of the weights; the first is drawn from and exported.
        ema_decay: Short for ``ema: {kind: warmup, decay: …}``; one of both at most.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    batch_size: int = Field(default=8, ge=1, description="of all processes together")
    accumulate: int = Field(default=1, ge=1, description="gradient accumulation: batches per step")
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    channels_last: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    budget: BudgetConfig
    run: RunConfig = RunConfig()
    ema: Annotated[EMAConfig | None, Field(discriminator="kind")] = None
    ema_decay: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _one_average(cls, data: Any) -> Any:
        if not isinstance(data, dict) or cast("dict[str, Any]", data).get("ema") is None:
            return cast(Any, data)
        given = cast("dict[str, Any]", data)
        if given.get("ema_decay") is not None:
            raise ValueError(
                "ema and ema_decay are both given, and ema_decay is short for"
                " ema: {kind: warmup, decay: …}; leave one out, or set ema_decay to null"
            )
        return {**given, "ema_decay": None}

    def _average(self) -> EMAConfig | None:
        if self.ema is not None or self.ema_decay is None:
            return self.ema
        return WarmupEMAConfig(decay=self.ema_decay)


class AdversarialConfig(Config):
    """The patch discriminator D_psi and when it takes part (paper, appendix G; VQGAN, eq. 6-7).

    Attributes:
        start_step: From this step on the autoencoder sees the adversarial loss.
        pretrain_steps: For so many steps before that the discriminator alone is trained, so that
            it is not blind when it begins to speak.
        weight: Factor on the adaptive weight.
        learning_rate: The discriminator's; the autoencoder's if left out.
    """

    start_step: int = Field(default=50_000, ge=0)
    pretrain_steps: int = Field(default=1_000, ge=0)
    weight: float = Field(default=0.5, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig()


class AutoencoderLossConfig(Config):
    """L_rec + perceptual + regulariser + adversarial (paper, eq. 25).

    Every term is a mean per pixel value, so the weights do not depend on the image size. The
    paper's KL weight of 1e-6 multiplies a sum beside a sum over pixels: that ratio is kept.

    Attributes:
        l1: Weight of the mean absolute error.
        l2: Weight of the mean squared error.
        pooled_l1: Weight of the mean absolute error of 4x4 averages, which holds colours in place.
        perceptual: Weight of the perceptual distance.
        kl: Weight of the summed KL divergence per pixel value; only KL.
        codebook: Weight of the vector quantiser's loss; only VQ.
    """

    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    pooled_l1: float = Field(default=0.0, ge=0)
    perceptual: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1e-6, ge=0)
    codebook: float = Field(default=1.0, ge=0)
    perceptual_network: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig | None = AdversarialConfig()

    @model_validator(mode="after")
    def _some_reconstruction(self) -> "AutoencoderLossConfig":
        if not (self.l1 or self.l2 or self.perceptual):
            raise ValueError("one of l1, l2 and perceptual must be above 0")
        return self


class AutoencoderRecipe(RecipeBase):
    """How to train a first stage (paper, section 3.1)."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: Annotated[AutoencoderKLConfig | VQModelConfig, Field(discriminator="kind")]
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    patch: int | None = Field(
        default=None, ge=1, description="train on random squares of so many pixels of each image"
    )
    normalization: Literal["scalar", "channel"] = Field(
        default="scalar",
        description="the paper's one scale factor, or mean and std per latent channel",
    )

    @property
    def average(self) -> EMAConfig | None:
        """How the weights are averaged, if they are."""
        return self._average()

    @model_validator(mode="after")
    def _fits(self) -> "AutoencoderRecipe":
        for name in ("sharding", "gradient_checkpointing"):
            if getattr(self.run, name):
                raise ValueError(f"run.{name} is for diffusion models; first stages are small")
        for name in ("in_channels", "out_channels"):
            if getattr(self.model, name) != 3:
                raise ValueError(f"model.{name} must be 3: the data are RGB images")
        least = {"data.resolution": 1, "loss.pooled_l1": 4 if self.loss.pooled_l1 else 1}
        if self.loss.perceptual:
            least["loss.perceptual"] = 32
        if self.loss.adversarial is not None:
            discriminator = self.loss.adversarial.discriminator
            if discriminator.in_channels != 3:
                raise ValueError("loss.adversarial.discriminator.in_channels must be 3")
            least["loss.adversarial"] = 3 * 2 ** (discriminator.layers - 1)
        if getattr(self.data, "buckets", None) is not None:
            raise ValueError(
                "data.buckets: an autoencoder is trained on squares, and encodes pictures of every"
                " shape"
            )
        key = max(least, key=lambda name: least[name])
        if self.patch is not None and self.patch > self.data.resolution:
            raise ValueError(
                f"patch {self.patch} is larger than data.resolution {self.data.resolution}"
            )
        name = "data.resolution" if self.patch is None else "patch"
        side = self.patch or self.data.resolution
        if side < least[key]:
            raise ValueError(
                f"{name} {side} is too small for {key}, which needs {least[key]} pixels"
            )
        if self.model.kind == "vq" and self.normalization == "channel":
            raise ValueError("normalization: 'channel' is for KL first stages, not for vq")
        for name, side in (("data.resolution", self.data.resolution), ("patch", self.patch)):
            if side is not None and side % self.model.factor:
                raise ValueError(
                    f"{name} {side} is not divisible by the autoencoder's f = {self.model.factor}"
                )
        return self


class TrainedFirstStage(Config):
    """A first stage that is trained: by another recipe (first, if need be), or found on disk.

    Attributes:
        recipe: Name or path of an autoencoder recipe; trained into the run folder.
        path: A run folder of an autoencoder, or a component folder.
    """

    kind: Literal["trained"] = "trained"
    recipe: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> "TrainedFirstStage":
        if (self.recipe is None) == (self.path is None):
            raise ValueError("exactly one of recipe and path is required")
        return self


EncodedFirstStage = Annotated[
    TrainedFirstStage | IdentityFirstStageConfig, Field(discriminator="kind")
]


class DiffusionRecipe(RecipeBase):
    """How to train a latent diffusion model (paper, section 3.2 and 3.3).

    Attributes:
        first_stage: E and D, frozen.
        unet: Shape of epsilon_theta.
        conditioning: Shape of tau_theta, and what it concatenates to the noisy latent: ``text``,
            ``bert``, ``class`` or ``layout``; ``semantic_map``, ``low_res`` or ``inpainting``; one
            of each as ``hybrid``; or ``none``.
        initial: A run or model whose weights it begins from; see `begin_from`.
        lora_rank: Of changes of these weights, which alone are then trained beside what is new,
            the UNet's first layer and what reads pictures that are concatenated: a model of another
            task that takes little to keep beside the one that it began from. By default all weights
            are trained.
        degradation: How the small pictures of ``low_res`` are made.
        masks: What ``inpainting`` is to draw anew.
        condition_dropout: Probability with which the condition is replaced by its null, for
            classifier-free guidance.
        spatial_dropout: The same for what a hybrid concatenates, which guidance never drops: so
            that the model can be compared with itself without it.
        schedule: Noise schedule and what the network predicts; ``kind: flow`` is a rectified flow.
        times: How often each time is trained: ``uniform`` (paper, eq. 2) or ``logit_normal``.
        weighting: ``simple`` (paper, eq. 2) or ``min_snr``.
        deviation: ``squared`` (paper, eq. 2) or ``absolute`` error of the prediction.
        latent_variants: Augmented views per image whose latents are computed once and kept; 0
            encodes every batch anew.
        latent_cache: Folder where they are kept, which runs may share; ``latents/`` in the run
            folder if left out.
        latent_precision: In which they are kept: ``float32`` or, in half the space, ``float16``.
        conditioner_learning_rate: tau_theta's; the UNet's if left out.
        guidance_scale: Of the sample grids drawn while training.
    """

    kind: Literal["diffusion"] = "diffusion"
    first_stage: EncodedFirstStage
    unet: UNetConfig
    conditioning: ConditioningConfig = UnconditionalConfig()
    initial: str | None = None
    lora_rank: int | None = Field(default=None, ge=1)
    degradation: DegradationConfig = DegradationConfig()
    masks: MaskConfig = MaskConfig()
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    spatial_dropout: float = Field(default=0.0, ge=0, lt=1)
    schedule: AnyScheduleConfig = ScheduleConfig()
    times: TimesConfig = UniformTimesConfig()
    weighting: Weighting = "simple"
    deviation: Deviation = "squared"
    latent_variants: int = Field(default=1, ge=0)
    latent_cache: str | None = None
    latent_precision: Literal["float32", "float16"] = "float32"
    ema_decay: float | None = Field(default=0.9999, ge=0, lt=1)
    conditioner_learning_rate: float | None = Field(default=None, gt=0)
    guidance_scale: float = Field(default=3.0, ge=0)
    sample_steps: int = Field(default=25, ge=1)

    @property
    def average(self) -> EMAConfig:
        """How the weights are averaged."""
        average = self._average()
        assert average is not None
        return average

    @model_validator(mode="after")
    def _fits(self) -> "DiffusionRecipe":
        if self.ema is None and self.ema_decay is None:
            raise ValueError("one of ema and ema_decay is required: averages are drawn from")
        self._check_changes()
        self._check_tokens()
        self._check_channels()
        if getattr(self.data, "stream", False) and self.latent_variants:
            raise ValueError(
                "latent_variants: a stream has no index to keep latents by; set it to 0, or"
                " data.stream to false"
            )
        spatial = spatial_config(self.conditioning)
        if getattr(self.data, "buckets", None) is not None and spatial is not None:
            raise ValueError(
                f"data.buckets: the conditioning {spatial.kind} takes squares; leave one of them"
                " out"
            )
        if self.spatial_dropout and self.conditioning.kind != "hybrid":
            raise ValueError("spatial_dropout: is for a hybrid; use condition_dropout")
        if self.sample_steps > self.schedule.num_train_timesteps:
            raise ValueError(
                f"sample_steps {self.sample_steps} is more than schedule.num_train_timesteps"
                f" {self.schedule.num_train_timesteps}"
            )
        return self

    def _check_changes(self) -> None:
        if self.lora_rank is None:
            return
        if self.initial is None:
            raise ValueError("lora_rank: is of changes of another model's weights; give initial")
        if self.conditioner_learning_rate is not None:
            raise ValueError("conditioner_learning_rate: with lora_rank the conditioner stays")
        if self.run.sharding:
            raise ValueError("run.sharding is for whole models; of lora_rank little is trained")
        if self.ema is not None and self.ema.kind == "power":
            raise ValueError(
                "ema: power functions are for whole models, not for changes of lora_rank"
            )

    def _check_tokens(self) -> None:
        main, width = main_config(self.conditioning), self.unet.cross_attention_dim
        wanted = None if main is None else main.width
        if width != wanted:
            told = "null" if width is None else width
            raise ValueError(
                f"unet.cross_attention_dim is {told}, but the conditioning"
                f" gives {'no tokens' if wanted is None else f'tokens of width {wanted}'}"
            )
        for name in ("num_class_embeds", "vector_dim", "guidance_embed_dim"):
            if getattr(self.unet, name) is not None:
                raise ValueError(f"unet.{name} must be null: no conditioning of a recipe feeds it")

    def _check_channels(self) -> None:
        spatial, latent = spatial_config(self.conditioning), self.unet.out_channels
        if isinstance(self.first_stage, IdentityFirstStageConfig):
            pixels = self.first_stage.in_channels
            if latent != pixels:
                raise ValueError(
                    f"unet.out_channels is {latent}, but an identity first stage has {pixels}"
                    " channels, those of the pixels"
                )
        hybrid = self.conditioning.kind == "hybrid"
        where = "conditioning.spatial" if hybrid else "conditioning"
        if isinstance(spatial, LowResConditionerConfig) and spatial.channels != 3:
            raise ValueError(f"{where}.channels must be 3: the data are RGB images")
        if isinstance(spatial, InpaintingConditionerConfig) and spatial.latent_channels != latent:
            raise ValueError(
                f"{where}.latent_channels is {spatial.latent_channels}, but the latents have"
                f" {latent} channels (unet.out_channels)"
            )
        if isinstance(spatial, RegionsConditionerConfig):
            main = main_config(self.conditioning)
            if main is None or main.kind not in ("text", "bert"):
                raise ValueError(
                    f"{where}: kind 'regions' needs what reads the words of boxes: use kind hybrid,"
                    " with main of kind text or bert"
                )
        extra = concat_channels(self.conditioning)
        if self.unet.in_channels != latent + extra:
            told = (
                f" and {extra} that conditioning {spatial.kind!r} concatenates" if spatial else ""
            )
            raise ValueError(
                f"unet.in_channels is {self.unet.in_channels}; expected {latent + extra}: {latent}"
                f" of the noisy latent (unet.out_channels){told}"
            )
