"""What other software calls our samplers and spacings: one table for all of it."""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "AUTOMATIC_SPACINGS",
    "DIFFUSERS",
    "SPACING_LABELS",
    "WEB_UI",
    "KnownAs",
    "find_sampler",
    "find_spacing",
    "spacing_label",
    "web_ui_label",
]


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
# their spacings, in older pictures a part of the sampler's name ("DPM++ 2M Karras"); of several
# labels of one spacing the first is the one that we write
SPACING_LABELS: Mapping[str, str] = {
    # DDIM and Simple are the same levels as ours where the steps divide the training times
    "DDIM": "leading",
    "Exponential": "exponential",
    "Karras": "karras",
    "SGM Uniform": "sgm_uniform",
    "SGMUniform": "sgm_uniform",
    "Simple": "trailing",
    "Uniform": "linspace",
    "Normal": "linspace",
}
# what the web UIs take for the spacing "Automatic", by our names of samplers; a sampler that is not
# here has noise levels of its own. Before version 1.9 k-diffusion's were "linspace" throughout.
AUTOMATIC_SPACINGS: Mapping[str, str] = {
    "ddim": "leading",
    "dpm2": "karras",
    "dpm2_ancestral": "karras",
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_sde": "karras",
    "euler": "linspace",
    "euler_ancestral": "linspace",
    "heun": "linspace",
    "lms": "linspace",
    "plms": "leading",
    "unipc": "linspace",
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
    name.casefold(): sampler
    for named in (WEB_UI, DIFFUSERS)
    for label, sampler in named.items()
    for name in (label, sampler)
}
_SAMPLER_LABEL_OF = {sampler: label for label, sampler in WEB_UI.items()}
_BY_FOLDED_LABEL = {label.casefold(): spacing for label, spacing in SPACING_LABELS.items()}
_SPACING_LABEL_OF = {spacing: label for label, spacing in reversed(SPACING_LABELS.items())}


def find_sampler(name: str) -> KnownAs | None:
    """Look a sampler up by what other software calls it, or by our own name.

    Args:
        name: A label of the web UIs, with its spacing or without, or the name of a scheduler's
            class in diffusers; upper and lower case are alike.

    Returns:
        None if nothing is known to be called so.

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


def find_spacing(label: str) -> str | None:
    """Look a spacing up by its label in the web UIs or by our own name; case doesn't matter.

    Example:
        >>> find_spacing("karras"), find_spacing("SGM Uniform"), find_spacing("Beta")
        ('karras', 'sgm_uniform', None)
    """
    folded = " ".join(label.casefold().split())
    if folded in _SPACING_LABEL_OF:
        return folded
    return _BY_FOLDED_LABEL.get(folded)


def spacing_label(spacing: str) -> str:
    """Return the label of one of our spacings in the web UIs."""
    return _SPACING_LABEL_OF[spacing]


def web_ui_label(sampler: str) -> str:
    """Return the label of one of our samplers in the web UIs; its own name if they have none."""
    return _SAMPLER_LABEL_OF.get(sampler, sampler)
