"""What other software calls our samplers and spacings: one table for all of it."""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["DIFFUSERS", "SPACING_LABELS", "WEB_UI", "KnownAs", "find_sampler"]


class KnownAs(NamedTuple):
    """A sampler of ours, and the spacing that a name implies.

    Attributes:
        sampler: A key of `mezzotint.diffusion.samplers.SAMPLERS`.
        spacing: None leaves the choice open.
    """

    sampler: str
    spacing: str | None = None


# labels of the web UIs, as they stand in the metadata of their pictures
WEB_UI: Mapping[str, str] = {
    "DDIM": "ddim",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_ancestral",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LCM": "lcm",
    "LMS": "lms",
    "PLMS": "plms",
    "UniPC": "unipc",
}
# their spacings, in older pictures a part of the sampler's name ("DPM++ 2M Karras")
SPACING_LABELS: Mapping[str, str] = {
    "Exponential": "exponential",
    "Karras": "karras",
    "SGM Uniform": "sgm_uniform",
    "Uniform": "linspace",
}
DIFFUSERS: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "UniPCMultistepScheduler": "unipc",
}
_BY_FOLDED_NAME = {
    name.casefold(): sampler for name, sampler in (*WEB_UI.items(), *DIFFUSERS.items())
}


def find_sampler(name: str) -> KnownAs | None:
    """Look a sampler up by what other software calls it.

    Args:
        name: A label of the web UIs, with its spacing or without, or the name of a scheduler's
            class in diffusers; upper and lower case are alike.

    Returns:
        None if no other software is known to call anything so.

    Example:
        >>> find_sampler("DPM++ 2M Karras")
        KnownAs(sampler='dpmpp_2m', spacing='karras')
    """
    folded = " ".join(name.casefold().split())
    for label, spacing in SPACING_LABELS.items():
        plain = folded.removesuffix(f" {label.casefold()}")
        if plain != folded and plain in _BY_FOLDED_NAME:
            return KnownAs(_BY_FOLDED_NAME[plain], spacing)
    sampler = _BY_FOLDED_NAME.get(folded)
    return None if sampler is None else KnownAs(sampler)
