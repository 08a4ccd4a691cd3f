"""The text that we write for web UIs, field for field by their published rule, and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mezzotint.conditioning.prompts import split_adapters
from mezzotint.diffusion.names import AUTOMATIC_SPACINGS
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError
from mezzotint.generation.infotext import parse_infotext, write_infotext
from mezzotint.generation.infotext_request import ignored_fields, request_from_infotext
from mezzotint.generation.metadata import write_image
from mezzotint.generation.request import (
    AdapterUse,
    GenerationRequest,
    HighRes,
    InputImage,
)
from mezzotint.generation.resolved import Resolved

IMAGE = InputImage(sha256="a" * 64, path="apple.png")
MASK = InputImage(sha256="b" * 64)
PATTERN = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'


def published_rule(text: str) -> tuple[str, str, dict[str, str]]:
    """The rule as it is published: prompt, negative prompt and parameters."""
    *lines, last = text.strip().split("\n")
    found = re.findall(PATTERN, last)
    assert len(found) >= 3
    prompts: list[list[str]] = [[], []]
    for entry in map(str.strip, lines):
        if entry.startswith("Negative prompt:"):
            prompts.append([])
            entry = entry.removeprefix("Negative prompt:").strip()
        prompts[1 if len(prompts) > 2 else 0].append(entry)
    values = {k: json.loads(v) if v[:1] == '"' else v for k, v in found}
    return "\n".join(prompts[0]), "\n".join(prompts[1]), values


def resolved(**changes: Any) -> Resolved:
    fields = {
        "model_hash": "0123456789abcdef",
        "precision": "float32",
        "engine": "torch",
        "device": "cpu",
        "threads": 1,
        "batch_size": 4,
        "batch_row": 2,
        "image_index": 2,
        "mezzotint_version": "0.1.0",
        "torch_version": "2",
    }
    return Resolved(**(fields | changes))


def test_a_png_parses_field_for_field_by_the_published_rule(tmp_path: Path) -> None:
    request = GenerationRequest(
        task="text-to-image",
        prompt="a (red:1.2) apple, 猫 🍎\nits ratio: 1, <lora:ink:0.5>",
        negative_prompt="leaves\nworms",
        seed=5,
        variation_seed=9,
        variation_strength=0.25,
        steps=12,
        sampler="dpmpp_2m_sde",
        spacing="karras",
        eta=0.5,
        guidance_scale=7.5,
        width=24,
        height=16,
        model="runs/a, b: c",
        clip_skip=2,
        emphasis="no_norm",
        tiling=True,
        token_merging=0.25,
        adapters=(AdapterUse(name="styles/wash.v2.safetensors", weight=0.75),),
        high_res=HighRes(scale=2.0, strength=0.5, steps=8, upscaler="lanczos"),
        resolved=resolved(
            adapters={
                "ink": "1" * 64,
                "styles/wash.v2.safetensors": "2" * 64,
                "worms": "3" * 64,
            }
        ),
    )
    write_image(Image.new("RGB", (48, 32)), request, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        text = image.info["parameters"]
    prompt, negative, fields = published_rule(text)
    assert prompt == "a (red:1.2) apple, 猫 🍎\nits ratio: 1, <lora:ink:0.5> <lora:wash.v2:0.75>"
    assert negative == "leaves\nworms"
    assert fields == {
        "Steps": "12",
        "Sampler": "DPM++ 2M SDE",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "5",
        "Size": "24x16",
        "Model hash": "0123456789",
        "Model": "runs/a, b: c",
        "Variation seed": "11",
        "Variation seed strength": "0.25",
        "Denoising strength": "0.5",
        "Clip skip": "2",
        "RNG": "CPU",
        "Tiling": "True",
        "Token merging ratio": "0.25",
        "Eta": "0.5",
        "Emphasis": "No norm",
        "Hires upscale": "2",
        "Hires steps": "4",
        "Hires upscaler": "Lanczos",
        "Lora hashes": f"ink: {'1' * 12}, wash.v2: {'2' * 12}",
        "TI hashes": f"worms: {'3' * 12}",
        "Version": "mezzotint 0.1.0",
    }
    # and it comes back, but for what stands in the prompt now and which of the images it was
    told = {"prompt": prompt, "adapters": (), "variation_seed": 11, "resolved": None}
    assert request_from_infotext(text) == request.model_copy(update=told)
    assert ignored_fields(parse_infotext(text)) == {}
    assert [(item.name, item.weight) for item in split_adapters(prompt)[1]] == [
        ("ink", 0.5),
        ("wash.v2", 0.75),
    ]


def test_what_is_said_by_default() -> None:
    request = GenerationRequest(task="text-to-image", prompt="a", seed=5, resolved=resolved())
    _, _, fields = published_rule(write_infotext(request, (24, 16)))
    assert fields == {
        "Steps": "25",
        "Sampler": "DDIM",
        "Schedule type": "Simple",  # our default, which no web UI has for DDIM
        "CFG scale": "3",
        "Seed": "7",
        "Size": "24x16",
        "Model hash": "0123456789",
        "RNG": "CPU",
        "Version": "mezzotint 0.1.0",
    }


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"task": "image-to-image"}, {"Denoising strength": "0.75"}),
        ({"task": "image-to-image", "strength": 0.5}, {"Denoising strength": "0.5"}),
        # a second pass of what began from a picture has no place in the text
        (
            {"task": "image-to-image", "strength": 0.5, "high_res": HighRes()},
            {"Denoising strength": "0.5"},
        ),
        (
            {"task": "inpainting", "mask": MASK},
            {"Denoising strength": "1", "Mask blur": "0"},
        ),
        (
            {"task": "outpainting", "padding": (8, 0, 0, 0)},
            {"Denoising strength": "1", "Mask blur": "0"},
        ),
    ],
)
def test_what_began_from_a_picture_says_so(fields: dict[str, Any], told: dict[str, str]) -> None:
    request = GenerationRequest(prompt="a", image=IMAGE, **fields)
    text = write_infotext(request)
    _, _, found = published_rule(text)
    known = {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "RNG"}
    assert {k: v for k, v in found.items() if k not in known} == told
    with pytest.raises(RequestError, match="made from another one"):
        request_from_infotext(text)


def test_pictures_that_no_words_drew_have_no_text() -> None:
    with pytest.raises(RequestError, match="has no prompt, and so no infotext"):
        write_infotext(GenerationRequest(task="unconditional"))


PROMPTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40).map(
    str.strip
)


@given(
    prompt=PROMPTS.filter(lambda p: not p.startswith("Negative prompt:")),
    negative=PROMPTS.filter(bool),
    seed=st.integers(0, 2**61),
    model=PROMPTS.filter(lambda m: not re.fullmatch(r"\d+x\d+", m)),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    spacing=st.sampled_from([None, "leading", "trailing", "linspace", "karras", "sgm_uniform"]),
    guidance=st.floats(0, 100),
)
def test_a_request_comes_back(
    prompt: str,
    negative: str,
    seed: int,
    model: str,
    sampler: str,
    spacing: str | None,
    guidance: float,
) -> None:
    fields = {
        "task": "text-to-image",
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
        "sampler": sampler,
        "guidance_scale": guidance,
        "model": model,
    }
    text = write_infotext(GenerationRequest(**fields, spacing=spacing))
    # a default is said, since the web UIs' own for the sampler is another
    spacing = spacing or SAMPLERS[sampler].default_spacing
    assert request_from_infotext(text) == GenerationRequest(**fields, spacing=spacing)


def test_automatic_spacings_are_of_samplers_that_web_uis_have() -> None:
    assert set(AUTOMATIC_SPACINGS) == set(SAMPLERS) - {"ddpm", "lcm"}
