"""The published families of single files, and what their files do not say of themselves.

Heads leave no trace in the shapes of tensors, and neither do the noise schedule, the size of the
images or what is predicted. Where no YAML file says them, they are those of the published models:
CompVis/latent-diffusion, CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mezzotint.checkpoints.compvis_text import ConditionerKind
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.diffusion.schedule import PredictionType
from mezzotint.errors import CheckpointError, nearest

__all__ = ["FAMILIES", "Family", "Published", "family_of_parts", "find_family"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published model is known to have.

    Attributes:
        beta_start: Of its schedule, which is linear in the square root of beta, 1000 times.
        beta_end: Of its schedule.
        scale_factor: Of its latents.
        image_size: Height and width in pixels.
        heads: How many every attention of the UNet has.
        head_dim: How wide each is, instead.
    """

    beta_start: float = 0.0015
    beta_end: float
    scale_factor: float = 1.0
    image_size: int = 256
    heads: int | None = None
    head_dim: int | None = None

    def head_fields(self) -> dict[str, Any]:
        """Return the fields of a `UNetConfig` that say the heads."""
        return {"num_attention_heads": self.heads, "attention_head_dim": self.head_dim}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of single file.

    Attributes:
        name: What ``--family`` calls it.
        description: What it is, in words.
        published: By the kind of the first stage and its f, ``"kl-f8"``, or the kind alone; the
            first is also for those that are not listed.
        main: What is attended to.
        spatial: What is concatenated.
        prediction: Of its networks.
        defaults: What a request takes where it says nothing.
    """

    name: str
    description: str
    published: Mapping[str, Published]
    main: ConditionerKind | None = None
    spatial: ConditionerKind | None = None
    prediction: PredictionType = "epsilon"
    defaults: SamplingDefaults = SamplingDefaults(sampler="ddim", spacing="leading")

    def settings(self, first_stage: Mapping[str, Any]) -> Published:
        """Return what is known of the model with such a first stage.

        Args:
            first_stage: Fields of its configuration.
        """
        kind, levels = first_stage.get("kind"), first_stage.get("block_out_channels", ())
        for key in (f"{kind}-f{2 ** max(len(levels) - 1, 0)}", str(kind)):
            if key in self.published:
                return self.published[key]
        return next(iter(self.published.values()))

    def spatial_fields(self) -> dict[str, Any]:
        """Return the fields of the concatenated condition that its tensors do not tell.

        The mask of the paper's inpainting stands last, is -1 or 1, and what it covers is black;
        Stable Diffusion's stands first, is 0 or 1, and what it covers is grey.
        """
        if self.spatial != "inpainting" or self.main is not None:
            return {}
        return {"order": "mask_last", "signed_mask": True, "masked_value": -1.0}


def _guided(scale: float) -> SamplingDefaults:
    return SamplingDefaults(sampler="ddim", spacing="leading", guidance_scale=scale)


_TEXT = Published(beta_start=0.00085, beta_end=0.012, scale_factor=0.18215, heads=8)
_SD1 = {"kl": replace(_TEXT, image_size=512)}
_SD2 = {"kl": replace(_TEXT, image_size=512, heads=None, head_dim=64)}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd1",
            description="Stable Diffusion 1: text-to-image, CLIP ViT-L/14",
            published=_SD1,
            main="clip",
            defaults=_guided(7.5),
        ),
        Family(
            name="sd1-inpainting",
            description="Stable Diffusion 1 for inpainting: 9 input channels",
            published=_SD1,
            main="clip",
            spatial="inpainting",
            defaults=_guided(7.5),
        ),
        Family(
            name="sd2",
            description="Stable Diffusion 2: text-to-image, OpenCLIP ViT-H/14",
            published=_SD2,
            main="open_clip",
            prediction="v_prediction",
            defaults=_guided(7.5),
        ),
        Family(
            name="sd2-inpainting",
            description="Stable Diffusion 2 for inpainting: 9 input channels",
            published=_SD2,
            main="open_clip",
            spatial="inpainting",
            defaults=_guided(7.5),
        ),
        Family(
            name="ldm-unconditional",
            description="unconditional latent diffusion: faces, bedrooms, churches",
            published={
                "vq": Published(beta_end=0.0195, head_dim=32),
                "kl": Published(beta_end=0.0155, heads=8),
            },
        ),
        Family(
            name="ldm-class",
            description="class-conditional latent diffusion: ImageNet",
            published={
                "vq-f4": Published(beta_end=0.0195, heads=1),
                "vq-f8": Published(beta_end=0.0195, head_dim=32),
            },
            main="class",
            defaults=_guided(3.0),
        ),
        Family(
            name="ldm-text",
            description="text-to-image latent diffusion with a transformer on BERT's tokens",
            published={
                "kl": _TEXT,
                "vq": Published(beta_end=0.0195, head_dim=32),
            },
            main="bert",
            defaults=_guided(5.0),
        ),
        Family(
            name="ldm-layout",
            description="layout-to-image latent diffusion: boxes with labels",
            published={"vq": Published(beta_end=0.0205, head_dim=32)},
            main="layout",
            defaults=_guided(1.0),
        ),
        Family(
            name="ldm-super-resolution",
            description="super-resolution latent diffusion: four times larger",
            published={"vq": Published(beta_end=0.0155, head_dim=32)},
            spatial="low_res",
        ),
        Family(
            name="ldm-inpainting",
            description="inpainting latent diffusion: 7 input channels",
            published={"vq": Published(beta_end=0.0205, heads=8)},
            spatial="inpainting",
        ),
        Family(
            name="ldm-semantic",
            description="latent diffusion on semantic maps: landscapes",
            published={"vq": Published(beta_end=0.0205, heads=8)},
            spatial="semantic_map",
        ),
    )
}


def find_family(name: str) -> Family:
    """Return a family by its name.

    Raises:
        CheckpointError: If there is none; it names the nearest.
    """
    if name not in FAMILIES:
        raise CheckpointError(f"--family: no family {name!r}; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def family_of_parts(main: ConditionerKind | None, spatial: ConditionerKind | None) -> Family | None:
    """Return the family whose models are told exactly this, if there is one."""
    fitting = (f for f in FAMILIES.values() if (f.main, f.spatial) == (main, spatial))
    return next(fitting, None)
