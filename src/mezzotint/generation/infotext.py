"""The text that web UIs write into their pictures and read from them: prompt, and how it was drawn.

::

    a red apple
    Negative prompt: leaves
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd-v1-5

In PNG it stands in the text chunk ``parameters``, in JPEG and WebP in EXIF's UserComment. It says
less than a request, so a request that becomes such a text and a request again may lose something.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from mezzotint.diffusion.names import spacing_label, web_ui_label
from mezzotint.diffusion.samplers import get_sampler
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest
from mezzotint.generation.sampling import STRENGTHS

__all__ = [
    "EMPHASIS_LABELS",
    "UPSCALER_LABELS",
    "Infotext",
    "parse_infotext",
    "write_infotext",
]

EMPHASIS_LABELS: Mapping[str, str] = {
    "original": "Original",
    "no_norm": "No norm",
    "ignore": "Ignore",
    "none": "None",
}
UPSCALER_LABELS: Mapping[str, str] = {"latent": "Latent", "lanczos": "Lanczos"}

# the published pattern of a field in pieces, \s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$);
# as a whole it takes a time that grows with the square of the length
_NOT_OF_LABEL = re.compile(r"[^\w \-/]")
_VALUE = re.compile(r'\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_NEGATIVE = "Negative prompt:"
_LEAST_FIELDS = 3  # that make a last line one of parameters, and not of the prompt
_SHORT_MODEL_HASH, _SHORT_ADAPTER_HASH = 10, 12  # hexadecimal digits
_WEIGHTS_SUFFIX = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$")


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
    found = _find_fields(last)
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


def _find_fields(line: str) -> list[tuple[str, str]]:
    """Find labels, which end in colons, and their values, quoted as they may be."""
    found: list[tuple[str, str]] = []
    start = 0
    while (colon := line.find(":", start)) >= 0:
        label = _NOT_OF_LABEL.split(line[start:colon])[-1].lstrip(" -/")
        start = colon + 1
        if len(label) > 1:
            value = _VALUE.match(line, start)
            assert value is not None, "an unquoted value may be empty"
            found.append((label, value[1]))
            start = value.end()
    return found


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text == text.strip() and not any(c in text for c in ',:"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def write_infotext(request: GenerationRequest, size: tuple[int, int] | None = None) -> str:
    """Say how a picture was drawn.

    Adapters are named in the prompt, ``<lora:name:0.8>``, as the web UIs know it. What they know
    nothing of is left out.

    Args:
        request: What drew it, from a prompt. Which of its images this is, and so its seed, stands
            in ``resolved``.
        size: Width and height in pixels; by default those that were asked for. Of a picture that
            was drawn in two passes, those of the first.

    Raises:
        RequestError: If the picture was not drawn from a prompt.
    """
    if request.prompt is None:
        raise RequestError(f"the task {request.task!r} has no prompt, and so no infotext")
    if size is None and request.width and request.height:
        size = request.width, request.height
    prompt = _with_adapters(request)
    resolved = request.resolved
    fields: dict[str, object | None] = {
        **_sampling_fields(request),
        "Size": f"{size[0]}x{size[1]}" if size else None,
        "Model hash": resolved.model_hash[:_SHORT_MODEL_HASH] if resolved else None,
        "Model": request.model,
        **_further_fields(request),
        **_adapter_hashes(request, prompt),
        "Version": f"mezzotint {resolved.mezzotint_version}" if resolved else None,
    }
    told = ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)
    negative = f"\n{_NEGATIVE} {request.negative_prompt}" if request.negative_prompt else ""
    return f"{prompt}{negative}\n{told}"


def _sampling_fields(request: GenerationRequest) -> dict[str, object | None]:
    index = request.resolved.image_index if request.resolved else 0
    # what varies from image to image is the one seed or the other
    varied = request.variation_seed is not None
    # said even where it is the sampler's default, because the web UIs' defaults are others
    spacing = request.spacing or get_sampler(request.sampler).default_spacing
    return {
        "Steps": request.steps,
        "Sampler": web_ui_label(request.sampler),
        "Schedule type": spacing_label(spacing),
        "CFG scale": _number(request.guidance_scale),
        "Seed": request.seed + (0 if varied else index),
    }


def _further_fields(request: GenerationRequest) -> dict[str, object | None]:
    index = request.resolved.image_index if request.resolved else 0
    fields: dict[str, object | None] = {}
    if request.variation_seed is not None and request.variation_strength:
        fields["Variation seed"] = request.variation_seed + index
        fields["Variation seed strength"] = _number(request.variation_strength)
    begun = request.image is not None
    if begun:
        strength = request.strength or STRENGTHS.get(request.task, 1.0)
        fields["Denoising strength"] = _number(strength)
    if request.clip_skip > 1:
        fields["Clip skip"] = request.clip_skip
    fields["RNG"] = "CPU"  # where noise comes from; nothing said means a GPU
    if request.tiling:
        fields["Tiling"] = "True"
    if request.token_merging:
        fields["Token merging ratio"] = _number(request.token_merging)
    if request.eta is not None:
        fields["Eta DDIM" if request.sampler == "ddim" else "Eta"] = _number(request.eta)
    if request.emphasis != "original":
        fields["Emphasis"] = EMPHASIS_LABELS[request.emphasis]
    if request.task in ("inpainting", "outpainting"):
        fields["Mask blur"] = 0  # tells from image-to-image
    # the web UIs know no second pass of a picture that begins from another
    if request.high_res is not None and not begun:
        high_res = request.high_res
        made = max(1, int((high_res.steps or request.steps) * high_res.strength))
        fields["Denoising strength"] = _number(high_res.strength)
        fields["Hires upscale"] = _number(high_res.scale)
        fields["Hires steps"] = made  # the web UIs count those that are made
        fields["Hires upscaler"] = UPSCALER_LABELS[high_res.upscaler]
    return fields


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def _spoken(name: str) -> str:
    """The name of an adapter as it can stand in a prompt: that of its file."""
    return re.sub(r"[:<>,]", "", _WEIGHTS_SUFFIX.sub("", PurePath(name).name))


def _with_adapters(request: GenerationRequest) -> str:
    asked = [f"<lora:{_spoken(use.name)}:{_number(use.weight)}>" for use in request.adapters]
    return " ".join([request.prompt or "", *asked]).lstrip() if asked else request.prompt or ""


def _adapter_hashes(request: GenerationRequest, prompt: str) -> dict[str, object | None]:
    """The sums of what acted: of LoRA adapters, which the prompt names as such, and the rest."""
    sums = request.resolved.adapters if request.resolved else {}
    found: dict[str, list[str]] = {"Lora hashes": [], "TI hashes": []}
    for name, sha256 in sums.items():
        spoken = _spoken(name)
        kind = "Lora hashes" if f"<lora:{spoken}" in prompt else "TI hashes"
        found[kind].append(f"{spoken}: {sha256[:_SHORT_ADAPTER_HASH]}")
    return {kind: ", ".join(items) or None for kind, items in found.items()}
