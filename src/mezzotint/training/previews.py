"""Examples of a data set as requests, with pictures of what they say."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mezzotint.conditioning.base import Box, Region
from mezzotint.evaluation.grids import image_grid
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.request import LayoutBox
from mezzotint.generation.sampling import to_images
from mezzotint.rng import keyed_generator
from mezzotint.training.conditions import ConditionMaker, Told
from mezzotint.training.orders import spread

__all__ = [
    "Preview",
    "condition_picture",
    "make_previews",
    "map_colours",
    "preview_sheet",
    "request_fields",
]

_COLUMNS = 8
_GOLDEN = 0.618034  # of a turn between the hues of neighbouring classes, which are then far apart
_DRAWN_ANEW = (255, 0, 255)


@dataclass(frozen=True, eq=False)
class Preview:
    """An example as a condition.

    Attributes:
        told: What the model is told.
        real: ``(3, H, W)`` uint8, the example itself.
        label: A line of text for under it.
    """

    told: Told
    real: Tensor
    label: str


def make_previews(conditions: ConditionMaker, count: int, seed: int) -> list[Preview]:
    """Take examples evenly from a data set, because a folder's first images are of one class.

    Args:
        conditions: Makes what they tell.
        count: How many; fewer if the data are.
        seed: Keys captions, degradations and masks.
    """
    data = conditions.data
    previews: list[Preview] = []
    for index in spread(data, count):
        example = data.load(index)
        told = conditions.of_example(example, keyed_generator(seed, 0x5EE4, index))
        label = told.caption or ""
        if told.label is not None and data.class_names:
            label = data.class_names[told.label]
        previews.append(Preview(told, example.image, label))
    return previews


def request_fields(told: Told, pictures: InputPictures) -> dict[str, Any]:
    """Return the fields of a `GenerationRequest` that ask for the same.

    Args:
        told: What the model is told.
        pictures: Takes in the pictures that the request names.
    """
    fields: dict[str, Any] = {}
    if told.caption is not None:
        fields["prompt"] = told.caption
    if told.label is not None:
        fields["class_label"] = told.label
    if told.boxes is not None:
        fields["layout"] = [
            LayoutBox(label=box.label, box=(box.left, box.top, box.right, box.bottom))
            for box in told.boxes
        ]
    if told.regions is not None:
        fields["layout"] = [LayoutBox(label=each.words, box=each.box) for each in told.regions]
    if told.map is not None:
        fields["semantic_map"] = pictures.add(Image.fromarray(told.map.numpy()))
    if told.low_res is not None:
        fields["image"] = pictures.add(to_images(told.low_res[None])[0])
    if told.image is not None and told.mask is not None:
        fields["image"] = pictures.add(to_images(told.image[None])[0])
        grey = (told.mask[0].numpy() * 255).astype(np.uint8)
        fields["mask"] = pictures.add(Image.fromarray(grey))
    return fields


def map_colours(classes: int) -> np.ndarray:
    """Return a colour for each class of a map, ``(classes, 3)`` uint8; class 0 is white."""
    colours = [(1.0, 1.0, 1.0)]
    colours += [
        colorsys.hsv_to_rgb(k * _GOLDEN % 1.0, 0.55 + 0.4 * (k % 2), 0.9 - 0.3 * (k // 2 % 2))
        for k in range(classes - 1)
    ]
    return (np.array(colours) * 255).round().astype(np.uint8)


def condition_picture(
    told: Told, size: tuple[int, int], class_names: Sequence[str] | None = None
) -> Image.Image | None:
    """Return a picture of what a model is told: a layout, a map, a small or a masked picture.

    Args:
        told: What it is told.
        size: Width and height in pixels.
        class_names: Names of a layout's classes.

    Returns:
        None for what only words can say.
    """
    if told.map is not None:
        coloured = map_colours(256)[told.map.numpy()]
        return Image.fromarray(coloured).resize(size, Image.Resampling.NEAREST)
    if told.low_res is not None:
        return to_images(told.low_res[None])[0].resize(size, Image.Resampling.NEAREST)
    if told.image is not None and told.mask is not None:
        pixels = np.array(to_images(told.image[None])[0])
        pixels[told.mask[0].numpy() >= 0.5] = _DRAWN_ANEW
        return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    if told.boxes is not None:
        named = [class_names[b.label] if class_names else str(b.label) for b in told.boxes]
        return _boxes_picture(told.boxes, named, [b.label for b in told.boxes], size)
    if told.regions is not None:
        words = [each.words for each in told.regions]
        return _boxes_picture(told.regions, words, range(len(words)), size)
    return None


def _boxes_picture(
    boxes: Sequence[Box | Region], names: Sequence[str], hues: Sequence[int], size: tuple[int, int]
) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(8, size[1] // 12))
    colours = map_colours(256)
    for box, name, hue in zip(boxes, names, hues, strict=True):
        colour = tuple(int(part) for part in colours[1 + hue % 255])
        left, right = (round(x * (size[0] - 1)) for x in (box.left, box.right))
        top, bottom = (round(y * (size[1] - 1)) for y in (box.top, box.bottom))
        draw.rectangle((left, top, right, bottom), outline=colour, width=max(1, size[0] // 64))
        draw.text((left + 2, top + 1), name.replace("-", " "), fill=colour, font=font)
    return picture


def preview_sheet(previews: Sequence[Preview], drawn: Sequence[Image.Image]) -> Image.Image:
    """Lay out what was drawn, each under the picture of its condition if it has one.

    Args:
        previews: The conditions.
        drawn: What a model drew of them, in the same order.
    """
    size = drawn[0].size
    images: list[Image.Image] = []
    labels: list[str] = []
    for start in range(0, len(drawn), _COLUMNS):
        part = previews[start : start + _COLUMNS]
        shown = [condition_picture(preview.told, size) for preview in part]
        missing = _COLUMNS - len(part) if start else 0  # so that the next row begins anew
        if any(shown):
            blank = Image.new("RGB", size, "white")
            images += [picture or blank for picture in shown] + [blank] * missing
            labels += [""] * (len(part) + missing)
        images += drawn[start : start + _COLUMNS]
        labels += [preview.label for preview in part]
    columns = min(_COLUMNS, len(drawn))
    return image_grid(images, columns=columns, labels=labels)
