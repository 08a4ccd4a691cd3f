"""What other software calls our samplers and spacings."""

from typing import get_args

import pytest

from mezzotint.diffusion.names import DIFFUSERS, SPACING_LABELS, WEB_UI, find_sampler
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import SPACINGS
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest

TEXT = {"task": "text-to-image", "prompt": "a red apple"}


def test_every_name_is_of_a_sampler_that_is_there() -> None:
    assert set(WEB_UI.values()) | set(DIFFUSERS.values()) == set(SAMPLERS)
    assert set(SPACING_LABELS.values()) <= set(SPACINGS)


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
    ],
)
def test_names_of_other_software(name: str, sampler: str, spacing: str | None) -> None:
    assert find_sampler(name) == (sampler, spacing)
    request = GenerationRequest.from_dict(TEXT | {"sampler": name})
    assert (request.sampler, request.spacing) == (sampler, spacing)


def test_a_spacing_that_is_asked_for_stands() -> None:
    request = GenerationRequest.from_dict(TEXT | {"sampler": "LMS Karras", "spacing": "trailing"})
    assert (request.sampler, request.spacing) == ("lms", "trailing")


@pytest.mark.parametrize("name", ["DPM fast", "Karras", "", "Restart"])
def test_unknown_names(name: str) -> None:
    assert find_sampler(name) is None
    with pytest.raises(RequestError, match="unknown sampler"):
        GenerationRequest.from_dict(TEXT | {"sampler": name})
