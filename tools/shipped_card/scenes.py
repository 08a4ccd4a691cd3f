"""How well a shipped model draws in each box what its words say, and nothing elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mezzotint.conditioning.base import Box, Region
from mezzotint.data.portraits import well_known
from mezzotint.data.scene_layout import Scene, caption_of
from mezzotint.data.scene_sprites import cut_out, lay_over
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.errors import ConfigError
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.judges import crop_to_box
from mezzotint.evaluation.metrics import retrieval
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.request import LayoutBox
from mezzotint.training.conditions import Told
from mezzotint.training.previews import condition_picture
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe
from tools.shipped_card.scoring import Card, draw, features, pixels

__all__ = ["card", "inside", "right"]

_CANDIDATES = 64
_COLUMNS, _ROWS = 8, 2
_FAR = 24  # of 255, in any colour: what is no background
_SHOWN = 128  # pixels of a picture on the sheet, at least
_EDGE = 1 / 32  # of the side, around a box: what may still belong to it


def card(pipeline: Pipeline, folder: Path, stage: str, most: int) -> Card:
    """Measure a model that draws in boxes, and draw some; see `tools.shipped_card.text.card`."""
    recipe = load_recipe(folder / f"{stage}.yaml")
    if not isinstance(recipe, DiffusionRecipe) or not isinstance(recipe.data, ScenesDataConfig):
        raise ConfigError(f"{folder / stage}.yaml: expected a model of scenes")
    held_out = {"split": "validation", "backgrounds": ("plain",), "min_objects": 2, "count": most}
    config = recipe.data.model_copy(update=held_out)
    trained = ScenesData(config)
    strange = tuple(name for name in well_known() if name not in trained.class_names)
    groups = {"": trained}
    if len(strange) >= config.max_objects:
        groups[", emoji that no scene of training had"] = ScenesData(
            config.model_copy(update={"concepts": strange})
        )
    numbers: dict[str, Any] = {"pictures": most}
    rows: list[tuple[str, str]] = []
    sheet = None
    for words, data in groups.items():
        scenes = [data.scene(k) for k in range(len(data))]
        fields = [_fields(data, scene) for scene in scenes]
        drawn = [pixels(image) for image in draw(pipeline, fields)]
        told = {
            "right": right(data, scenes, drawn),
            "inside": inside(data, scenes, drawn),
        }
        key, among = "strange_" if words else "", min(_CANDIDATES, len(data.concepts))
        numbers |= {f"{key}{name}": value for name, value in told.items()}
        rows += [
            (
                f"right concept among {among} in its box ({most} scenes){words}",
                f"{told['right']:.1%}",
            ),
            (f"share of what is drawn that is inside the boxes{words}", f"{told['inside']:.1%}"),
        ]
        sheet = sheet or _sheet(data, scenes, drawn)
    assert sheet is not None
    limits = [
        f"Limits: up to {config.max_objects} emoji, at {config.resolution} pixels, each",
        f"{config.min_size:.0%} to {config.max_size:.0%} as large as the picture.",
    ]
    shown = "What each box is to show, and what was drawn, of compositions that training had not:"
    return Card(numbers, rows, limits, shown, sheet)


def _words(data: ScenesData, box: Box) -> str:
    return data.class_names[box.label].replace("-", " ")


def _fields(data: ScenesData, scene: Scene) -> Mapping[str, Any]:
    layout = [
        LayoutBox(label=_words(data, box), box=(box.left, box.top, box.right, box.bottom))
        for box in scene.boxes
    ]
    return {"prompt": caption_of(scene), "layout": layout}


def right(data: ScenesData, scenes: Sequence[Scene], drawn: Sequence[Tensor]) -> float:
    """The share of boxes whose content is nearest to what its words say, on the drawn ground."""
    found = nearest = 0
    side = data.config.resolution
    for scene, image in zip(scenes, drawn, strict=True):
        ground = _ground(image, scene)
        for box in scene.boxes:
            others = [k for k in range(len(data.concepts)) if k != box.label]
            chosen = [others[k] for k in evenly(min(_CANDIDATES - 1, len(others)), len(others))]
            crops = [
                crop_to_box(_alone(data, ground, replace(box, label=label)), box, side)
                for label in (box.label, *chosen)
            ]
            seen = features([crop_to_box(image, box, side)])
            nearest += int(retrieval(seen, features(crops))[0] == 0)
            found += 1
    return nearest / found


def _boxes(scene: Scene, side: int) -> Tensor:
    """``(side, side)`` bool: what may belong to a box."""
    edge, boxes = round(_EDGE * side), torch.zeros(side, side, dtype=torch.bool)
    for box in scene.boxes:
        rows = slice(max(0, int(box.top * side) - edge), int(box.bottom * side) + edge)
        columns = slice(max(0, int(box.left * side) - edge), int(box.right * side) + edge)
        boxes[rows, columns] = True
    return boxes


def _ground(image: Tensor, scene: Scene) -> Tensor:
    """``(3,)``: the colour of most that is outside the boxes, which captions need not say."""
    return image[:, ~_boxes(scene, image.shape[-1])].median(dim=1).values


def _alone(data: ScenesData, ground: Tensor, box: Box) -> Tensor:
    """A concept by itself in the middle of a box, on a colour."""
    side = data.config.resolution
    picture = ground.expand(side, side, 3).numpy().copy()
    across, down = (box.left + box.right) / 2 * side, (box.top + box.bottom) / 2 * side
    size = round(max(box.right - box.left, box.bottom - box.top) * side)
    sprite = cut_out(data.class_names[box.label], data.config.style, size)
    left = round(across - sprite.width / 2) - sprite.left
    lay_over(picture, sprite, left, round(down - sprite.height / 2) - sprite.top)
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def inside(data: ScenesData, scenes: Sequence[Scene], drawn: Sequence[Tensor]) -> float:
    """The share of all that is no background that lies in boxes."""
    within = whole = 0.0
    side = data.config.resolution
    for scene, image in zip(scenes, drawn, strict=True):
        ground = _ground(image, scene)[:, None, None]
        there = (image.int() - ground.int()).abs().amax(0) > _FAR
        within += float((there & _boxes(scene, side)).sum())
        whole += float(there.sum())
    return within / max(whole, 1.0)


def _sheet(data: ScenesData, scenes: Sequence[Scene], drawn: Sequence[Tensor]) -> Image.Image:
    """Rows of layouts, each above a row of what was drawn."""
    images: list[Image.Image] = []
    labels: list[str] = []
    side = max(_SHOWN, data.config.resolution)
    chosen = evenly(min(_COLUMNS * _ROWS, len(scenes)), len(scenes))
    for start in range(0, len(chosen), _COLUMNS):
        part = chosen[start : start + _COLUMNS]
        for k in part:
            regions = tuple(
                Region(_words(data, b), b.left, b.top, b.right, b.bottom) for b in scenes[k].boxes
            )
            layout = condition_picture(Told(regions=regions), (side, side))
            assert layout is not None
            images.append(layout)
        for k in part:
            picture = Image.fromarray(drawn[k].permute(1, 2, 0).numpy())
            images.append(picture.resize((side, side), Image.Resampling.BICUBIC))
        labels += [""] * len(part) + [caption_of(scenes[k]) for k in part]
    return image_grid(images, columns=min(_COLUMNS, len(chosen)), labels=labels)
