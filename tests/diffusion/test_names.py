"""What other software calls our samplers and spacings."""

from typing import get_args

import pytest
import torch

from mezzotint.diffusion.names import (
    AUTOMATIC_SPACINGS,
    DIFFUSERS,
    SPACING_LABELS,
    WEB_UI,
    find_sampler,
    find_spacing,
    spacing_label,
    web_ui_label,
)
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import SPACINGS, NoiseSchedule, ScheduleConfig
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest

TEXT = {"task": "text-to-image", "prompt": "a red apple"}


def test_every_name_is_of_a_sampler_that_is_there() -> None:
    assert set(WEB_UI.values()) | set(DIFFUSERS.values()) == set(SAMPLERS)
    assert set(SPACING_LABELS.values()) == set(AUTOMATIC_SPACINGS.values()) | set(SPACINGS)
    assert set(AUTOMATIC_SPACINGS) <= set(SAMPLERS)


def test_the_request_knows_every_spacing() -> None:
    annotation = GenerationRequest.model_fields["spacing"].annotation
    literal, none = get_args(annotation)
    assert get_args(literal) == SPACINGS and none is type(None)


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [
        ("Euler a", "euler_ancestral", None),
        ("euler A", "euler_ancestral", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM2 a Karras", "dpm2_ancestral", "karras"),
        ("Euler SGM Uniform", "euler", "sgm_uniform"),
        ("UniPC", "unipc", None),
        ("PNDMScheduler", "plms", None),
        ("DDPM", "ddpm", None),
        ("dpmpp_2m Karras", "dpmpp_2m", "karras"),
    ],
)
def test_names_of_other_software(name: str, sampler: str, spacing: str | None) -> None:
    assert find_sampler(name) == (sampler, spacing)
    request = GenerationRequest.from_dict(TEXT | {"sampler": name})
    assert (request.sampler, request.spacing) == (sampler, spacing)


def test_spacings_by_label_and_by_our_name() -> None:
    for spacing in SPACINGS:
        assert find_spacing(spacing_label(spacing)) == find_spacing(spacing) == spacing
    assert find_spacing("SGMUniform") == find_spacing(" sgm  UNIFORM") == "sgm_uniform"
    assert (spacing_label("linspace"), find_spacing("Normal")) == ("Uniform", "linspace")
    assert find_spacing("Automatic") is find_spacing("Beta") is find_spacing("") is None


def test_labels_of_samplers() -> None:
    assert all(web_ui_label(sampler) == label for label, sampler in WEB_UI.items())
    assert web_ui_label("ddpm") == "ddpm"


@pytest.mark.parametrize("steps", [10, 25, 40, 50])
def test_levels_of_the_web_uis_are_ours(steps: int) -> None:
    """Where the steps divide the 1000 training times; by the formulas that the labels stand for."""
    schedule = NoiseSchedule(ScheduleConfig(steps_offset=1))
    every = 1000 // steps
    times = {
        "Simple": [999 - k * every for k in range(steps)],
        "DDIM": [1 + k * every for k in reversed(range(steps))],
    }
    for label, visited in times.items():
        sigmas = SAMPLERS["euler"].sigmas(schedule, steps, SPACING_LABELS[label])  # type: ignore[arg-type]
        expected = torch.cat([schedule.sigmas[visited], torch.zeros(1)]).float()
        assert torch.allclose(sigmas, expected, rtol=1e-6, atol=0), label


def test_a_spacing_that_is_asked_for_stands() -> None:
    request = GenerationRequest.from_dict(TEXT | {"sampler": "LMS Karras", "spacing": "trailing"})
    assert (request.sampler, request.spacing) == ("lms", "trailing")


@pytest.mark.parametrize("name", ["DPM fast", "Karras", "", "Restart"])
def test_unknown_names(name: str) -> None:
    assert find_sampler(name) is None
    with pytest.raises(RequestError, match="unknown sampler"):
        GenerationRequest.from_dict(TEXT | {"sampler": name})
