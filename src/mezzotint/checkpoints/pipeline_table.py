"""The pipelines of diffusers that are known: what components each has, and what conditions it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.text_encoders import BERT_CLASSES, CLIP_CLASSES
from mezzotint.errors import CheckpointError, nearest

__all__ = [
    "PIPELINES",
    "SAMPLING",
    "PipelineLayout",
    "class_of",
    "find_pipeline",
    "require_folder",
    "unused_components",
]

SAMPLING = "_sampling"  # a key of the index: diffusers passes over those that begin so


@dataclass(frozen=True, kw_only=True)
class PipelineLayout:
    """One class that a ``model_index.json`` may name.

    Attributes:
        first_stage: The component that holds it.
        condition: What the network is told.
        encoder: The component that holds the text encoder.
        encoder_library: Whose class it is.
        encoder_classes: What it may be.
        standard: Whether its software repairs the scheduler's configuration; see `read_scheduler`.
        scaled: Whether it scales the network's input; see `write_scheduler`.
        sampler: What draws for it if its scheduler does not say.
        guidance_scale: What its software takes where nothing is said.
        steps: The same of the number of steps, where it is far from the program's own.
    """

    first_stage: Literal["vae", "vqvae"]
    condition: Literal["clip", "bert", "low_res"] | None
    encoder: str | None = None
    encoder_library: str | None = None
    encoder_classes: tuple[str, ...] = ()
    standard: bool = False
    scaled: bool = True
    sampler: str | None = None
    guidance_scale: float | None = None
    steps: int | None = None

    def unlike(self, defaults: SamplingDefaults) -> dict[str, float]:
        """Return what no scheduler says of the sampling, where it is not the software's."""
        told = {"guidance_scale": defaults.guidance_scale, "steps": defaults.steps}
        return {k: v for k, v in told.items() if v not in (None, getattr(self, k))}


_STABLE = PipelineLayout(
    first_stage="vae",
    condition="clip",
    encoder="text_encoder",
    encoder_library="transformers",
    encoder_classes=CLIP_CLASSES,
    standard=True,
    guidance_scale=7.5,
)
_CONSISTENCY = replace(_STABLE, standard=False, sampler="lcm", guidance_scale=8.5, steps=4)
PIPELINES: Mapping[str, PipelineLayout] = {
    "StableDiffusionPipeline": _STABLE,
    "StableDiffusionImg2ImgPipeline": _STABLE,
    "StableDiffusionInpaintPipeline": _STABLE,
    "StableDiffusionInpaintPipelineLegacy": _STABLE,
    "LatentConsistencyModelPipeline": _CONSISTENCY,
    "LatentConsistencyModelImg2ImgPipeline": _CONSISTENCY,
    "LDMTextToImagePipeline": PipelineLayout(
        first_stage="vqvae",
        condition="bert",
        encoder="bert",
        encoder_library="latent_diffusion",
        encoder_classes=BERT_CLASSES,
        scaled=False,
        guidance_scale=5.0,
    ),
    "LDMPipeline": PipelineLayout(first_stage="vqvae", condition=None),
    "LDMSuperResolutionPipeline": PipelineLayout(first_stage="vqvae", condition="low_res"),
}


def find_pipeline(index: Mapping[str, Any], folder: Path) -> PipelineLayout:
    """Return the pipeline that an index names.

    Raises:
        CheckpointError: If it is unknown; it names the nearest.
    """
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        near = nearest(name, PIPELINES)
        raise CheckpointError(f"{folder / INDEX}: unknown pipeline {name!r}; {near}")
    return PIPELINES[name]


def class_of(index: Mapping[str, Any], name: str, folder: Path, known: Sequence[str] = ()) -> str:
    """Return the class of a component that there must be.

    Args:
        index: The content of ``model_index.json``.
        name: Of the component.
        folder: Of the pipeline.
        known: What it may be; anything if not given.

    Raises:
        CheckpointError: If the index does not name it or says something else, or its folder is
            not there.
    """
    match index.get(name):
        case [_, str(kind)]:
            pass
        case other:
            raise CheckpointError(
                f"{folder / INDEX}: {name} is {other!r}; expected [library, class]"
            )
    if known and kind not in known:
        raise CheckpointError(
            f"{folder / INDEX}: {name} is {kind!r}; expected {' or '.join(known)}"
        )
    require_folder(folder / name)
    return kind


def require_folder(folder: Path) -> None:
    """Raise a CheckpointError if the folder of a component is not there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, though {INDEX} names it")


def unused_components(index: Mapping[str, Any], layout: PipelineLayout) -> list[str]:
    """Return the components that an index names, and that nothing here has a use for."""
    used = {layout.first_stage, "unet", "scheduler", "tokenizer", layout.encoder}
    return [
        name
        for name, value in index.items()
        if name not in used and isinstance(value, list) and value and value[0] is not None
    ]
