"""The schedulers of diffusers' folders, translated to a noise schedule and how it is sampled.

A ``scheduler_config.json`` says three things at once: the noise that the network was trained on,
which `ScheduleConfig` holds; which levels a sampler of the class visits, which `SamplingDefaults`
holds; and how that sampler steps, where it must say what ours does. A key that is absent stands for
the default of its class, and keys of other classes are ignored, as diffusers does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mezzotint.checkpoints.flow_scheduler import FLOW_CLASS, read_flow, write_flow
from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.keys import fits, like
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.diffusion.names import DIFFUSERS
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import ScheduleConfig, Spacing
from mezzotint.errors import CheckpointError, ConfigError, nearest, short

__all__ = ["CLASSES", "FILE", "INERT", "FoundScheduler", "read_scheduler", "write_scheduler"]

FILE = "scheduler_config.json"

_BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
_SPACINGS = ("leading", "trailing", "linspace")
_MOST = 8  # unknown keys that a message names
_LDM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_EVERY: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_LEADING = {"timestep_spacing": "leading"}
_CLIPS = {"clip_sample": True, "thresholding": False}
_SNR = {"rescale_betas_zero_snr": False}
_CURVES = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_SOLVER = {
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
# what each class takes for a key that is absent
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {**_EVERY, **_LEADING, **_CLIPS, **_SNR, "set_alpha_to_one": True},
    "DDPMScheduler": {**_EVERY, **_LEADING, **_CLIPS, **_SNR, "variance_type": "fixed_small"},
    "DPMSolverMultistepScheduler": {
        **_EVERY,
        **_SNR,
        **_CURVES,
        **_SOLVER,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": float("-inf"),
        "variance_type": None,
    },
    "DPMSolverSDEScheduler": {**_EVERY, **_LDM_BETAS, **_CURVES, "noise_sampler_seed": None},
    "EulerAncestralDiscreteScheduler": {**_EVERY, **_SNR},
    "EulerDiscreteScheduler": {
        **_EVERY,
        **_SNR,
        **_CURVES,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "HeunDiscreteScheduler": {**_EVERY, **_LDM_BETAS, **_CURVES, "clip_sample": False},
    "KDPM2AncestralDiscreteScheduler": {**_EVERY, **_LDM_BETAS, **_CURVES},
    "KDPM2DiscreteScheduler": {**_EVERY, **_LDM_BETAS, **_CURVES},
    "LCMScheduler": {
        **_EVERY,
        **_LDM_BETAS,
        **_LEADING,
        **_SNR,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
    "LMSDiscreteScheduler": {**_EVERY, **_CURVES},
    "PNDMScheduler": {**_EVERY, **_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
    "UniPCMultistepScheduler": {
        **_EVERY,
        **_SNR,
        **_CURVES,
        **_SOLVER,
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
}
# keys that act only where another that is refused does, or no longer
INERT = frozenset(
    (
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "flow_shift",
        "sample_max_value",
        "tensor_format",
        "time_shift_type",
        "timestep_values",
    )
)
# what makes another model of it
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
# what makes another sampler of it
_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "disable_corrector": ([],),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (float("-inf"),),
    "lower_order_final": (True,),
    "noise_sampler_seed": (None,),
    "original_inference_steps": (50,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2"),
    "timestep_scaling": (10.0,),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small"),
}
_KNOWN = INERT.union(*CLASSES.values())
_SDE = "sde-dpmsolver++"
# these keep the variance of their state, so that neither start nor input is scaled
_UNSCALED = frozenset(
    f"{name}Scheduler"
    for name in ("DDIM", "DDPM", "DPMSolverMultistep", "LCM", "PNDM", "UniPCMultistep")
)
# these lay their curve over the levels of the spacing, and ours over all of the schedule
_CURVES_IN_SPACING = frozenset(
    f"{name}Scheduler"
    for name in ("DPMSolverSDE", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete")
    + ("KDPM2Discrete", "LMSDiscrete")
)


@dataclass(frozen=True, kw_only=True)
class FoundScheduler:
    """What a ``scheduler_config.json`` says.

    Attributes:
        schedule: The noise that the network was trained on.
        defaults: How it is sampled.
        notes: Sentences on what is sampled otherwise.
    """

    schedule: ScheduleConfig | FlowScheduleConfig
    defaults: SamplingDefaults
    notes: tuple[str, ...] = ()


def read_scheduler(
    path: Path, name: str | None = None, *, standard: bool = False
) -> FoundScheduler:
    """Read a scheduler's configuration.

    Args:
        path: The ``scheduler_config.json``.
        name: Its class, if the pipeline names one; else the file must.
        standard: Take ``steps_offset`` for 1 and ``clip_sample`` for off, whatever is written, as
            the Stable Diffusion pipelines of diffusers do.

    Raises:
        CheckpointError: If the class is unknown, or it defines noise that ours cannot.
    """
    data = read_json(path)
    name = name or str(data.get("_class_name"))
    if name not in (*CLASSES, FLOW_CLASS):
        near = nearest(name, (*CLASSES, FLOW_CLASS))
        raise CheckpointError(f"{path}: unknown scheduler {short(name)}; {near}")
    unset = _unset(data, path)
    given = {key: value for key, value in data.items() if key not in unset}
    if name == FLOW_CLASS:
        return _found_flow(given, path)
    values = {key: given.get(key, default) for key, default in CLASSES[name].items()}
    if standard:
        values["steps_offset"] = 1
        values["clip_sample"] = False
    problems = _problems(values, given, name)
    if problems:
        raise CheckpointError(f"{path}: this {name} cannot be read: {'; '.join(problems)}")
    schedule = {key: values[key] for key in ScheduleConfig.model_fields if key in values}
    schedule["beta_schedule"] = _BETA_SCHEDULES[values["beta_schedule"]]
    schedule["zero_terminal_snr"] = bool(values.get("rescale_betas_zero_snr"))
    # it matters to other samplers than the class's own
    schedule["set_alpha_to_one"] = values.get(
        "set_alpha_to_one", given.get("set_alpha_to_one", True)
    )
    defaults, notes = _sampling(name, values)
    try:
        found = ScheduleConfig.from_dict(schedule, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return FoundScheduler(schedule=found, defaults=defaults, notes=notes)


def _found_flow(given: Mapping[str, Any], path: Path) -> FoundScheduler:
    flow, problems, notes = read_flow(given)
    if flow is None:
        raise CheckpointError(f"{path}: this {FLOW_CLASS} cannot be read: {'; '.join(problems)}")
    followed = SamplingDefaults(sampler="euler", spacing="linspace")
    return FoundScheduler(
        schedule=flow, defaults=SamplingDefaults() if notes else followed, notes=notes
    )


def _unset(data: Mapping[str, Any], path: Path) -> set[str]:
    """The keys whose values stand there only because they are a class's defaults."""
    names = data.get("_use_default_values") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in cast(list[Any], names)):
        raise CheckpointError(f"{path}: _use_default_values is {short(names)}, expected keys")
    return set(cast(list[str], names))


def _problems(values: Mapping[str, Any], given: Mapping[str, Any], name: str) -> list[str]:
    defaults = CLASSES[name]
    problems = [
        f"{key} is {short(value)}, expected {like(defaults[key])}"
        for key, value in values.items()
        if key in defaults and not fits(value, defaults[key])
    ]
    if problems:
        return problems  # nothing else can be said of such values
    for key, allowed in _REFUSED.items():
        if key in values and values[key] not in allowed:
            absent = "" if key in given else f", the default of {name}"
            problems.append(
                f"{key} is {short(values[key])}{absent}, expected {allowed[0]!r} (Mezzotint has no"
                " such option)"
            )
    for key, choices in (("beta_schedule", _BETA_SCHEDULES), ("timestep_spacing", _SPACINGS)):
        if values[key] not in choices:
            near = nearest(str(values[key]), choices)
            problems.append(f"unknown {key} {short(values[key])}; {near}")
    unknown = [
        key
        for key, value in given.items()
        if key not in _KNOWN and not key.startswith("_") and value not in (None, False)
    ]
    problems += [f"unknown key {short(key)}; {nearest(key, values)}" for key in unknown[:_MOST]]
    if (more := len(unknown) - _MOST) > 0:
        problems.append(f"and {more} more unknown keys")
    return problems


def _sampling(name: str, values: Mapping[str, Any]) -> tuple[SamplingDefaults, tuple[str, ...]]:
    """What a request takes where it says nothing, and what of the file is not followed."""
    others = [
        f"{key} {short(values[key])}"
        for key, allowed in _FOLLOWED.items()
        if key in values and values[key] not in allowed
    ]
    if others:
        return SamplingDefaults(), (
            f"its {name} has {', '.join(others)}, which Mezzotint cannot do: pictures are drawn"
            " by its own sampler unless another is asked for",
        )
    sampler = DIFFUSERS[name]
    if values.get("algorithm_type") == _SDE:
        sampler = "dpmpp_2m_sde"
    if sampler == "lcm":
        return SamplingDefaults(sampler=sampler), ()  # its spacing is that of the distillation
    laid = values["timestep_spacing"]
    for curve in ("karras", "exponential"):
        if values.get(f"use_{curve}_sigmas"):
            notes = ()
            if laid != "linspace" and name in _CURVES_IN_SPACING:
                notes = (f"its {curve} noise levels are laid over the whole schedule, not {laid}",)
            return SamplingDefaults(sampler=sampler, spacing=curve), notes
    return SamplingDefaults(sampler=sampler, spacing=laid), ()


def write_scheduler(
    schedule: ScheduleConfig | FlowScheduleConfig,
    defaults: SamplingDefaults | None = None,
    *,
    standard: bool = False,
    scaled: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Translate to the keys of a ``scheduler_config.json``.

    Args:
        schedule: The noise that the network was trained on.
        defaults: How it is sampled; what is not said is Mezzotint's own default, so that diffusers
            draws what a request draws that says nothing.
        standard: Write ``steps_offset`` as 1, without which diffusers' Stable Diffusion pipelines
            warn and take it for 1.
        scaled: Whether the pipeline scales the start and the network's input to the noise level,
            which some classes need.

    Returns:
        The keys, and sentences on what they cannot hold.
    """
    lost: list[str] = []
    wanted = defaults or SamplingDefaults()
    if isinstance(schedule, FlowScheduleConfig):
        return write_flow(schedule, wanted)
    sampler = wanted.sampler or "ddim"
    name = _class_of(sampler)
    lacks = None
    if schedule.zero_terminal_snr and "rescale_betas_zero_snr" not in CLASSES[name]:
        lacks = "end in noise alone"
    elif not scaled and name not in _UNSCALED:
        lacks = "be used by this pipeline, which does not scale its input"
    if lacks is not None:
        lost.append(f"scheduler: a {name} cannot {lacks}; a DDIMScheduler is written instead")
        sampler, name = "ddim", "DDIMScheduler"
    if standard and schedule.steps_offset != 1:
        lost.append(
            f"scheduler: steps_offset is written as 1, not {schedule.steps_offset}: pipelines for"
            " Stable Diffusion have no other; only the spacing 'leading' depends on it"
        )
    spacing = _spacing_keys(name, wanted.spacing or SAMPLERS[sampler].default_spacing)
    if spacing is None:
        fallback = SAMPLERS[sampler].default_spacing
        lost.append(f"scheduler: a {name} has no spacing {wanted.spacing!r}; {fallback!r} stands")
        spacing = {"timestep_spacing": fallback}
    keys = {
        "_class_name": name,
        "beta_schedule": next(
            theirs for theirs, ours in _BETA_SCHEDULES.items() if ours == schedule.beta_schedule
        ),
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": schedule.prediction_type,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "steps_offset": 1 if standard else schedule.steps_offset,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "clip_sample": False,
        **spacing,
    }
    if name == "PNDMScheduler":
        keys["skip_prk_steps"] = True
    if sampler == "dpmpp_2m_sde":
        keys["algorithm_type"] = _SDE
    return keys, lost


def _class_of(sampler: str) -> str:
    plain = "dpmpp_2m" if sampler == "dpmpp_2m_sde" else sampler
    return next(theirs for theirs, ours in DIFFUSERS.items() if ours == plain)


def _spacing_keys(name: str, spacing: Spacing) -> dict[str, Any] | None:
    """The keys by which a class lays its levels so; None if it cannot."""
    if spacing in ("leading", "trailing", "linspace"):
        return {"timestep_spacing": spacing}
    if (key := f"use_{spacing}_sigmas") in CLASSES[name]:
        return {"timestep_spacing": "linspace", key: True}
    return None
