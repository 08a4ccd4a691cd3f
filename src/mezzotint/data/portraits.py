"""Portraits: one embedded emoji each, on a colour, in a style, under one of many true captions.

What the shipped model is trained on. A scene shows where things are; a portrait shows what a thing
is, and its caption says all of it that a word could change.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.chance import Chance
from mezzotint.data.emoji import (
    Concept,
    EmojiData,
    EmojiDataConfig,
    Style,
    emoji_concepts,
    find_concept,
)
from mezzotint.data.scene_backgrounds import (
    COLOURS,
    Background,
    draw_background,
    paint,
    plain_background,
)
from mezzotint.data.scene_sprites import Sprite, cut_out, lay_over
from mezzotint.data.wording import DEFAULT_TEMPLATES, fill_template, unsaid
from mezzotint.errors import ConfigError, DataError
from mezzotint.rng import keyed_generator, mix

__all__ = [
    "Portrait",
    "PortraitsData",
    "PortraitsDataConfig",
    "is_held_out",
    "portrait_caption",
    "well_known",
]

Choice = Literal["well-known", "all", "train", "validation"]

_STYLES: dict[Style, str] = {"fluent": "in Fluent style", "noto": "in Noto style"}
_PORTRAIT, _RESERVED = 0x907, 0x907E  # keys of random numbers
_STYLE_SHARE = 8  # one concept of so many shows its second style in validation alone
_SAID = 0.25  # of what need not be said: a white background, the first style
_CACHE = 64 * 2**20  # bytes of resized emoji that are kept
_FORMAT = 1  # raised when the same configuration comes to give other pictures


class PortraitsDataConfig(Config):
    """Which emoji, and how they are shown and called.

    Attributes:
        resolution: Pixels of a side.
        concepts: ``well-known`` are those of ``assets/emoji/well-known.txt``, ``train`` and
            ``validation`` the emoji's own splits, ``all`` both; or names.
        split: Of combinations; see `PortraitsData`.
        count: How many pictures; each concept has as many of them.
        styles: The first need not be said; the second always is.
        second_style: Share of the second style.
        white: Share of the white background, which need not be said; the colours always are.
        min_size: Least longer side of the emoji, as a share of the picture's.
        max_size: Largest.
        max_shift: Furthest from the middle, along both axes, as a share of the picture's side.
        flip: Mirror half of them, where it is harmless.
        word_probability: With which a well-known concept is called by another word, if it has one.
        tag_probability: With which a tag follows the name.
    """

    kind: Literal["portraits"] = "portraits"
    resolution: int = Field(default=64, ge=16, le=128)
    concepts: Choice | tuple[str, ...] = "well-known"
    split: Literal["train", "validation"] = "train"
    count: int = Field(default=16384, ge=1)
    seed: int = Field(default=0, ge=0)
    styles: tuple[Style, ...] = Field(default=("fluent", "noto"), min_length=1, max_length=2)
    second_style: float = Field(default=0.2, ge=0, le=1)
    white: float = Field(default=0.4, ge=0, le=1)
    min_size: float = Field(default=0.82, ge=0.25, le=1)
    max_size: float = Field(default=0.92, ge=0.25, le=1)
    max_shift: float = Field(default=0.03, ge=0, le=0.25)
    flip: bool = True
    word_probability: float = Field(default=0.4, ge=0, le=1)
    tag_probability: float = Field(default=0.1, ge=0, le=1)
    labels: Literal["concept"] = "concept"

    @field_validator("styles")
    @classmethod
    def _no_repetition(cls, value: tuple[Style, ...]) -> tuple[Style, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value[0]!r} stands there twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(
                f"min_size: expected at most max_size, which is {self.max_size}, got"
                f" {self.min_size}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Portrait:
    """All that decides a picture.

    Attributes:
        label: Index of the concept.
        style: In which it is drawn.
        background: On which it stands.
        size: The emoji's longer side in pixels, to within two.
        flipped: Whether it is mirrored.
        shift: Of its middle to the right and down, in pixels.
    """

    label: int
    style: Style
    background: Background
    size: int
    flipped: bool
    shift: tuple[int, int]


@functools.cache
def well_known() -> dict[str, tuple[str, ...]]:
    """Return the well-known concepts, by name, and further words for each.

    Example:
        >>> len(well_known()), well_known()["dog-face"]
        (256, ('dog', 'puppy'))
    """
    file = resources.files("mezzotint").joinpath("assets", "emoji", "well-known.txt")
    found: dict[str, tuple[str, ...]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, words = line.partition(" | ")
            found[name] = tuple(words.split(", ")) if words else ()
    return found


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")


def _held_out_colour(concept: str) -> str:
    return list(COLOURS)[mix(_RESERVED, _number(concept)) % len(COLOURS)]


def _holds_out_style(concept: str) -> bool:
    return mix(_RESERVED, _number(concept, "style")) % _STYLE_SHARE == 0


def is_held_out(concept: str, colour: str, *, second_style: bool) -> bool:
    """Whether a combination is kept for validation.

    Of each concept one colour is, whatever the style; and of every eighth the second style.

    Args:
        concept: By name.
        colour: Of the background; white is never held out.
        second_style: Whether it is drawn in the data's second style.
    """
    return colour == _held_out_colour(concept) or (second_style and _holds_out_style(concept))


def portrait_caption(concept: Concept | str, colour: str = "white", style: Style = "fluent") -> str:
    """Say what a picture shows in the words of the training captions, briefly.

    Args:
        concept: Or its name.
        colour: Of the background.
        style: In which it is drawn; Fluent's is not said.

    Example:
        >>> portrait_caption("red-apple", "blue", "noto")
        'a red apple in Noto style on a blue background'
    """
    found = find_concept(concept) if isinstance(concept, str) else concept
    named = fill_template("a {caption}", found.caption)
    styled = f"{named} {_STYLES[style]}" if style != "fluent" else named
    return styled if colour == "white" else f"{styled} on {plain_background(colour).caption}"


class PortraitsData:
    """Portraits of emoji as a data set; a picture depends on (seed, split, index) alone.

    The splits differ in combinations: of each concept, one of the seven colours is reserved for
    validation, and of every eighth the second style. Training shows no reserved combination, and
    validation nothing else. A generator chooses how the caption is worded, and nothing else.

    Args:
        config: Which.

    Raises:
        ConfigError: If a concept stands there twice.
        DataError: If a concept does not exist.

    Example:
        >>> data = PortraitsData(PortraitsDataConfig(concepts=("red-apple", "fox")))
        >>> example = data.load(6)
        >>> tuple(example.image.shape), example.caption
        ((3, 64, 64), 'a red apple on a purple background')
    """

    def __init__(self, config: PortraitsDataConfig) -> None:
        self.config = config
        self.concepts = _choose(config.concepts)
        self.class_names: tuple[str, ...] = tuple(concept.name for concept in self.concepts)
        if len(set(self.class_names)) < len(self.class_names):
            raise ConfigError("concepts: one stands there twice under different names")
        self.faults: list[Fault] = []
        largest = 4 * (config.max_size * config.resolution) ** 2
        self._sprite = functools.lru_cache(maxsize=int(_CACHE / largest))(self._cut_out)
        self._portraits: dict[int, Portrait] = {}
        self._held_styles = [_holds_out_style(name) for name in self.class_names]

    def __len__(self) -> int:
        return self.config.count

    @property
    def fingerprint(self) -> str:
        """Hash of the emoji's pictures and the configuration."""
        pictures = [
            EmojiData(EmojiDataConfig(names=self.class_names, style=style)).fingerprint
            for style in self.config.styles
        ]
        words = [well_known().get(name, ()) for name in self.class_names]
        content = [_FORMAT, pictures, words, self.config.to_dict()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one portrait; see `mezzotint.data.ImageData.load`."""
        portrait = self.portrait(index)
        return Example(
            image=self.picture(portrait),
            caption=self._caption(portrait, generator),
            label=portrait.label,
            name=f"portrait-{self.config.split}-{range(len(self))[index]}",
        )

    def picture(self, portrait: Portrait) -> torch.Tensor:
        """Return ``(3, H, W)`` uint8 of a portrait, whether or not the data hold it."""
        side = self.config.resolution
        pixels = paint(portrait.background, side)
        sprite = self._sprite(portrait.label, portrait.style, portrait.size)
        sprite = sprite.flipped if portrait.flipped else sprite
        right, down = portrait.shift
        left = (side - sprite.width) // 2 - sprite.left + right
        lay_over(pixels, sprite, left, (side - sprite.height) // 2 - sprite.top + down)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def plain(self, label: int, colour: str = "white", style: Style = "fluent") -> Portrait:
        """Return the portrait in the middle, of middle size, on the named colour itself.

        Args:
            label: Index of the concept.
            colour: Of the background.
            style: In which it is drawn.
        """
        config = self.config
        size = round((config.min_size + config.max_size) / 2 * config.resolution)
        ground = plain_background(colour)
        return Portrait(label, style, ground, size, flipped=False, shift=(0, 0))

    def held_out_colour(self, label: int) -> str:
        """Return the colour on which a concept stands in validation alone."""
        return _held_out_colour(self.class_names[label])

    def holds_out_style(self, label: int) -> bool:
        """Whether a concept is shown in the second style in validation alone."""
        return self._held_styles[label]

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and label; see `mezzotint.data.ImageData.describe`."""
        portrait = self.portrait(index)
        return Description(self._caption(portrait, generator), portrait.label)

    def portrait(self, index: int) -> Portrait:
        """Return how a picture is composed.

        Raises:
            IndexError: If there is no such picture.
        """
        number = range(len(self))[index]
        if number not in self._portraits:
            split = int(self.config.split == "validation")
            chance = Chance(keyed_generator(_PORTRAIT, self.config.seed, split, number))
            self._portraits[number] = self._compose(number % len(self.concepts), chance)
        return self._portraits[number]

    def _compose(self, label: int, chance: Chance) -> Portrait:
        config, name = self.config, self.class_names[label]
        held_colour = _held_out_colour(name)
        second = len(config.styles) > 1 and chance.happens(config.second_style)
        white, free = chance.happens(config.white), self._held_styles[label]
        if config.split == "train":
            second = second and not free
            colours = [colour for colour in COLOURS if colour != held_colour]
        else:
            white = white and free and second
            colours = list(COLOURS) if free and second else [held_colour]
        ground = draw_background("plain", chance, colours)
        size = round(chance.uniform(config.min_size, config.max_size) * config.resolution)
        reach = config.max_shift * config.resolution
        right, down = (round(chance.uniform(-reach, reach)) for _ in range(2))
        mirrored = chance.happens(0.5) and config.flip and self.concepts[label].mirrors
        style = config.styles[int(second)]
        ground = plain_background("white") if white else ground
        return Portrait(label, style, ground, size, mirrored, (right, down))

    def _caption(self, portrait: Portrait, generator: torch.Generator | None) -> str:
        config, concept = self.config, self.concepts[portrait.label]
        chance = None if generator is None else Chance(generator)

        def happens(probability: float) -> bool:
            return chance is not None and chance.happens(probability)

        name, tag = concept.caption, ""
        template = "a {caption}"
        if chance is not None:
            words = well_known().get(concept.name, ())
            if happens(config.word_probability) and words:
                name = chance.choose(words)
            template = chance.choose(DEFAULT_TEMPLATES)
            tags = unsaid(concept.tags, name)
            if happens(config.tag_probability) and tags:
                tag = f", {chance.choose(tags)},"
        said = [fill_template(template, name) + tag]
        if portrait.style != config.styles[0] or happens(_SAID):
            said.append(_STYLES[portrait.style])
        if portrait.background.colour != "white" or happens(_SAID):
            said.append(f"on {portrait.background.caption}")
        return " ".join(said).rstrip(",")

    def _cut_out(self, label: int, style: Style, size: int) -> Sprite:
        return cut_out(self.class_names[label], style, size)


def _choose(chosen: Choice | Sequence[str]) -> tuple[Concept, ...]:
    if chosen == "well-known":
        return tuple(find_concept(name) for name in well_known())
    if isinstance(chosen, str):
        return tuple(c for c in emoji_concepts() if chosen in ("all", c.split))
    if not chosen:
        raise DataError("concepts: names none; name one, or well-known")
    return tuple(find_concept(key) for key in chosen)
