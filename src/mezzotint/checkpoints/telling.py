"""Which family a single file is of, and what its UNet predicts; with the reasons, in words."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from mezzotint.checkpoints.compvis_config import CompvisConfig
from mezzotint.checkpoints.compvis_shapes import guess_first_stage, guess_unet
from mezzotint.checkpoints.compvis_text import ConditionerKind, kind_of_tensors
from mezzotint.checkpoints.families import FAMILIES, Family, family_of_parts, find_family
from mezzotint.checkpoints.sketch import Parts
from mezzotint.diffusion.schedule import PredictionType
from mezzotint.errors import CheckpointError, nearest
from mezzotint.storage.tensors import Tensors

__all__ = ["refuse_adapters", "tell_disagreement", "tell_family", "tell_prediction", "tell_size"]

_WORDS: Mapping[ConditionerKind, str] = {
    "clip": "CLIP's text encoder",
    "open_clip": "OpenCLIP's text encoder",
    "bert": "a transformer on BERT's tokens",
    "layout": "a transformer on fewer tokens than BERT's",
    "class": "an embedding of classes",
    "semantic_map": "a mapper of semantic maps",
}
# by the width of the tokens, of files that lack what makes them
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 1280: "ldm-text"}
# the last training step of the models of Stable Diffusion 2 that predict the noise
_NOISE_STEPS = (875_000, 220_000)
_METADATA_PREDICTION = "modelspec.prediction_type"
_METADATA_SIZE = "modelspec.resolution"
_PREDICTIONS: Mapping[str, PredictionType] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
# what files hold that are no model of these families, by the beginning of a name
_OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL, which Mezzotint does not run",
    "double_blocks.": "a transformer for flow matching, which Mezzotint does not run",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, which Mezzotint does not run",
    "model.diffusion_model.double_blocks.": "a FLUX model, which Mezzotint does not run",
    "control_model.": "a ControlNet, which Mezzotint does not run",
    "first_stage_model.": "a first stage without a UNet",
    "encoder.": "a first stage alone",
    "down_blocks.": "a component of a diffusers folder; give the folder",
    "text_model.": "a text encoder alone",
}
# of a layer that an adapter changes; every form of LoRA has one of these in its names
_OF_ADAPTERS = re.compile(
    r"\.lora_[AB]\.|\.lora_(down|up)\.|_lora\.(down|up)\.|\.lora\.(down|up)\.|\.lora_linear_layer\."
    r"|\.(hada|lokr)_|\.dora_scale|^lora_(unet|te\d?)_"
)


def refuse_adapters(path: Path, names: Iterable[str]) -> None:
    """Raise a CheckpointError if a file is an adapter, and no model.

    Args:
        path: The file, for messages.
        names: Of its tensors.
    """
    if any(_OF_ADAPTERS.search(name) for name in names):
        raise CheckpointError(f"{path}: is a LoRA file; give it with --adapter beside a model")


def tell_family(
    path: Path, tensors: Tensors, parts: Parts, config: CompvisConfig | None, family: str | None
) -> tuple[Family, str]:
    """Return the family of a file and what that rests on.

    Args:
        path: The file, for messages.
        tensors: All of it.
        parts: The same, from `mezzotint.checkpoints.sketch.split`.
        config: Its YAML.
        family: What the user says.

    Raises:
        CheckpointError: If it is of no known family, or ``family`` is none.
    """
    refuse_adapters(path, tensors)
    for start, what in _OTHERS.items():
        alone = not start.startswith(("first_stage", "encoder")) or not parts["unet"]
        if alone and any(name.startswith(start) for name in tensors):
            raise CheckpointError(f"{path}: is {what}")
    if not parts["unet"]:
        raise CheckpointError(
            f"{path}: is no model of a known family: it has no tensor model.diffusion_model.…;"
            f" the first of its {len(tensors)} is {next(iter(tensors))[:80]!r}"
        )
    if family is not None:
        return find_family(family), "as it was asked for"
    if config is not None:
        found = family_of_parts(config.main, config.spatial)
        if found is None:
            raise CheckpointError(
                f"{config.path}: no published model takes {config.main} and {config.spatial}"
                f" together; the known families are {', '.join(FAMILIES)}"
            )
        return found, f"its YAML, {config.path.name}, says so"
    try:
        main, spatial, reason = _conditions(parts)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    found = family_of_parts(main, spatial)
    if found is None:
        raise CheckpointError(f"{path}: {reason}, which no known family has; say --family")
    return found, reason


def tell_prediction(
    tensors: Tensors, family: Family, config: CompvisConfig | None, prediction: str | None
) -> tuple[PredictionType, str]:
    """Return what a file's UNet predicts and what that rests on.

    Args:
        tensors: Of the file.
        family: What it is.
        config: Its YAML.
        prediction: What the user says.

    Raises:
        CheckpointError: If ``prediction`` is none.
    """
    if prediction is not None:
        choices = get_args(PredictionType)
        if prediction not in choices:
            near = nearest(prediction, choices)
            raise CheckpointError(f"--prediction: no prediction {prediction!r}; {near}")
        return _PREDICTIONS[prediction], "as it was asked for"
    for told, reason in _told(tensors, config):
        return told, reason
    step = tensors.beside.get("global_step")
    if family.name == "sd2" and step in _NOISE_STEPS:
        return "epsilon", f"its global_step, {step:,}, is that of a published base model"
    if family.prediction == "v_prediction":
        return "v_prediction", (
            f"a guess: most {family.name} models do, and shapes do not tell; if what it draws is"
            " noise, say --prediction epsilon"
        )
    return family.prediction, f"models of the family {family.name} do"


def tell_disagreement(tensors: Tensors, config: CompvisConfig | None) -> str | None:
    """Return a sentence on what a file says of its prediction in two ways, if it does.

    Args:
        tensors: Of the file.
        config: Its YAML.
    """
    (followed, reason), *others = [*_told(tensors, config), (None, "")]
    if config is not None and not config.tells_prediction:
        others = others[:-2]  # what is said by saying nothing contradicts nothing
    against = [f"{why}, which means {told}" for told, why in others if told not in (None, followed)]
    if not against:
        return None
    return (
        f"{followed} is followed, as {reason}, though {' and '.join(against)}: a YAML comes before"
        " markers, and these before metadata; --prediction says otherwise"
    )


def _told(tensors: Tensors, config: CompvisConfig | None) -> Iterator[tuple[PredictionType, str]]:
    """What a file's prediction is said to be, and by what; what is followed comes first."""
    if config is not None and config.tells_prediction:
        yield config.schedule["prediction_type"], f"its YAML, {config.path.name}, says so"
    for marker in ("v_pred", "ztsnr"):
        if marker in tensors:
            yield "v_prediction", f"it has the marker {marker}"
    told = tensors.metadata.get(_METADATA_PREDICTION, "")
    if told in _PREDICTIONS:
        yield _PREDICTIONS[told], f"its metadata say {_METADATA_PREDICTION}: {told}"
    if config is not None and not config.tells_prediction:
        reason = f"its YAML, {config.path.name}, names no parameterization"
        yield config.schedule["prediction_type"], reason


def tell_size(tensors: Tensors, family: Family, prediction: PredictionType) -> list[int] | None:
    """Return height and width in pixels if a file without YAML tells, or None."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", tensors.metadata.get(_METADATA_SIZE, ""))
    if match:
        return [int(match[2]), int(match[1])]
    if family.name == "sd2" and prediction == "v_prediction":
        return [768, 768]
    return None


def _conditions(parts: Parts) -> tuple[ConditionerKind | None, ConditionerKind | None, str]:
    """What is attended to, what is concatenated, and what tells so."""
    unet = guess_unet(parts["unet"])
    latents = unet["out_channels"]
    if parts["first_stage"]:
        stage = guess_first_stage(parts["first_stage"])
        latents = stage.get("embedding_dim") or stage["latent_channels"]
    taken = unet["in_channels"]
    told = f"its UNet takes {taken} channels for latents of {latents}"
    kind = kind_of_tensors(parts["conditioner"])
    width = unet["cross_attention_dim"]
    if kind is None and width is not None:
        family = FAMILIES.get(_FAMILY_OF_WIDTH.get(width, ""))
        if family is None:
            raise CheckpointError(
                f"it attends to tokens of width {width}, but nothing in it makes any; say --family"
            )
        kind, told = family.main, f"its UNet attends to tokens of width {width}, and {told}"
    elif kind is not None:
        told = f"it has {_WORDS[kind]}, and {told}"
    if kind == "semantic_map":
        return None, kind, told
    if taken == latents:
        return kind, None, told
    if taken == 2 * latents + 1:
        return kind, "inpainting", told
    if kind is None and taken > latents and taken - latents in (1, 3):
        return None, "low_res", told
    raise CheckpointError(f"{told}, which no known family does")
