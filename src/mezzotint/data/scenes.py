"""Scenes: embedded emoji composed on backgrounds, with captions, boxes and maps that are true."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from mezzotint.conditioning.base import Box
from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.chance import Chance
from mezzotint.data.emoji import EmojiData, EmojiDataConfig, Style, find_concept
from mezzotint.data.portraits import well_known
from mezzotint.data.scene_backgrounds import GROUNDS, Ground, Kind, draw_background, paint
from mezzotint.data.scene_layout import (
    RELATIONS,
    Scene,
    SceneObject,
    apart,
    caption_of,
    captions_of,
    is_reserved,
    overlap,
    relation_of,
    reserved_kind,
)
from mezzotint.data.scene_sprites import Sprite, cut_out, lay_over, mark
from mezzotint.errors import ConfigError, DataError
from mezzotint.rng import keyed_generator

__all__ = ["SCENE_CONCEPTS", "ScenesData", "ScenesDataConfig"]

SceneSubset = Literal["scenes-32", "scenes-16", "scenes-held-out-8"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The first lies in the emoji's training split, as does its half, and the last in their validation
# split. No two of a set look alike in either style, and each is one thing with a plain name.
SCENE_CONCEPTS: dict[SceneSubset, tuple[str, ...]] = {
    "scenes-32": _names(
        """
        red-apple banana eggplant carrot watermelon hamburger pizza birthday-cake
        cactus sunflower tulip mushroom penguin frog pig-face tropical-fish elephant butterfly
        automobile bus rocket sailboat house robot guitar key alarm-clock basketball gem-stone
        top-hat teddy-bear soccer-ball
        """
    ),
    "scenes-16": _names(
        """
        red-apple banana eggplant hamburger cactus sunflower mushroom penguin frog butterfly
        automobile sailboat house key basketball gem-stone
        """
    ),
    "scenes-held-out-8": _names("avocado doughnut fox zebra tractor umbrella anchor drum"),
}
_SCENE = 0x5CE  # key of random numbers
_SIZES = 64  # steps from nothing to the whole side: few enough to keep all resized emoji
_TRIES = 60  # places tried for an object
_ATTEMPTS = 8  # sizes tried for a number of objects
_CLEAR = 1.25  # how much further apart the centres of two related objects are along one axis
_MOST = 255  # concepts
_CACHE = 64 * 2**20  # bytes of resized emoji that are kept
_FORMAT = 1  # raised when the same configuration comes to give other scenes


class ScenesDataConfig(Config):
    """Which scenes, and what they are made of.

    Sizes are the longer side of an object, as a share of the picture's side. The concepts
    ``well-known`` are those of `mezzotint.data.portraits.well_known` in the emoji's training split.
    """

    kind: Literal["scenes"] = "scenes"
    resolution: int = Field(default=64, ge=64, le=256, multiple_of=8)
    style: Style = "fluent"
    concepts: SceneSubset | Literal["well-known"] | tuple[str, ...] = "scenes-32"
    split: Literal["train", "validation"] = "train"  # of compositions; see ScenesData
    count: int = Field(default=4096, ge=1)
    seed: int = Field(default=0, ge=0)
    min_objects: int = Field(default=1, ge=1, le=6)
    max_objects: int = Field(default=3, ge=1, le=6)
    min_size: float = Field(default=0.3, ge=0.125, le=0.9)
    max_size: float = Field(default=0.55, ge=0.125, le=0.9)
    max_overlap: float = Field(default=0.1, ge=0, le=0.5)  # of two boxes; share of the smaller
    backgrounds: tuple[Ground, ...] = Field(default=("plain", "gradient", "texture"), min_length=1)
    flip: bool = True  # where it is harmless
    labels: Literal["first"] = "first"  # the class of the first, and largest, object

    @field_validator("concepts", "backgrounds")
    @classmethod
    def _no_repetition(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        twice = [] if isinstance(value, str) else [v for v in value if value.count(v) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for low, high in (("min_objects", "max_objects"), ("min_size", "max_size")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ValueError(f"{low}: expected at most {high}, which is {most}, got {least}")
        number = len(self.concept_names)
        if number > _MOST:
            raise ValueError(
                f"concepts: expected at most {_MOST}, which a map of bytes tells apart,"
                f" got {number}"
            )
        if number < self.max_objects:
            raise ValueError(
                f"concepts: expected at least max_objects, which is {self.max_objects}, since"
                f" none stands twice in a scene; got {number}"
            )
        widest = 1 / (2 - self.max_overlap)
        if self.min_objects > 1 and self.min_size > widest:
            raise ValueError(
                f"min_size: two objects fit beside each other up to {widest:.2f},"
                f" got {self.min_size}; or set min_objects to 1"
            )
        return self

    @property
    def concept_names(self) -> tuple[str, ...]:
        """The concepts as they are written, a subset's one by one."""
        if self.concepts == "well-known":  # but for the emoji's validation split
            return tuple(name for name in well_known() if find_concept(name).split == "train")
        return SCENE_CONCEPTS[self.concepts] if isinstance(self.concepts, str) else self.concepts


class ScenesData:
    """Scenes of emoji as a data set; a scene depends on (seed, split, index) of one configuration.

    The splits differ in compositions. A fixed fifth of all (concept, relation, concept) triples,
    and for each concept one of the five patterned backgrounds, are reserved for validation: no two
    objects of a training scene stand in a reserved relation, and none stands on its reserved
    background. In a validation scene of several objects the two largest stand in a reserved
    relation, and an object alone stands on its reserved background. Where no room is found for as
    many objects as were drawn, there are fewer.

    Args:
        config: Which scenes.

    Raises:
        ConfigError: If the choice leaves nothing to train on, or nothing to hold out.
        DataError: If a concept does not exist.

    Example:
        >>> data = ScenesData(ScenesDataConfig())
        >>> example = data.load(4)
        >>> tuple(example.image.shape), tuple(example.map.shape), len(example.boxes)
        ((3, 64, 64), (64, 64), 2)
        >>> example.caption
        'a watermelon below a robot'
    """

    def __init__(self, config: ScenesDataConfig) -> None:
        self.config = config
        self.concepts = tuple(find_concept(key) for key in config.concept_names)
        self.class_names = tuple(concept.name for concept in self.concepts)
        if len(set(self.class_names)) < len(self.class_names):
            raise ConfigError("concepts: one stands there twice under different names")
        self.faults: list[Fault] = []
        largest = 4 * (config.max_size * config.resolution) ** 2
        self._sprite = functools.lru_cache(maxsize=int(_CACHE / largest))(self._cut_out)
        kinds: list[Kind] = [kind for ground in config.backgrounds for kind in GROUNDS[ground]]
        labels = range(len(self.concepts))
        held = {k: [c for c in labels if reserved_kind(self.class_names[c]) == k] for k in kinds}
        trained = {k: [c for c in labels if c not in held[k]] for k in kinds}
        # which classes may stand on which background; those on which none may are left out
        self._everywhere = {kind: list(labels) for kind in kinds}
        self._held_out = {kind: chosen for kind, chosen in held.items() if chosen}
        self._trained = {kind: chosen for kind, chosen in trained.items() if chosen}
        self._check()

    def __len__(self) -> int:
        return self.config.count

    @property
    def fingerprint(self) -> str:
        """Hash of the emoji's pictures and the configuration."""
        emoji = EmojiDataConfig(names=self.class_names, style=self.config.style)
        content = [_FORMAT, EmojiData(emoji).fingerprint, self.config.to_dict()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one scene; see `mezzotint.data.ImageData.load`.

        A generator chooses how the caption is worded, and nothing else.
        """
        scene = self.scene(index)
        pixels = paint(scene.background, self.config.resolution)
        for thing in scene.objects:
            lay_over(pixels, self._sprite_of(thing), thing.left, thing.top)
        return Example(
            image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            caption=caption_of(scene, generator),
            label=scene.objects[0].box.label,
            name=f"scene-{self.config.split}-{range(len(self))[index]}",
            boxes=scene.boxes,
            map=self._map(scene),
        )

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return what is known of a scene; see `mezzotint.data.ImageData.describe`."""
        scene = self.scene(index)
        return Description(
            caption=caption_of(scene, generator),
            label=scene.objects[0].box.label,
            boxes=scene.boxes,
            map=self._map(scene) if with_map else None,
        )

    def captions_of(self, index: int) -> list[str]:
        """Return every caption of a scene; see `mezzotint.data.base.ListsCaptions`."""
        return captions_of(self.scene(index))

    def scene(self, index: int) -> Scene:
        """Return how a scene is composed.

        Raises:
            IndexError: If there is no such scene.
            DataError: If not even one object could be placed as the split demands.
        """
        config, number = self.config, range(len(self))[index]
        split = int(config.split == "validation")
        chance = Chance(keyed_generator(_SCENE, config.seed, split, number))
        wanted = chance.whole(config.min_objects, config.max_objects)
        for count in range(wanted, 0, -1):
            for _ in range(_ATTEMPTS):
                if scene := self._attempt(count, chance):
                    return scene
        raise DataError(
            f"scene {number} of the split {config.split}: found no room for {wanted} objects; lower"
            " data.min_size or raise data.max_overlap"
        )

    def _check(self) -> None:
        """Raise a ConfigError unless all concepts are trained on, or something is held out."""
        config, names = self.config, self.class_names
        grounds = " and ".join(config.backgrounds)
        if config.split == "train":
            for label, name in enumerate(names):
                if not any(label in chosen for chosen in self._trained.values()):
                    raise ConfigError(
                        f"backgrounds: {name} stands on {grounds} in validation alone, and would"
                        " never be trained on; add plain or texture"
                    )
            return
        if config.min_objects == 1 and not self._held_out:
            raise ConfigError(
                f"backgrounds: nothing that stands alone on {grounds} is held out for validation;"
                " add gradient or texture, or set min_objects to 2"
            )
        triples = ((a, r, b) for a in names for r in RELATIONS for b in names if a != b)
        if config.max_objects > 1 and not any(is_reserved(*triple) for triple in triples):
            raise ConfigError(
                "concepts: no relation between any two of them is held out for validation; name"
                " more of them"
            )

    def _attempt(self, count: int, chance: Chance) -> Scene | None:
        """Draw a scene of so many objects; None if they found no room."""
        config, pools = self.config, self._trained
        if config.split == "validation":
            pools = self._held_out if count == 1 else self._everywhere
        grounds: list[list[Kind]] = [
            [kind for kind in GROUNDS[ground] if kind in pools] for ground in config.backgrounds
        ]
        if not any(grounds):
            return None
        kind = chance.choose(chance.choose([kinds for kinds in grounds if kinds]))
        least, most = (round(_SIZES * share) for share in (config.min_size, config.max_size))
        objects: list[SceneObject] = []
        for step in sorted((chance.whole(least, most) for _ in range(count)), reverse=True):
            size = round(step * config.resolution / _SIZES)
            mirrored = chance.happens(0.5)
            for _ in range(_TRIES):
                box = self._draw_box(chance.choose(pools[kind]), size, chance)
                if self._fits(box, objects):
                    objects.append(self._object(box, size, mirrored))
                    break
            else:
                return None
        return Scene(tuple(objects), draw_background(kind, chance))

    def _draw_box(self, label: int, size: int, chance: Chance) -> Box:
        side, sprite = self.config.resolution, self._sprite(label, size)
        left = chance.whole(0, side - sprite.width)
        top = chance.whole(0, side - sprite.height)
        right, bottom = left + sprite.width, top + sprite.height
        return Box(label, left / side, top / side, right / side, bottom / side)

    def _fits(self, box: Box, objects: Sequence[SceneObject]) -> bool:
        """Whether an object may join those that are there, by its place and by the split."""
        related = len(objects) == 1  # by the caption
        for other in objects:
            if box.label == other.box.label or overlap(box, other.box) > self.config.max_overlap:
                return False
            near, far = sorted(map(abs, apart(other.box, box)))
            if related and far < _CLEAR * near:
                return False
            relation = relation_of(other.box, box)
            reserved = is_reserved(other.concept.name, relation, self.class_names[box.label])
            if reserved if self.config.split == "train" else related and not reserved:
                return False
        return True

    def _object(self, box: Box, size: int, mirrored: bool) -> SceneObject:
        concept, side = self.concepts[box.label], self.config.resolution
        flipped = mirrored and self.config.flip and concept.mirrors
        sprite = self._sprite(box.label, size)
        sprite = sprite.flipped if flipped else sprite
        left, top = round(box.left * side) - sprite.left, round(box.top * side) - sprite.top
        return SceneObject(concept, box, size, flipped, left, top)

    def _cut_out(self, label: int, size: int) -> Sprite:
        return cut_out(self.class_names[label], self.config.style, size)

    def _sprite_of(self, thing: SceneObject) -> Sprite:
        sprite = self._sprite(thing.box.label, thing.size)
        return sprite.flipped if thing.flipped else sprite

    def _map(self, scene: Scene) -> torch.Tensor:
        classes = np.zeros((self.config.resolution, self.config.resolution), np.uint8)
        for thing in scene.objects:
            mark(classes, self._sprite_of(thing), thing.left, thing.top, 1 + thing.box.label)
        return torch.from_numpy(classes)
