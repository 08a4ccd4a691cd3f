"""From the text that web UIs write into their pictures to a request."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mezzotint.diffusion.names import (
    AUTOMATIC_SPACINGS,
    SPACING_LABELS,
    find_sampler,
    find_spacing,
)
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError, nearest
from mezzotint.generation.infotext import (
    EMPHASIS_LABELS,
    UPSCALER_LABELS,
    Infotext,
    parse_infotext,
)
from mezzotint.generation.request import GenerationRequest, InputImage
from mezzotint.nn.token_merging import MOST_MERGED

__all__ = ["ignored_fields", "request_from_infotext"]

_EMPHASES = {label: name for name, label in EMPHASIS_LABELS.items()}
# where they name no upscaler, web UIs resize with Lanczos
_UPSCALERS = {label: name for name, label in UPSCALER_LABELS.items()} | {"None": "lanczos"}
# fields that say of a picture that a part of another one was kept, and how we keep it
_KEPT: Mapping[str, str] = {
    "Inpaint area": "Whole picture",
    "Mask blur": "0",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
}
# fields that a request is made from
_READ = frozenset(
    {
        *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size-1", "Size-2", "Model"),
        *("Variation seed", "Variation seed strength", "Denoising strength", "Clip skip"),
        *("Tiling", "Emphasis", "Hires upscale", "Hires steps", "Hires upscaler"),
        *("Hires resize-1", "Hires resize-2", "First pass size-1", "First pass size-2"),
        "Token merging ratio",
    }
)
# fields that change nothing of what is drawn
_REMARKS = frozenset(
    {"Hashes", "Init image hash", "Lora hashes", "Model hash", "TI hashes", "User", "Version"}
)
_OF_SAMPLER = frozenset({"Sampler", "Schedule type", "Eta", "Eta DDIM"})
# k-diffusion's samplers of the web UIs have had spacings of their own since version 1.9
_VERSION = re.compile(r"v(\d+)\.(\d+)")
_OWN_SPACINGS_SINCE = (1, 9)
_MOST_STEPS = 1_000_000
_LARGEST = 1 << 64  # that any field means something with


def request_from_infotext(
    text: str,
    *,
    image: InputImage | None = None,
    mask: InputImage | None = None,
    sampler: str | None = None,
    source: str = "infotext",
) -> GenerationRequest:
    """Turn such a text into a request.

    ``<lora:name:0.8>`` stays in the prompt, where the pipeline finds it. Where no schedule type is
    named, or ``Automatic``, the noise levels are those that the web UIs take for the sampler. The
    seed -1, which means any, leaves the seed at its default. Noise is not the web UIs', so the
    picture will be another of the same kind; `ignored_fields` tells what else is lost.

    Args:
        text: The text.
        image: The picture that it was made from. The text of a picture that was made from another
            one does not have it.
        mask: Of that picture, what was drawn anew.
        sampler: In place of the one that is named, with that one's spacing and fresh noise.
        source: What error messages call the origin of the text.

    Raises:
        RequestError: If a value is no number where one belongs, there is no such sampler, or an
            input picture is missing.
    """
    told = parse_infotext(text)
    if sampler is not None:
        others = {k: v for k, v in told.fields.items() if k not in _OF_SAMPLER}
        told = replace(told, fields=others | {"Sampler": sampler})
    try:
        data = _request_fields(told, image, mask)
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from None
    return GenerationRequest.from_dict(data, source)


def ignored_fields(told: Infotext) -> dict[str, str]:
    """Return the fields that change a picture and that a request from the text does not have."""
    harmless = {**_KEPT, "RNG": "CPU"}
    read = _READ | {_eta_label(told.fields)}
    return {
        label: value
        for label, value in told.fields.items()
        if label not in read | _REMARKS and harmless.get(label) != value
    }


def _request_fields(
    told: Infotext, image: InputImage | None, mask: InputImage | None
) -> dict[str, Any]:
    fields = told.fields
    data: dict[str, Any] = {"prompt": told.prompt, "negative_prompt": told.negative_prompt or None}
    data["steps"] = _whole(fields, "Steps")
    data["guidance_scale"] = _real(fields, "CFG scale")
    data["seed"] = _seed(fields, "Seed")
    data["model"] = fields.get("Model")
    if strength := _real(fields, "Variation seed strength"):
        data["variation_seed"] = _seed(fields, "Variation seed")
        data["variation_strength"] = strength
    # some count it as -2 from the end, and some say 0 for the default
    data["clip_skip"] = max(1, abs(_whole(fields, "Clip skip") or 1))
    data["tiling"] = _choice(fields, "Tiling", {"True": True, "False": False})
    if ratio := _real(fields, "Token merging ratio"):
        data["token_merging"] = min(ratio, MOST_MERGED)  # more is asked for, and no more is done
    data["emphasis"] = _choice(fields, "Emphasis", _EMPHASES)
    data["sampler"] = _sampler(fields)
    data["spacing"] = _spacing(fields, data["sampler"])
    data["eta"] = _real(fields, _eta_label(fields))
    data |= _canvas(fields)
    data |= _inputs(fields, image, mask, second_pass=data["high_res"] is not None)
    return {name: value for name, value in data.items() if value is not None}


def _real(fields: Mapping[str, str], label: str) -> float | None:
    if label not in fields:
        return None
    try:
        return float(fields[label])
    except ValueError:
        raise RequestError(f"{label}: expected a number, got {fields[label]!r}") from None


def _whole(fields: Mapping[str, str], label: str) -> int | None:
    number = _real(fields, label)
    if number is None:
        return None
    if not number.is_integer() or abs(number) >= _LARGEST:
        raise RequestError(f"{label}: expected a whole number, got {fields[label]!r}")
    try:
        return int(fields[label])  # of which a float would lose the last digits
    except ValueError:  # such as 20.0
        return int(number)


def _seed(fields: Mapping[str, str], label: str) -> int | None:
    seed = _whole(fields, label)
    return None if seed == -1 else seed


def _choice(fields: Mapping[str, str], label: str, choices: Mapping[str, Any]) -> Any:
    if label not in fields:
        return None
    for choice, value in choices.items():
        if choice.casefold() == fields[label].casefold():
            return value
    raise RequestError(f"{label}: unknown {fields[label]!r}; {nearest(fields[label], choices)}")


def _sampler(fields: Mapping[str, str]) -> str | None:
    named = fields.get("Sampler")
    known = find_sampler(named) if named is not None else None
    return known.sampler if known else named


def _spacing(fields: Mapping[str, str], sampler: str | None) -> str | None:
    label = fields.get("Schedule type", "Automatic")
    if label.casefold() != "automatic":
        if spacing := find_spacing(label):
            return spacing
        raise RequestError(f"Schedule type: unknown {label!r}; {nearest(label, SPACING_LABELS)}")
    known = find_sampler(fields.get("Sampler", ""))
    if known is not None and known.spacing is not None:
        return known.spacing
    automatic = AUTOMATIC_SPACINGS.get(sampler or "")
    version = _VERSION.search(fields.get("Version", ""))
    if version and tuple(map(int, version.groups())) < _OWN_SPACINGS_SINCE:
        return "linspace" if automatic in ("karras", "exponential") else automatic
    return automatic


def _eta_label(fields: Mapping[str, str]) -> str:
    """The field that says how much fresh noise the sampler adds; "" if it is none that adds any."""
    sampler = SAMPLERS.get(_sampler(fields) or "")
    if sampler is None or "eta" not in sampler.options:
        return ""
    return "Eta DDIM" if sampler.name == "ddim" else "Eta"


def _size(fields: Mapping[str, str], label: str) -> tuple[int, int] | None:
    width, height = _whole(fields, f"{label}-1"), _whole(fields, f"{label}-2")
    if width is not None and height is not None:
        return width, height
    if label in fields:
        raise RequestError(f"{label}: expected pixels, as in 512x768, got {fields[label]!r}")
    return None


def _canvas(fields: Mapping[str, str]) -> dict[str, Any]:
    """The size, and the second pass at a larger one, which web UIs have said in three ways."""
    size, first, last = (
        _size(fields, label) for label in ("Size", "First pass size", "Hires resize")
    )
    if first is not None:
        size, last = first, size
    if first == (0, 0):
        raise RequestError("First pass size: 0x0 left it to the web UI; write the size it took")
    if last == (0, 0):
        last = None
    width, height = size or (None, None)
    data: dict[str, Any] = {"width": width, "height": height, "high_res": None}
    scale = _real(fields, "Hires upscale")
    if last is not None:
        scale = _scale(size, last)
    if scale is None:
        return data
    high_res = {
        "scale": scale,
        "strength": _real(fields, "Denoising strength"),
        "upscaler": _choice(fields, "Hires upscaler", _UPSCALERS),
        "steps": _second_steps(fields),
    }
    return data | {"high_res": {k: v for k, v in high_res.items() if v is not None}}


def _scale(size: tuple[int, int] | None, last: tuple[int, int]) -> float:
    """How many times larger the second pass is; a side of 0 follows from the other."""
    if size is None or 0 in size:
        raise RequestError("Hires resize: needs the Size of the first pass")
    scale = max(to / side for side, to in zip(size, last, strict=True))
    for side, to in zip(size, last, strict=True):
        if to and abs(side * scale - to) >= 1:
            raise RequestError(
                f"Hires resize: {last[0]}x{last[1]} has another shape than the first pass,"
                f" {size[0]}x{size[1]}, and cropping between the passes is not done here"
            )
    return scale


def _second_steps(fields: Mapping[str, str]) -> int | None:
    """Of how many steps the last ones are those that the web UI's second pass makes."""
    steps, strength = _whole(fields, "Steps"), _real(fields, "Denoising strength")
    made = _whole(fields, "Hires steps") or steps
    if made is None or strength is None or not made / _MOST_STEPS < strength <= 1:
        return made
    total = math.ceil(made / strength)
    while int(total * strength) < made:  # rounded down by a hair
        total += 1
    return None if total == steps else total


def _inputs(
    fields: Mapping[str, str],
    image: InputImage | None,
    mask: InputImage | None,
    *,
    second_pass: bool,
) -> dict[str, Any]:
    """The task, and what is drawn anew of the picture that it begins from."""
    strength = None if second_pass else _real(fields, "Denoising strength")
    kept = sorted(set(_KEPT) & set(fields))
    if image is None and (strength or kept or "Init image hash" in fields):
        label = "Denoising strength" if strength else next(iter(kept), "Init image hash")
        raise RequestError(
            f"{label}: this picture was made from another one, which its text does not have; give"
            " that one as image"
        )
    if image is None:
        return {"task": "text-to-image"}
    if mask is None and kept:
        raise RequestError(f"{kept[0]}: only a part was drawn anew; give its mask as well")
    task = "image-to-image" if mask is None else "inpainting"
    return {"task": task, "image": image, "mask": mask, "strength": strength or None}
