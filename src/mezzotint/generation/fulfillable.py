"""What a model wants to be told, and which requests it can fulfil."""

from collections.abc import Mapping
from typing import Any

from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.engines.offload import Offload
from mezzotint.engines.select import Engine
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest, Task
from mezzotint.generation.shared_steps import check_approximations
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = [
    "check_fulfillable",
    "default_task",
    "possible_tasks",
    "task_of_fields",
    "what_is_missing",
]

_BY_CONDITION: dict[str | None, Task] = {
    "caption": "text-to-image",
    "label": "class-to-image",
    "layout": "layout-to-image",
    None: "unconditional",
}
_BY_CONCATENATION: dict[str, Task] = {
    "map": "map-to-image",
    "low_res": "super-resolution",
    "inpainting": "inpainting",
    "regions": "layout-to-image",
}
# what any model does that is told nothing by concatenation, beside its own task
_FROM_A_PICTURE = ("image-to-image", "inpainting", "outpainting")
_CONDITIONS = {"prompt": "caption", "class_label": "label", "layout": "layout"}
_WORDS = {"prompt": "a prompt", "class_label": "a class", "layout": "a layout"}
_ASKED = (*_CONDITIONS, "image", "semantic_map")


def default_task(conditioner: Conditioner) -> Task:
    """Return what a model with this conditioner is for, where a request does not say."""
    if conditioner.wants_concat is not None:
        return _BY_CONCATENATION[conditioner.wants_concat]
    return _BY_CONDITION[conditioner.wants]


def possible_tasks(conditioner: Conditioner) -> tuple[Task, ...]:
    """Return all that a model with this conditioner can be asked for."""
    if conditioner.wants_concat == "inpainting":
        return ("inpainting", "outpainting")
    if conditioner.wants_concat is not None:
        return (default_task(conditioner),)
    return (default_task(conditioner), *_FROM_A_PICTURE)


def task_of_fields(given: Mapping[str, Any], conditioner: Conditioner) -> Task:
    """Return the task of a request that does not name it, by what its fields are."""
    if conditioner.wants_concat in ("low_res", "map", "regions"):
        return default_task(conditioner)
    if "padding" in given:
        return "outpainting"
    if "mask" in given:
        return "inpainting"
    return "image-to-image" if "image" in given else default_task(conditioner)


def what_is_missing(given: Mapping[str, Any], conditioner: Conditioner, name: str) -> str | None:
    """Say what a model wants, where the fields do not have it or have another condition.

    Args:
        given: The fields of a request that have a value.
        conditioner: The model's.
        name: What the model is called in messages.
    """
    description, told = conditioner.description, _told(conditioner)
    for field in _CONDITIONS:
        if field in given and field not in told:
            return f"{name}: the model wants {description}, but was given {_WORDS[field]}"
        if field not in given and field in told:
            return f"{name}: the model wants {description}"
    needed = {"low_res": ("image",), "map": ("semantic_map",), "inpainting": ("image",)}
    for field in needed.get(conditioner.wants_concat or "", ()):
        if field not in given:
            return f"{name}: the model wants {description}"
    return None


def check_fulfillable(
    request: GenerationRequest,
    model: LatentDiffusion,
    name: str,
    engine: Engine,
    offload: Offload | None,
) -> None:
    """Refuse a request that a model, or what runs it, cannot fulfil.

    Raises:
        RequestError: Saying what the model wants, or what the engine lacks.
    """
    conditioner = model.conditioner
    tasks = possible_tasks(conditioner)
    if request.task not in tasks:
        raise RequestError(
            f"{name}: the model wants {conditioner.description}; its task is {tasks[0]!r}, not"
            f" {request.task!r}"
        )
    given = {field: value for field in _ASKED if (value := getattr(request, field)) is not None}
    if missing := what_is_missing(given, conditioner, name):
        raise RequestError(missing)
    for field, why in engine.lacks.items():
        if getattr(request, field):
            raise RequestError(
                f"{name}: {field}: the engine {engine.name!r} {why}; draw with the engine torch"
                " (--engine torch)"
            )
    if request.guides and offload is not None:
        raise RequestError(
            f"{name}: guides: are led by gradients, for which weights must stay on the device;"
            " load without offload (--offload none)"
        )
    _check_network(request, model, name)
    check_approximations(request, model.unet, name)
    if not isinstance(main_conditioner(conditioner), ClipConditioner):
        for field, plain in (("clip_skip", 1), ("emphasis", "original")):
            if getattr(request, field) != plain:
                raise RequestError(
                    f"{name}: {field} is for models with a CLIP text encoder; this one wants"
                    f" {conditioner.description}"
                )


def _check_network(request: GenerationRequest, model: LatentDiffusion, name: str) -> None:
    """Refuse what a network that is told positions, or a distilled one, has no use for."""
    distilled = model.unet.config.guidance_embed_dim is not None
    if request.tiled_sampling and model.unet.config.coordinate_channels:
        raise RequestError(
            f"{name}: tiled_sampling is not for a network that is told where a position lies"
            " between the edges, which tiles have not"
        )
    if request.tiled_sampling and distilled:
        raise RequestError(f"{name}: tiled_sampling is not for distilled models yet")
    if request.guidance_interval is not None and distilled:
        raise RequestError(
            f"{name}: guidance_interval is not for a distilled model, which is told the scale of"
            " guidance at every noise level"
        )


def _told(conditioner: Conditioner) -> frozenset[str]:
    """Which of the fields of `_CONDITIONS` a model is told."""
    told = {field for field, kind in _CONDITIONS.items() if kind == conditioner.wants}
    return frozenset(told | ({"layout"} if conditioner.wants_concat == "regions" else set()))
