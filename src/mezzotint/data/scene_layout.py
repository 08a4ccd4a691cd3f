"""How a scene is laid out and put into words; which compositions only validation may show."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from mezzotint.conditioning.base import Box
from mezzotint.data.chance import Chance
from mezzotint.data.emoji import Concept
from mezzotint.data.scene_backgrounds import PATTERNED, Background, Kind
from mezzotint.data.wording import with_article
from mezzotint.rng import mix

__all__ = [
    "RELATIONS",
    "Relation",
    "Scene",
    "SceneObject",
    "apart",
    "caption_of",
    "captions_of",
    "is_reserved",
    "overlap",
    "relation_of",
    "reserved_kind",
]

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
_CONVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
_RESERVED = 0x5E7
_SHARE = 5  # one composition of so many is reserved for validation


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One emoji of a scene.

    Attributes:
        concept: What it is.
        box: Tight around the drawn pixels of more than half opacity, also those that a later
            object hides; its label is the concept's class.
        size: The longer side of the box, in pixels, to within two: thin ends fade when resized.
        flipped: Whether it is mirrored.
        left: Column of the picture at which its drawn pixels begin, soft edge included.
        top: Likewise the row.
    """

    concept: Concept
    box: Box
    size: int
    flipped: bool
    left: int
    top: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A composition: objects from the largest to the smallest, later ones over earlier ones."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the objects, in their order."""
        return tuple(thing.box for thing in self.objects)


def relation_of(first: Box, second: Box) -> Relation:
    """Say where the first box lies from the second, along the axis that parts their centres most.

    Example:
        >>> relation_of(Box(0, 0.0, 0.0, 0.4, 0.4), Box(1, 0.6, 0.1, 1.0, 0.5))
        'left of'
    """
    right, down = apart(first, second)
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def apart(first: Box, second: Box) -> tuple[float, float]:
    """Return how far right and how far down the second centre lies from the first, as shares."""
    # as a difference of sums, the converse is exactly the negative
    right = (second.left + second.right) - (first.left + first.right)
    down = (second.top + second.bottom) - (first.top + first.bottom)
    return right / 2, down / 2


@functools.lru_cache(maxsize=2**16)
def is_reserved(first: str, relation: Relation, second: str) -> bool:
    """Whether a relation between two concepts, by their names, is kept for validation.

    The same is true of its converse: "a bus left of a key" says what "a key right of a bus" says.
    """
    if relation in ("right of", "below"):
        first, relation, second = second, _CONVERSE[relation], first
    axis = int(relation == "above")
    return mix(_RESERVED, _number(first), axis, _number(second)) % _SHARE == 0


@functools.cache
def reserved_kind(concept: str) -> Kind:
    """Return the pattern on which a concept, by its name, stands in validation alone.

    It is one of the five patterns; a plain background is nobody's.
    """
    return PATTERNED[mix(_RESERVED, _number(concept)) % len(PATTERNED)]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes have in common, as a share of the smaller one's."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box.right - box.left) * (box.bottom - box.top) for box in (a, b))
    return width * height / min(areas)


def caption_of(scene: Scene, generator: torch.Generator | None = None) -> str:
    """Say what a scene shows; every object is named once.

    Args:
        scene: What is described. Of several objects, the two largest are related.
        generator: Chooses among sentences that are all true: which of the two is named first, and
            whether a single object's background is named, as it is without one.
    """
    if generator is None:
        return _worded(scene, False, True)
    chance = Chance(generator)
    return _worded(scene, chance.happens(0.5), chance.happens(0.5))


def captions_of(scene: Scene) -> list[str]:
    """Return the sentences that `caption_of` chooses among."""
    both = (False, True)
    return sorted({_worded(scene, swapped, grounded) for swapped in both for grounded in both})


def _worded(scene: Scene, swapped: bool, grounded: bool) -> str:
    names = [with_article(thing.concept.caption) for thing in scene.objects]
    if len(names) == 1:
        return f"{names[0]} on {scene.background.caption}" if grounded else names[0]
    first, second = (1, 0) if swapped else (0, 1)
    relation = relation_of(scene.objects[first].box, scene.objects[second].box)
    text = f"{names[first]} {relation} {names[second]}"
    if len(names) == 2:
        return text
    *others, last = names[2:]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{text}, and {listed}"
