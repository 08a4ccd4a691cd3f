import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest
from mezzotint.generation.resolved import Resolved

RESOLVED = Resolved(
    model_hash="ab" * 32,
    precision="bfloat16",
    engine="torch",
    device="cpu",
    threads=2,
    batch_size=4,
    batch_row=1,
    image_index=3,
    mezzotint_version="0.1.0",
    torch_version="2.13.0",
)


def from_words(**changes: Any) -> GenerationRequest:
    return GenerationRequest.from_dict(
        {"task": "text-to-image", "prompt": "a red apple", **changes}
    )


@settings(max_examples=40)
@given(
    prompt=st.text(st.characters(codec="utf-8"), max_size=40),
    seed=st.integers(0, 2**62 - 1),
    scale=st.floats(0, 1e6),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    resolved=st.sampled_from([None, RESOLVED]),
)
def test_json_is_a_round_trip(
    prompt: str, seed: int, scale: float, sampler: str, resolved: Resolved | None
) -> None:
    request = from_words(
        prompt=prompt,
        seed=seed,
        guidance_scale=scale,
        sampler=sampler,
        resolved=None if resolved is None else resolved.to_dict(),
    )
    assert request.resolved == resolved
    assert GenerationRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize("label", ["fruit", "3", 3])
def test_a_class_keeps_being_a_name_or_an_index(label: str | int) -> None:
    request = GenerationRequest.from_dict({"task": "class-to-image", "class_label": label})
    again = GenerationRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again.class_label == label
    assert type(again.class_label) is type(label)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "request: steps: Input should be greater than or equal to 1, got 0"),
        ({"steps": -5}, "request: steps: Input should be greater than or equal to 1, got -5"),
        ({"seed": -1}, "request: seed: Input should be greater than or equal to 0, got -1"),
        ({"num_images": 0}, "request: num_images: Input should be"),
        ({"width": 0}, "request: width: Input should be"),
        ({"guidance_scale": float("nan")}, "request: guidance_scale: Input should be"),
        ({"guidance_rescale": 1.5}, "request: guidance_rescale: Input should be"),
        ({"eta": -0.1}, "request: eta: Input should be"),
        ({"spacing": "log"}, "request: spacing: Input should be 'leading', 'trailing'"),
        ({"sampler": "ddin"}, "request: sampler: unknown sampler 'ddin'; did you mean 'ddim'?"),
        ({"promt": "x"}, "request: unknown key 'promt'; did you mean 'prompt'?"),
        ({"format_version": 2}, "request: format_version 2 is newer than the 1 that this"),
        ({"class_label": 3}, "request: class_label: not for the task 'text-to-image'; give prompt"),
        ({"prompt": None}, "request: prompt: required by the task 'text-to-image', but missing"),
        ({"task": "unconditional"}, "request: prompt: not for the task 'unconditional'"),
        (
            {"task": "class-to-image", "prompt": None, "class_label": 1, "negative_prompt": "x"},
            "request: negative_prompt: not for the task 'class-to-image'",
        ),
    ],
)
def test_what_no_model_could_draw_is_refused_in_one_line(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError) as caught:
        from_words(**changes)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_an_unknown_sampler_is_told_with_all_that_there_are() -> None:
    with pytest.raises(RequestError) as caught:
        from_words(sampler="magic")
    assert str(caught.value).endswith(", ".join(sorted(SAMPLERS)))


def test_the_empty_prompt_is_a_prompt() -> None:
    assert from_words(prompt="").prompt == ""
