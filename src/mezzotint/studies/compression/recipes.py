"""The first stages that the compression study compares, and how each of its models is trained."""

from dataclasses import dataclass
from typing import Any, Literal

from mezzotint.data.emoji import EmojiDataConfig
from mezzotint.errors import ConfigError, nearest
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe

__all__ = [
    "AUTOENCODER_BATCH",
    "DIFFUSION_BATCH",
    "PATCH",
    "RESOLUTION",
    "STAGES",
    "Stage",
    "autoencoder_recipe",
    "data_config",
    "diffusion_recipe",
    "find_stage",
]

RESOLUTION = 128
AUTOENCODER_BATCH, DIFFUSION_BATCH = 8, 16
PATCH = 64  # pixels; first stages are trained on squares of this side
_CONTEXT = 64
# Groups of 3 channels and more: a channel that is normalised alone loses its mean over the picture,
# and with it the picture's colour.
_AUTOENCODER_GROUPS = 4
_UNET_GROUPS = {1: 4, 2: 8}  # by f; 16 above
# channels by level; f = 2 ** (levels - 1)
_AUTOENCODER_WIDTHS = (16, 32, 64, 128, 128, 128)
# By f: channels by level, and which levels have attention. As in the paper's table 13 the UNet has
# the same number of parameters everywhere, here 7.9 million within 1.5 %: where latents are large
# it has more levels, and narrower ones at their full size.
_UNETS: dict[int, tuple[tuple[int, ...], tuple[bool, ...]]] = {
    1: ((16, 32, 48, 64, 112, 160), (False, False, False, False, True, True)),
    2: ((32, 48, 64, 112, 160), (False, False, False, True, True)),
    4: ((48, 64, 112, 160), (False, False, True, True)),
    8: ((64, 112, 160), (False, True, True)),
    16: ((112, 160), (True, True)),
    32: ((112, 160), (True, True)),
}


@dataclass(frozen=True)
class Stage:
    """One first stage of the study.

    Attributes:
        kind: ``identity`` is diffusion on pixels, LDM-1.
        factor: f.
        channels: Latent channels c, those of the paper's table 8.
        codes: Size of the codebook, only VQ. The paper has 8192 at f = 4 and 16384 above, for
            millions of photographs; 1,430 emoji do with fewer.
    """

    kind: Literal["identity", "kl", "vq"]
    factor: int
    channels: int
    codes: int | None = None

    @property
    def name(self) -> str:
        """What files and tables call it."""
        return "identity" if self.kind == "identity" else f"{self.kind}-f{self.factor}"


STAGES: tuple[Stage, ...] = (
    Stage("identity", 1, 3),
    Stage("kl", 2, 2),
    Stage("kl", 4, 3),
    Stage("kl", 8, 4),
    Stage("kl", 16, 16),
    Stage("kl", 32, 64),
    Stage("vq", 4, 3, codes=1024),
    Stage("vq", 8, 4, codes=1024),
    Stage("vq", 16, 8, codes=1024),
)


def find_stage(name: str) -> Stage:
    """Return a first stage of the study by its name.

    Raises:
        ConfigError: If there is none; it names the nearest.

    Example:
        >>> find_stage("kl-f8").channels
        4
    """
    stages = {stage.name: stage for stage in STAGES}
    if name not in stages:
        raise ConfigError(f"unknown first stage {name!r}; {nearest(name, stages)}")
    return stages[name]


def data_config(split: Literal["train", "validation"], resolution: int) -> EmojiDataConfig:
    """Return the emoji of the study, the class of each being its group."""
    return EmojiDataConfig(resolution=resolution, split=split, flip=True, labels="group")


def autoencoder_recipe(
    stage: Stage, *, resolution: int, minutes: float, seed: int
) -> AutoencoderRecipe:
    """Return how a first stage of the study is trained; the same for all but their shape."""
    assert stage.kind != "identity", "the identity is not trained"
    levels = stage.factor.bit_length()
    model: dict[str, Any] = {
        "kind": stage.kind,
        "latent_channels": stage.channels,
        "block_out_channels": _AUTOENCODER_WIDTHS[:levels],
        "layers_per_block": 1,
        "mid_attention": False,
        "norm_num_groups": _AUTOENCODER_GROUPS,
    }
    if stage.codes is not None:
        model["codebook_size"] = stage.codes
    return AutoencoderRecipe.from_dict(
        {
            "name": f"compression-{stage.name}",
            "seed": seed,
            "data": data_config("train", resolution).to_dict(),
            "model": model,
            # no discriminator: in so few steps it would only be in the way
            "loss": {
                "l1": 1.0,
                "l2": 4.0,
                "pooled_l1": 1.0,
                "perceptual": 0.1,
                "kl": 0.01,
                "adversarial": None,
            },
            # four times as many pictures in the same time: minutes are few, and convolutions local
            "patch": min(PATCH, resolution),
            "ema_decay": 0.995,
            "batch_size": AUTOENCODER_BATCH,
            "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100},
            "budget": {"max_minutes": minutes},
            "run": {"checkpoint_minutes": 2.0, "sample_minutes": minutes, "log_steps": 20},
        }
    )


def diffusion_recipe(
    stage: Stage, *, first_stage: str, resolution: int, minutes: float, points: int, seed: int
) -> DiffusionRecipe:
    """Return how the UNet is trained in the latent space of a first stage.

    Args:
        stage: The first stage.
        first_stage: Its folder; unused for the identity.
        resolution: Side of the pictures in pixels.
        minutes: Of training.
        points: Checkpoints that are kept, evenly spaced, the last at the end.
        seed: Of weights, noise and order.
    """
    widths, attention = _UNETS[stage.factor]
    encoder: dict[str, Any] = {"kind": "identity"}
    if stage.kind != "identity":
        encoder = {"kind": "trained", "path": first_stage}
    return DiffusionRecipe.from_dict(
        {
            "name": f"compression-{stage.name}-diffusion",
            "seed": seed,
            "data": data_config("train", resolution).to_dict(),
            "first_stage": encoder,
            "unet": {
                "in_channels": stage.channels,
                "out_channels": stage.channels,
                "block_out_channels": widths,
                "layers_per_block": 1,
                "attention_levels": attention,
                "cross_attention_dim": _CONTEXT,
                "num_attention_heads": 4,
                "norm_num_groups": _UNET_GROUPS.get(stage.factor, 16),
            },
            "conditioning": {"kind": "class", "width": _CONTEXT},
            "schedule": {
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "zero_terminal_snr": True,
            },
            "latent_variants": 2,
            "batch_size": DIFFUSION_BATCH,
            "ema_decay": 0.995,
            "guidance_scale": 1.0,
            # no decay of the learning rate: every point of the curve is a model as good as any
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 100},
            "budget": {"max_minutes": minutes},
            "run": {
                "checkpoint_minutes": minutes / points,
                "keep_checkpoints": 2 * points + 8,  # some at interruptions
                "sample_minutes": minutes,
                "log_steps": 10,
            },
        }
    )
