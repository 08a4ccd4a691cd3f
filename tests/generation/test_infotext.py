"""The text that web UIs write into their pictures becomes a request."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import RequestError
from mezzotint.generation.infotext import parse_infotext
from mezzotint.generation.infotext_request import ignored_fields, request_from_infotext
from mezzotint.generation.request import (
    GenerationRequest,
    HighRes,
    InputImage,
)

LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model: sd-v1-5"
PLAIN: dict[str, Any] = {
    "task": "text-to-image",
    "prompt": "a",
    "steps": 20,
    "sampler": "euler_ancestral",
    "spacing": "linspace",
    "guidance_scale": 7.0,
    "seed": 1,
    "width": 512,
    "height": 768,
    "model": "sd-v1-5",
}
IMAGE = InputImage(sha256="a" * 64, path="apple.png")
MASK = InputImage(sha256="b" * 64)


def line(**changes: str) -> str:
    """The line of parameters with some of its values changed, and what is new at its end."""
    fields = dict(field.split(": ", 1) for field in LINE.split(", "))
    fields |= {name.replace("_", " "): value for name, value in changes.items()}
    return ", ".join(f"{name}: {value}" for name, value in fields.items())


def hires(**fields: str) -> str:
    more = {"Denoising_strength": "0.5", "Hires_upscale": "1.5", "Hires_upscaler": "Latent"}
    return line(**(more | fields))


# texts as they are met, and in what the request differs from PLAIN
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (f"a red apple\n{LINE}", {"prompt": "a red apple"}),
    "negative": (
        f"a\nNegative prompt: leaves, (worm:1.3)\n{LINE}",
        {"negative_prompt": "leaves, (worm:1.3)"},
    ),
    "lines": (f"first line\nsecond line\n{LINE}", {"prompt": "first line\nsecond line"}),
    "negative lines": (f"a\nNegative prompt: b\nc\n{LINE}", {"negative_prompt": "b\nc"}),
    "blanks around": (f"\n\n  a  \n{LINE}\n\n", {}),
    "blank line within": (f"a\n\nb\n{LINE}", {"prompt": "a\n\nb"}),
    "no prompt": (LINE, {"prompt": ""}),
    "negative only": (f"Negative prompt: b\n{LINE}", {"prompt": "", "negative_prompt": "b"}),
    "prompt like parameters": (
        f"Steps: 2, view: top, ratio: 1x2\n{LINE}",
        {"prompt": "Steps: 2, view: top, ratio: 1x2"},
    ),
    "unicode": (f"猫が好き 🍎\n{LINE}", {"prompt": "猫が好き 🍎"}),
    "carriage returns": (f"a\r\nNegative prompt: b\r\n{LINE}\r\n", {"negative_prompt": "b"}),
    "quotes in the prompt": (f'a "b" \\(c\\)\n{LINE}', {"prompt": 'a "b" \\(c\\)'}),
    "adapters": (
        f'a <lora:ink:0.8>\n{LINE}, Lora hashes: "ink: 1a2b, b: 3c"',
        {"prompt": "a <lora:ink:0.8>"},
    ),
    "quoted comma and colon": (
        f"a\n{line(Model=json.dumps('my, model: v2'))}",
        {"model": "my, model: v2"},
    ),
    "quoted quotes and lines": (
        f'a\n{LINE}, Template: "a \\"b\\", c: d\\ne", Tiling: True',
        {"tiling": True},
    ),
    "trailing comma": (f"a\n{LINE}, ", {}),
    "merged tokens": (f"a\n{LINE}, Token merging ratio: 0.5", {"token_merging": 0.5}),
    "most merged tokens": (f"a\n{LINE}, Token merging ratio: 0.9", {"token_merging": 0.75}),
    "clip skip": (f"a\n{LINE}, Clip skip: 2, Version: v1.10.1", {"clip_skip": 2}),
    "clip skip from the end": (f"a\n{LINE}, Clip skip: -2", {"clip_skip": 2}),
    "fraction of guidance": (f"a\n{line(CFG_scale='7.5')}", {"guidance_scale": 7.5}),
    "floats for whole numbers": (f"a\n{line(Steps='20.0', Seed='3.0')}", {"seed": 3}),
    "any seed": (f"a\n{line(Seed='-1')}", {"seed": 0}),
    "a large seed": (f"a\n{line(Seed='1152921504606846977')}", {"seed": 2**60 + 1}),
    "odd size": (f"a\n{line(Size='513x767')}", {"width": 513, "height": 767}),
    "spacing in the sampler": (
        f"a\n{line(Sampler='DPM++ 2M Karras')}",
        {"sampler": "dpmpp_2m", "spacing": "karras"},
    ),
    "spacing": (
        f"a\n{line(Sampler='DPM++ 2M', Schedule_type='SGM Uniform')}",
        {"sampler": "dpmpp_2m", "spacing": "sgm_uniform"},
    ),
    "spacing in small letters": (f"a\n{LINE}, Schedule type: karras", {"spacing": "karras"}),
    "automatic spacing": (
        f"a\n{line(Sampler='DPM++ 2M SDE', Schedule_type='Automatic')}",
        {"sampler": "dpmpp_2m_sde", "spacing": "exponential"},
    ),
    "spacing not said": (
        f"a\n{line(Sampler='DPM++ SDE')}, Version: f2.0.1v1.10.1-previous-313-g8a042934",
        {"sampler": "dpmpp_sde", "spacing": "karras"},
    ),
    "spacing not said, long ago": (
        f"a\n{line(Sampler='DPM++ 2M')}, Version: v1.6.0-2-g4afaaf8a",
        {"sampler": "dpmpp_2m", "spacing": "linspace"},
    ),
    "ddim": (
        f"a\n{line(Sampler='DDIM')}, Eta DDIM: 0.5",
        {"sampler": "ddim", "spacing": "leading", "eta": 0.5},
    ),
    "eta": (f"a\n{LINE}, Eta: 0.25", {"eta": 0.25}),
    "variation": (
        f"a\n{LINE}, Variation seed: 7, Variation seed strength: 0.3",
        {"variation_seed": 7, "variation_strength": 0.3},
    ),
    "emphasis": (f"(a)\n{LINE}, Emphasis: No norm", {"prompt": "(a)", "emphasis": "no_norm"}),
    # the second pass makes 20 steps as well: the last 20 of 40
    "second pass": (
        f"a\n{hires()}",
        {"high_res": HighRes(scale=1.5, strength=0.5, steps=40, upscaler="latent")},
    ),
    # 7 steps of 14, and "None" resizes the picture
    "second pass of fewer steps": (
        f"a\n{hires(Hires_steps='7', Hires_upscaler='None')}",
        {"high_res": HighRes(scale=1.5, strength=0.5, steps=14, upscaler="lanczos")},
    ),
    "second pass to a size": (
        f"a\n{LINE}, Denoising strength: 1, Hires resize: 0x1536",
        {"high_res": HighRes(scale=2.0, strength=1.0)},
    ),
    "second pass as once written": (
        f"a\n{line(Size='1024x1536')}, Denoising strength: 1, First pass size: 512x768",
        {"high_res": HighRes(scale=2.0, strength=1.0)},
    ),
    # which other software writes where nothing was begun from
    "no denoising": (f"a\n{LINE}, Denoising strength: 0", {}),
}


@pytest.mark.parametrize(("text", "differs"), TEXTS.values(), ids=TEXTS)
def test_texts_as_they_are_met(text: str, differs: dict[str, Any]) -> None:
    assert request_from_infotext(text) == GenerationRequest(**(PLAIN | differs))


@pytest.mark.parametrize(
    ("more", "inputs", "differs"),
    [
        ("Denoising strength: 0.6, Init image hash: 1a2b", {"image": IMAGE}, {"strength": 0.6}),
        ("Mask blur: 4, Denoising strength: 1", {"image": IMAGE, "mask": MASK}, {"strength": 1.0}),
        ("Version: v1.10.1", {"image": IMAGE}, {}),
    ],
)
def test_what_began_from_a_picture_needs_it(
    more: str, inputs: dict[str, Any], differs: dict[str, Any]
) -> None:
    text = f"a\n{LINE}, {more}"
    task = "inpainting" if "mask" in inputs else "image-to-image"
    expected = GenerationRequest(**(PLAIN | inputs | differs | {"task": task}))
    assert request_from_infotext(text, **inputs) == expected
    if differs:
        with pytest.raises(RequestError, match="made from another one, which its text does not"):
            request_from_infotext(text)
    if task == "inpainting":
        with pytest.raises(RequestError, match="give its mask"):
            request_from_infotext(text, image=IMAGE)


def test_another_sampler_overrules_what_goes_with_the_old_one() -> None:
    text = f"a\n{line(Sampler='Restart')}, Schedule type: KL Optimal, Eta: 0.5"
    request = request_from_infotext(text, sampler="DPM++ 2M")
    expected = {"sampler": "dpmpp_2m", "spacing": "karras"}
    assert request == GenerationRequest(**(PLAIN | expected))


def test_a_text_without_parameters_is_a_prompt() -> None:
    request = request_from_infotext("a red apple, Steps: 20")
    assert request == GenerationRequest(task="text-to-image", prompt="a red apple, Steps: 20")


def test_what_a_request_cannot_hold_is_told() -> None:
    told = parse_infotext(
        f"a\n{LINE}, Model hash: 1a, VAE: x.pt, Clip skip: 2, ENSD: 31337, RNG: NV, Eta: 0.5,"
        ' Hires prompt: "b, c", Seed resize from: 256x256, Lora hashes: "ink: 1a, b: 2"'
    )
    assert told.fields["Lora hashes"] == "ink: 1a, b: 2"
    assert ignored_fields(told) == {
        "VAE": "x.pt",
        "ENSD": "31337",
        "RNG": "NV",
        "Hires prompt": "b, c",
        "Seed resize from-1": "256",
        "Seed resize from-2": "256",
    }
    plain = parse_infotext(f"a\n{line(Sampler='Euler')}, Eta: 0.5, Mask blur: 0, RNG: CPU")
    assert ignored_fields(plain) == {"Eta": "0.5"}  # Euler adds no noise


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(Steps="many"), "Steps: expected a number, got 'many'"),
        (line(Steps="20.5"), "Steps: expected a whole number, got '20.5'"),
        (line(Steps="0"), "steps: Input should be greater than or equal to 1"),
        (line(Seed="1e999"), "Seed: expected a whole number, got '1e999'"),
        (line(CFG_scale="nan"), "guidance_scale: "),
        (line(Size="512 by 768"), "Size: expected pixels, as in 512x768, got '512 by 768'"),
        (line(Sampler="Restart"), "unknown sampler 'Restart'"),
        (line(Schedule_type="KL Optimal"), "Schedule type: unknown 'KL Optimal'; Choose from: "),
        (line(Emphasis="Loud"), "Emphasis: unknown 'Loud'; Choose from: Ignore, No norm, None"),
        (line(Tiling="4x"), "Tiling: unknown '4x'; Choose from: False, True"),
        (hires(Hires_upscaler="ESRGAN_4x"), "Hires upscaler: unknown 'ESRGAN_4x'; Choose from: L"),
        (hires(Hires_resize="1024x1024"), "1024x1024 has another shape than the first pass, 512x7"),
        (hires(Hires_resize=f"{10**400}x1"), "Hires resize-1: expected a whole number"),
        (hires(First_pass_size="0x0"), "First pass size: 0x0 left it to the web UI"),
        (line(Variation_seed_strength="0.5"), "need one another"),
    ],
)
def test_texts_that_cannot_be_drawn(text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_from_infotext(f"a\n{text}", source="apple.png")
    assert str(caught.value).startswith("apple.png: ")
    assert message in str(caught.value)


LABELS = [*dict(field.split(": ", 1) for field in hires().split(", ")), "Schedule type", "Version"]
LABELS += ["Variation seed", "Variation seed strength", "Clip skip", "Tiling", "Hires steps", "Eta"]
LABELS += ["Token merging ratio", "Hires resize", "First pass size", "Mask blur"]
VALUES = st.sampled_from(
    ["", "0", "-1", "1", "0.5", "2", "1e-320", "1e308", "inf", "nan", "9" * 400, "0" * 5000]
    + ["8x8", f"{'9' * 350}x0", "1x1", "Euler", "DDIM", "Karras", "True", "Latent", "v1.2", '"']
)


@given(st.dictionaries(st.sampled_from(LABELS), VALUES, min_size=3))
def test_any_text_becomes_a_request_or_is_refused(fields: dict[str, str]) -> None:
    text = "a\n" + ", ".join(f"{label}: {value}" for label, value in fields.items())
    ignored_fields(parse_infotext(text))
    try:
        request = request_from_infotext(text)
    except RequestError:
        return
    assert request.task == "text-to-image"


PATTERN = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'


@given(st.text(st.sampled_from('ab7é:,"\\ -/\t!'), max_size=60))
def test_fields_are_what_the_published_pattern_finds(text: str) -> None:
    last = f"{text}, aa: 1, bb: 2, cc: 3"
    expected = dict(re.findall(PATTERN, last))
    fields = dict(parse_infotext(f"x\n{last}").fields)
    assert fields.pop("Clip skip") == "1"
    assert set(fields) == set(expected)
    plain = {k: v for k, v in expected.items() if v[:1] != '"'}
    assert {k: fields[k] for k in plain} == plain


def test_long_lines_take_no_time() -> None:
    for letters in ("a", "a ", "\t", '"', 'aa: "', 'aa: "\\', "a:\\"):
        assert parse_infotext("x\n" + letters * 100_000).prompt
