"""The text that web UIs write into their pictures and read from them: prompt, and how it was drawn.

::

    a red apple
    Negative prompt: leaves
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd-v1-5

In PNG it stands in the text chunk ``parameters``.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.diffusion.names import SPACING_LABELS, WEB_UI, find_sampler
from mezzotint.errors import RequestError, nearest
from mezzotint.generation.request import GenerationRequest

__all__ = ["Infotext", "parse_infotext", "request_from_infotext", "write_infotext"]

_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_NEGATIVE = "Negative prompt:"
_LONGEST = 1 << 14  # letters of a line of parameters; a pattern takes its time over longer ones
_LEAST_FIELDS = 3  # that make a last line one of parameters, and not of the prompt
_SAMPLER_LABELS = {name: label for label, name in WEB_UI.items()}
_SPACING_NAMES = {name: label for label, name in SPACING_LABELS.items()}


@dataclass(frozen=True)
class Infotext:
    """What stands in such a text.

    Attributes:
        prompt: Its lines, without the blanks around each.
        negative_prompt: Likewise; empty if there is none.
        fields: The parameters by name, as text. A size stands under ``Size-1`` (width) and
            ``Size-2`` (height); ``Clip skip`` is ``1`` if nothing is said of it.
    """

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]


def parse_infotext(text: str) -> Infotext:
    """Parse by the web UIs' own rule; any text is one, if need be a prompt alone."""
    *lines, last = text.strip().split("\n")
    found = _FIELD.findall(last) if len(last) <= _LONGEST else []
    if len(found) < _LEAST_FIELDS:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    told = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            told = negative
            line = line.removeprefix(_NEGATIVE).strip()
        # blank lines at the beginning are left out
        if line or told:
            told.append(line)
    fields: dict[str, str] = {}
    for name, quoted in found:
        value = _unquoted(quoted)
        if size := _SIZE.fullmatch(value):
            fields[f"{name}-1"], fields[f"{name}-2"] = size.groups()
        else:
            fields[name] = value
    fields.setdefault("Clip skip", "1")
    return Infotext("\n".join(prompt), "\n".join(negative), fields)


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def write_infotext(request: GenerationRequest, size: tuple[int, int] | None = None) -> str:
    """Say how a picture was drawn.

    Args:
        request: What drew it; of the task ``text-to-image``. Which of its images this is, and so
            its seed, stands in ``resolved``.
        size: Width and height in pixels; by default those that were asked for.

    Raises:
        RequestError: If the picture was not drawn from a prompt.
    """
    if request.prompt is None:
        raise RequestError(f"the task {request.task!r} has no prompt, and so no infotext")
    spacing = _SPACING_NAMES.get(request.spacing or "")
    resolved = request.resolved
    if size is None and request.width and request.height:
        size = request.width, request.height
    fields: dict[str, object | None] = {
        "Steps": request.steps,
        "Sampler": _SAMPLER_LABELS.get(request.sampler, request.sampler),
        "Schedule type": spacing,
        "CFG scale": str(request.guidance_scale).removesuffix(".0"),
        "Seed": request.seed + (resolved.image_index if resolved else 0),
        "Size": f"{size[0]}x{size[1]}" if size else None,
        "Model hash": resolved.model_hash[:10] if resolved else None,
        "Model": request.model,
        "Version": f"mezzotint {resolved.mezzotint_version}" if resolved else None,
    }
    told = ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)
    negative = f"\n{_NEGATIVE} {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{negative}\n{told}"


def request_from_infotext(text: str) -> GenerationRequest:
    """Turn such a text into a request.

    What the text says beyond prompt, sampler, steps, guidance, seed, size and model is not in it:
    `parse_infotext` has all of it. Where it names no schedule type, or ``Automatic``, the noise
    levels are our sampler's default and not the web UI's.

    Raises:
        RequestError: If a value is no number where one belongs, or there is no such sampler.
    """
    told = parse_infotext(text)
    fields = told.fields
    request: dict[str, Any] = {"task": "text-to-image", "prompt": told.prompt}
    if told.negative_prompt:
        request["negative_prompt"] = told.negative_prompt
    numbers: dict[str, tuple[str, type[int] | type[float]]] = {
        "Steps": ("steps", int),
        "CFG scale": ("guidance_scale", float),
        "Seed": ("seed", int),
        "Size-1": ("width", int),
        "Size-2": ("height", int),
    }
    for label, (name, kind) in numbers.items():
        if label in fields:
            try:
                request[name] = kind(fields[label])
            except ValueError:
                raise RequestError(f"{label}: expected a number, got {fields[label]!r}") from None
    if "Sampler" in fields:
        known = find_sampler(fields["Sampler"])
        request["sampler"] = known.sampler if known else fields["Sampler"]
        request["spacing"] = known.spacing if known else None
    label = fields.get("Schedule type", "Automatic")
    if label != "Automatic":
        if label not in SPACING_LABELS:
            raise RequestError(
                f"Schedule type: unknown {label!r}; {nearest(label, SPACING_LABELS)}"
            )
        request["spacing"] = SPACING_LABELS[label]
    if "Model" in fields:
        request["model"] = fields["Model"]
    return GenerationRequest.from_dict(request, "infotext")
