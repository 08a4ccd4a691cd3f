"""The web UIs' text: theirs into our requests, and ours field for field by their rule."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError
from mezzotint.generation.infotext import (
    parse_infotext,
    request_from_infotext,
    write_infotext,
)
from mezzotint.generation.metadata import write_png
from mezzotint.generation.request import GenerationRequest, Resolved

LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model: sd-v1-5"
PLAIN = {
    "steps": 20,
    "sampler": "euler_ancestral",
    "spacing": None,
    "guidance_scale": 7.0,
    "seed": 1,
    "width": 512,
    "height": 768,
    "model": "sd-v1-5",
}

# texts as they are met, and what differs from PLAIN
TEXTS: list[tuple[str, dict[str, Any]]] = [
    (f"a red apple\n{LINE}", {"prompt": "a red apple"}),
    (
        f"a red apple\nNegative prompt: leaves, (worm:1.3)\n{LINE}",
        {"prompt": "a red apple", "negative_prompt": "leaves, (worm:1.3)"},
    ),
    (f"first line\nsecond line\n{LINE}", {"prompt": "first line\nsecond line"}),
    (
        f"a\nNegative prompt: b\nc\n{LINE}",
        {"prompt": "a", "negative_prompt": "b\nc"},
    ),
    (f"\n\n  a  \n{LINE}\n\n", {"prompt": "a"}),
    (f"a\n\nb\n{LINE}", {"prompt": "a\n\nb"}),
    (LINE, {"prompt": ""}),
    (f"Negative prompt: b\n{LINE}", {"prompt": "", "negative_prompt": "b"}),
    # what looks like parameters in a prompt is the prompt
    (f"ratio: 2, view: top, x\n{LINE}", {"prompt": "ratio: 2, view: top, x"}),
    (f"猫が好き 🍎\n{LINE}", {"prompt": "猫が好き 🍎"}),
    (f'a <lora:ink:0.8>\n{LINE}, Lora hashes: "ink: 1a2b, b: 3c"', {"prompt": "a <lora:ink:0.8>"}),
    (f"a\n{LINE}, Clip skip: 2, Version: v1.10.1", {"prompt": "a"}),
    (
        f"a\n{LINE.replace('Euler a', 'DPM++ 2M Karras')}",
        {"prompt": "a", "sampler": "dpmpp_2m", "spacing": "karras"},
    ),
    (
        f"a\n{LINE.replace('Euler a', 'DPM++ 2M')}, Schedule type: Exponential",
        {"prompt": "a", "sampler": "dpmpp_2m", "spacing": "exponential"},
    ),
    (f"a\n{LINE}, Schedule type: Automatic", {"prompt": "a"}),
    (
        f"a\n{LINE.replace('sd-v1-5', json.dumps('my, model: v2'))}",
        {"prompt": "a", "model": "my, model: v2"},
    ),
    (
        f"a\n{LINE.replace('CFG scale: 7', 'CFG scale: 7.5')}",
        {"prompt": "a", "guidance_scale": 7.5},
    ),
    (f"a\n{LINE}, ", {"prompt": "a"}),
    (
        f"a\n{LINE}, Hires upscale: 2, Hires upscaler: Latent, Denoising strength: 0.7",
        {"prompt": "a"},
    ),
    (f"a\r\n{LINE}", {"prompt": "a"}),
    (f'a "quoted" b\n{LINE}, Template: "a \\"b\\" c\\nd"', {"prompt": 'a "quoted" b'}),
]


@pytest.mark.parametrize(("text", "differs"), TEXTS)
def test_texts_as_they_are_met(text: str, differs: dict[str, Any]) -> None:
    request = request_from_infotext(text)
    expected = {"negative_prompt": None, **PLAIN, **differs}
    assert {name: getattr(request, name) for name in expected} == expected
    assert request.task == "text-to-image"


def test_a_text_without_parameters_is_a_prompt() -> None:
    request = request_from_infotext("a red apple, Steps: 20")
    assert request.prompt == "a red apple, Steps: 20"
    assert request.steps == GenerationRequest(task="text-to-image", prompt="").steps


def test_fields_that_no_request_has_are_kept() -> None:
    told = parse_infotext(f'a\n{LINE}, Lora hashes: "ink: 1a, b: 2", Hires resize: 1024x1024')
    assert told.fields["Lora hashes"] == "ink: 1a, b: 2"
    assert (told.fields["Hires resize-1"], told.fields["Hires resize-2"]) == ("1024", "1024")
    assert told.fields["Clip skip"] == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINE.replace("Steps: 20", "Steps: many"), "Steps: expected a number, got 'many'"),
        (LINE.replace("Euler a", "Restart"), "unknown sampler 'Restart'"),
        (f"{LINE}, Schedule type: KL Optimal", "Schedule type: unknown 'KL Optimal'"),
        (LINE.replace("Steps: 20", "Steps: 0"), "steps"),
    ],
)
def test_texts_that_cannot_be_drawn(text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_from_infotext(f"a\n{text}")
    assert message in str(caught.value)


def published_rule(text: str) -> dict[str, str]:
    """The rule as it is published, for one line of prompt."""
    *lines, last = text.strip().split("\n")
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    fields = dict(re.findall(pattern, last))
    return {k: json.loads(v) if v[:1] == '"' else v for k, v in fields.items()}


def test_what_we_write_parses_field_for_field() -> None:
    request = GenerationRequest(
        task="text-to-image",
        prompt="a red apple",
        negative_prompt="leaves",
        seed=5,
        steps=12,
        sampler="dpmpp_2m",
        spacing="karras",
        guidance_scale=7.5,
        width=512,
        height=768,
        model="runs/a, b: c",
    )
    text = write_infotext(request)
    assert text.split("\n")[:2] == ["a red apple", "Negative prompt: leaves"]
    assert published_rule(text) == {
        "Steps": "12",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "5",
        "Size": "512x768",
        "Model": "runs/a, b: c",
    }


PROMPTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40).map(
    str.strip
)


@given(
    prompt=PROMPTS.filter(lambda p: not p.startswith("Negative prompt:")),
    negative=PROMPTS.filter(bool),
    seed=st.integers(0, 2**40),
    model=PROMPTS.filter(lambda m: m and not re.fullmatch(r"\d+x\d+|\".*\"", m)),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    guidance=st.floats(0, 100),
)
def test_a_request_comes_back(
    prompt: str, negative: str, seed: int, model: str, sampler: str, guidance: float
) -> None:
    request = GenerationRequest(
        task="text-to-image",
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        sampler=sampler,
        guidance_scale=guidance,
        model=model,
    )
    again = request_from_infotext(write_infotext(request))
    assert again == request


def test_pictures_carry_it(tmp_path: Path) -> None:
    resolved = Resolved(
        model_hash="0123456789abcdef",
        precision="float32",
        engine="torch",
        device="cpu",
        threads=1,
        batch_size=4,
        batch_row=2,
        image_index=2,
        mezzotint_version="0.1.0",
        torch_version="2",
    )
    request = GenerationRequest(task="text-to-image", prompt="猫, 🍎", seed=5, resolved=resolved)
    path = tmp_path / "a.png"
    write_png(Image.new("RGB", (24, 16)), request, path)
    with Image.open(path) as image:
        told = parse_infotext(image.info["parameters"])
    assert told.prompt == "猫, 🍎"
    assert {k: told.fields[k] for k in ("Seed", "Size-1", "Size-2", "Model hash", "Version")} == {
        "Seed": "7",
        "Size-1": "24",
        "Size-2": "16",
        "Model hash": "0123456789",
        "Version": "mezzotint 0.1.0",
    }
