"""What a user typed, as the fields of a request."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.generation.inputs import InputPictures

__all__ = [
    "adapter_uses",
    "boxes",
    "check",
    "guides_of",
    "interval",
    "of_picture",
    "reuse_of",
    "second_pass",
    "sides",
    "size_of",
]


def of_picture(path: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return how a picture was drawn, by Mezzotint or a web UI; what is ignored is told.

    Args:
        path: The picture, if there is one.
        given: What the user says besides. Its ``image`` and ``mask`` are the inputs that a web UI's
            text does not hold; with another sampler or image, what went with the old one is left
            out.
    """
    import sys

    from mezzotint.errors import RequestError
    from mezzotint.generation.generate import nth
    from mezzotint.generation.infotext import parse_infotext
    from mezzotint.generation.infotext_request import ignored_fields
    from mezzotint.generation.metadata import read_any_request, read_infotext

    if path is None:
        return {}
    request = read_any_request(
        path,
        image=given.get("image"),
        mask=given.get("mask"),
        sampler=given.get("sampler"),
    )
    if request.resolved is None:
        try:
            ignored = ignored_fields(parse_infotext(read_infotext(path)))
        except RequestError:
            ignored = {}
        for label, value in ignored.items():
            print(f"note: {path}: ignored: {label}: {value}", file=sys.stderr)
    else:
        request = nth(request, request.resolved.image_index)
    told = request.to_dict()
    left = {"format_version", "resolved", "model", "task", "num_images"}
    if "sampler" in given:
        left |= {"spacing", "eta"}
    if "image" in given or "padding" in given:
        left |= {"width", "height", "mask", "padding"}
    return {k: v for k, v in told.items() if k not in left and v is not None}


def check(fields: dict[str, Any]) -> None:
    """Find what no model could draw before a model is loaded, which may take long."""
    from mezzotint.generation.request import GenerationRequest

    if "padding" in fields:
        task = "outpainting"
    elif "mask" in fields:
        task = "inpainting"
    elif "image" in fields:
        task = "super-resolution" if fields.get("back_projection") else "image-to-image"
    elif "semantic_map" in fields:
        task = "map-to-image"
    elif "layout" in fields:
        task = "layout-to-image"
    elif "prompt" in fields:
        task = "text-to-image"
    else:
        task = "class-to-image" if "class_label" in fields else "unconditional"
    GenerationRequest.from_dict({"task": task, **fields})


def adapter_uses(texts: list[str] | None) -> tuple[dict[str, Any], ...] | None:
    """Adapters from ``NAME`` or ``NAME:WEIGHT``, where a name may be a path with a colon."""
    found: list[dict[str, Any]] = []
    for text in texts or ():
        name, colon, weight = text.rpartition(":")
        try:
            found.append({"name": name, "weight": float(weight)} if colon else {"name": text})
        except ValueError:
            found.append({"name": text})
    return tuple(found) or None


def guides_of(
    texts: list[str] | None, pictures: "InputPictures"
) -> tuple[dict[str, Any], ...] | None:
    """Guides from ``KIND:WHAT`` or ``KIND:WHAT:SCALE``, where a file's name may have a colon."""
    from mezzotint.errors import RequestError, nearest

    found: list[dict[str, Any]] = []
    for text in texts or ():
        kind, _, what = text.partition(":")
        if kind not in ("low-res", "colour", "known-pixels"):
            raise RequestError(
                f"--guide {text!r}: {nearest(kind, ('low-res', 'colour', 'known-pixels'))}"
            )
        fields: dict[str, Any] = {"kind": kind}
        before, colon, scale = what.rpartition(":")
        if colon:
            with contextlib.suppress(ValueError):
                fields["scale"], what = float(scale), before
        if kind == "colour":
            fields["colour"] = what
        elif kind == "low-res":
            fields["image"] = pictures.add(what)
        else:
            image, comma, mask = what.rpartition(",")
            if not comma:
                raise RequestError(f"--guide {text!r}: expected known-pixels:PICTURE,MASK[:SCALE]")
            fields |= {"image": pictures.add(image), "mask": pictures.add(mask)}
        found.append(fields)
    return tuple(found) or None


def interval(text: str | None) -> tuple[float, float] | None:
    """Return two noise levels from ``0.2,5``."""
    from mezzotint.errors import RequestError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"--guidance-interval {text!r}: expected two noise levels, as in 0.2,5"
        ) from None
    return low, high


def reuse_of(text: str | None) -> dict[str, int] | None:
    """Return the reuse of features from ``3`` or ``3:2``."""
    from mezzotint.errors import RequestError

    if text is None:
        return None
    interval, colon, blocks = text.partition(":")
    try:
        fields = {"interval": int(interval)}
        return fields | {"blocks": int(blocks)} if colon else fields
    except ValueError:
        raise RequestError(
            f"--feature-reuse {text!r}: expected every how many steps, as in 3, or with the blocks"
            " that every step computes, as in 3:2"
        ) from None


def sides(text: str | None) -> tuple[int, ...] | None:
    """Pixels left, above, right and below from ``64`` or ``8,0,8,0``."""
    from mezzotint.errors import RequestError

    if text is None:
        return None
    try:
        sides = tuple(int(part) for part in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 4):
        raise RequestError(
            f"--padding {text!r}: expected pixels for all sides, as in 64, or left,top,right,bottom"
        )
    return sides if len(sides) == 4 else sides * 4


def second_pass(
    scale: float | None, strength: float | None, steps: int | None, upscaler: str | None
) -> dict[str, Any] | None:
    """Return the second pass, if one was asked for."""
    from mezzotint.errors import RequestError

    told = {"scale": scale, "strength": strength, "steps": steps, "upscaler": upscaler}
    given = {name: value for name, value in told.items() if value is not None}
    if given and scale is None:
        raise RequestError("what goes with --high-res is for it alone; give that too")
    return given or None


def boxes(path: Path | None) -> tuple[Any, ...] | None:
    """Return the layout that stands in a JSON file."""
    import json

    from mezzotint.errors import RequestError

    if path is None:
        return None
    try:
        boxes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(boxes, list):
        raise RequestError(f"{path}: expected a list of {{label, box}}")
    return tuple(boxes)


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from ``64`` or ``64x48``."""
    from mezzotint.errors import RequestError

    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height if cross else width)
    except ValueError:
        raise RequestError(f"--size {text!r}: expected pixels, as in 64 or 64x48") from None
