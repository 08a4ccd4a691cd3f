"""The scheduler of rectified flows in diffusers' folders, translated as the others are.

A ``FlowMatchEulerDiscreteScheduler`` takes Euler's steps over levels of its own, which are those of
the spacing ``linspace``.
"""

from collections.abc import Mapping
from typing import Any

from mezzotint.checkpoints.keys import fits, like
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.errors import ConfigError, nearest, short

__all__ = ["FLOW_CLASS", "FLOW_DEFAULTS", "FLOW_INERT", "read_flow", "write_flow"]

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
# what it takes for a key that is absent
FLOW_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
# keys that act only where another that is refused does
FLOW_INERT = frozenset(
    ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
)
_REFUSED = ("use_dynamic_shifting", "invert_sigmas")  # what makes another model of it
_SAME = ("euler", "ddim")  # without noise these are one


def read_flow(
    given: Mapping[str, Any],
) -> tuple[FlowScheduleConfig | None, list[str], tuple[str, ...]]:
    """Read the keys of the scheduler.

    Args:
        given: Those of its file.

    Returns:
        The schedule, or why there is none; and sentences on what is sampled otherwise.
    """
    values = {key: given.get(key, default) for key, default in FLOW_DEFAULTS.items()}
    problems = [
        f"{key} is {short(value)}, expected {like(FLOW_DEFAULTS[key])}"
        for key, value in values.items()
        if not fits(value, FLOW_DEFAULTS[key])
    ]
    problems += [
        f"{key} is {short(values[key])}, expected False (Mezzotint has no such option)"
        for key in _REFUSED
        if values[key] is not False and not problems
    ]
    known = FLOW_INERT.union(FLOW_DEFAULTS)
    problems += [
        f"unknown key {short(key)}; {nearest(key, FLOW_DEFAULTS)}"
        for key, value in given.items()
        if key not in known and not key.startswith("_") and value not in (None, False)
    ]
    if problems:
        return None, problems, ()
    try:
        schedule = FlowScheduleConfig.from_dict(
            {key: values[key] for key in ("shift", "num_train_timesteps")}, FLOW_CLASS
        )
    except ConfigError as error:
        return None, [str(error)], ()
    others = [
        f"{key} {short(value)}"
        for key, value in values.items()
        if key not in (*_REFUSED, *FlowScheduleConfig.model_fields) and value not in (None, False)
    ]
    if not others:
        return schedule, [], ()
    return (
        schedule,
        [],
        (
            f"its {FLOW_CLASS} has {', '.join(others)}, which Mezzotint cannot do: pictures are"
            " drawn by its own sampler unless another is asked for",
        ),
    )


def write_flow(
    schedule: FlowScheduleConfig, wanted: SamplingDefaults
) -> tuple[dict[str, Any], list[str]]:
    """Translate to the keys of a ``scheduler_config.json``; see `write_scheduler`."""
    lost: list[str] = []
    if wanted.sampler not in (None, *_SAME):
        lost.append(f"scheduler: a {FLOW_CLASS} has no sampler {wanted.sampler!r}; 'euler' stands")
    if wanted.spacing not in (None, "linspace"):
        lost.append(
            f"scheduler: a {FLOW_CLASS} has no spacing {wanted.spacing!r}; 'linspace' stands"
        )
    keys = {
        "_class_name": FLOW_CLASS,
        "num_train_timesteps": schedule.num_train_timesteps,
        "shift": schedule.shift,
    }
    return keys, lost
