"""The configurations of a whole model as plain fields, put together from what is known of it.

Fields and not configurations, as only together they may be valid: shapes tell the channels of a
network, and its YAML or the published models the heads that divide them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mezzotint.checkpoints.compvis_config import CompvisConfig
from mezzotint.checkpoints.compvis_shapes import guess_first_stage, guess_unet
from mezzotint.checkpoints.compvis_text import guess_conditioner
from mezzotint.checkpoints.families import Family
from mezzotint.config import Config
from mezzotint.errors import CheckpointError, nearest

__all__ = [
    "PREFIXES",
    "_SECTIONS",
    "Parts",
    "Sketch",
    "differences",
    "factor_of",
    "note_size",
    "overlay",
    "sketch",
]
__all__ += ["split"]

Sketch = dict[str, Any]
"""Fields by section; ``main`` and ``spatial`` are None where there is no such condition."""
Parts = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes by part and by the name below its prefix."""

_SECTIONS = ("unet", "first_stage", "main", "spatial", "schedule", "image_size")
PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "conditioner": "cond_stage_model.",
}
# the original sampling scripts count from the second time and end at the first
_SAMPLING = {"steps_offset": 1, "set_alpha_to_one": False}


def split(shapes: Mapping[str, tuple[int, ...]], prefixes: Iterable[str] = PREFIXES) -> Parts:
    """Sort the tensors of a file by the part that they belong to."""
    return {
        part: {
            name.removeprefix(PREFIXES[part]): shape
            for name, shape in shapes.items()
            if name.startswith(PREFIXES[part])
        }
        for part in prefixes
    }


def factor_of(first_stage: Mapping[str, Any]) -> int:
    """Return f of a first stage, by the fields of its configuration."""
    return 2 ** max(len(first_stage.get("block_out_channels", ())) - 1, 0)


def sketch(parts: Parts, family: Family, config: CompvisConfig | None) -> Sketch:
    """Put together what a file's YAML says, its shapes tell and its family is known for.

    Args:
        parts: From `split`.
        family: What it is.
        config: Its YAML.

    Returns:
        Every section. Without YAML, an image size and a prediction that are the family's.

    Raises:
        CheckpointError: If a network cannot be what its shapes tell; it does not name the file.
    """
    if config is not None:
        first_stage, unet = dict(config.first_stage), dict(config.unet)
        schedule, size = config.schedule, config.latent_size * factor_of(first_stage)
    else:
        stage = parts["first_stage"]
        first_stage = guess_first_stage(stage) if stage else dict[str, Any]()
        known = family.settings(first_stage)
        unet = guess_unet(parts["unet"]) | known.head_fields()
        size = known.image_size
        schedule = {
            "beta_schedule": "scaled_linear",
            "beta_start": known.beta_start,
            "beta_end": known.beta_end,
            "prediction_type": family.prediction,
        }
    told = first_stage.get("embedding_dim") or first_stage.get("latent_channels")
    latents: int = told or unet["out_channels"]
    main = spatial = None
    if family.main is not None:
        main = guess_conditioner(family.main, parts["conditioner"], latents)
        main |= config.main_fields if config is not None else {}
    if family.spatial is not None:
        spatial = guess_conditioner(family.spatial, parts["conditioner"], latents)
        if family.spatial == "low_res":
            spatial["channels"] = max(unet["in_channels"] - latents, 1)
        elif family.spatial == "semantic_map":
            spatial["stages"] = max(len(first_stage.get("block_out_channels", ())) - 1, 0)
        spatial |= family.spatial_fields()
        spatial |= config.spatial_fields if config is not None else {}
    return {
        "unet": unet,
        "first_stage": first_stage,
        "main": main,
        "spatial": spatial,
        "schedule": _SAMPLING | schedule,
        "image_size": [size, size],
    }


def note_size(fields: Sketch) -> None:
    """Let the UNet of a sketch note the size of the latents that it was trained on."""
    height, width = fields["image_size"]
    if height == width:
        fields["unet"]["sample_size"] = max(height // factor_of(fields["first_stage"]), 1)


def overlay(base: Sketch, own: Mapping[str, Any], source: str) -> Sketch:
    """Put over a sketch what Mezzotint wrote of the model that it is of.

    Args:
        base: From `sketch`.
        own: By section, the fields that are otherwise.
        source: What messages call their origin.

    Raises:
        CheckpointError: If a section is unknown, or is none of this model.
    """
    found = dict(base)
    for section, fields in own.items():
        if section not in _SECTIONS:
            raise CheckpointError(
                f"{source}: unknown key {section!r}; {nearest(section, _SECTIONS)}"
            )
        under = base[section]
        if isinstance(under, dict) and isinstance(fields, dict):
            found[section] = under | fields
        elif section == "image_size":
            found[section] = fields
        else:
            raise CheckpointError(f"{source}.{section}: expected keys and values of such a part")
    return found


def differences(base: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the fields of a configuration that are not what a section of a sketch has.

    Args:
        base: The section; what it lacks has the default.
        config: As it should be.
    """
    fields = type(config).model_fields
    return {
        name: value
        for name, value in config.to_dict().items()
        if value != _plain(base[name] if name in base else fields[name].default)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
