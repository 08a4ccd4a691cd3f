"""The embedded emoji: 1,590 concepts in two styles, with captions, tags and groups.

The files in ``assets/emoji`` are made by ``tools/build_emoji.py`` and read with Pillow alone.
"""

import difflib
import functools
import gzip
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator

from mezzotint.config import Config
from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.wording import DEFAULT_TEMPLATES, check_template, fill_template, unsaid
from mezzotint.errors import ConfigError, DataError, nearest

__all__ = [
    "SUBSETS",
    "Concept",
    "EmojiData",
    "EmojiDataConfig",
    "emoji_concepts",
    "emoji_image",
    "find_concept",
]

Style = Literal["fluent", "noto"]
Subset = Literal["demo-48", "demo-candidates-16"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The first lies in the training split and the second in the validation split, so whatever trains
# on either the demo's emoji or the whole split has never seen the candidates.
SUBSETS: dict[str, tuple[str, ...]] = {
    "demo-48": _names(
        """
        red-apple banana strawberry watermelon pineapple grapes lemon carrot
        pizza hamburger ice-cream birthday-cake cactus sunflower mushroom evergreen-tree
        dog-face cat-face panda frog penguin tropical-fish butterfly octopus lady-beetle
        automobile bus rocket airplane sailboat helicopter
        sun cloud rainbow snowman crescent-moon
        guitar key alarm-clock light-bulb balloon wrapped-gift crown soccer-ball
        grinning-face ghost robot jack-o-lantern
        """
    ),
    "demo-candidates-16": _names(
        """
        tomato avocado doughnut sushi fox zebra snail fire-engine tractor anchor
        umbrella ringed-planet volcano drum red-heart nauseated-face
        """
    ),
}

# Mirroring must not turn a picture into another one, nor writing round.
_MIRROR_GROUPS = {"animals-nature", "food-drink", "smileys-emotion"}
_MIRROR_SUBGROUPS = {"transport-ground", "transport-water", "transport-air", "sport", "clothing"}
_NO_MIRROR_SUBGROUPS = {"emotion", "face-sleepy"}  # speech balloons, a hundred points, ZZZ
_NO_MIRROR_WORDS = {"left", "right", "leftwards", "rightwards", "facing", "sign", "stop"}


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji: what it is called and where it belongs."""

    name: str
    character: str
    code_points: str
    caption: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    split: Literal["train", "validation"]
    position: int  # in the index

    @property
    def mirrors(self) -> bool:
        """Whether the mirrored picture still shows the same."""
        harmless = self.group in _MIRROR_GROUPS or self.subgroup in _MIRROR_SUBGROUPS
        words = set(self.caption.lower().replace(":", " ").replace("-", " ").split())
        return (
            harmless and self.subgroup not in _NO_MIRROR_SUBGROUPS and not words & _NO_MIRROR_WORDS
        )


def _asset(name: str) -> bytes:
    try:
        return resources.files("mezzotint").joinpath("assets", "emoji", name).read_bytes()
    except OSError as error:
        raise DataError(f"the emoji file {name} cannot be read; reinstall: {error}") from None


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads(gzip.decompress(_asset("index.json.gz")))


@functools.cache
def _pictures(style: Style) -> bytes:
    entry = _index()["styles"][style]
    packed = _asset(entry["file"])
    if hashlib.sha256(packed).hexdigest() != entry["sha256"]:
        raise DataError(f"the emoji file {entry['file']} is damaged; reinstall Mezzotint")
    return packed


@functools.cache
def emoji_concepts() -> tuple[Concept, ...]:
    """Every concept, in the order of the emoji keyboard.

    Example:
        >>> len(emoji_concepts())
        1590
    """
    return tuple(
        Concept(
            name=entry["name"],
            character=entry["character"],
            code_points=entry["code_points"],
            caption=entry["caption"],
            tags=tuple(entry["tags"]),
            group=entry["group"],
            subgroup=entry["subgroup"],
            split=entry["split"],
            position=position,
        )
        for position, entry in enumerate(_index()["concepts"])
    )


@functools.cache
def _by_key() -> dict[str, Concept]:
    concepts = emoji_concepts()
    keys = {c.caption.lower(): c for c in concepts}
    return keys | {c.character: c for c in concepts} | {c.name: c for c in concepts}


def find_concept(key: str) -> Concept:
    """Return a concept by its name, caption or character.

    Raises:
        DataError: Naming the nearest ones, if there is none.

    Example:
        >>> find_concept("red apple") is find_concept("red-apple")
        True
    """
    keys = _by_key()
    concept = keys.get(key) or keys.get(key.strip().lower())
    if concept is None:
        close = difflib.get_close_matches(key.lower(), keys, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise DataError(f"no emoji is called {key!r}{hint}")
    return concept


def _decode(concept: Concept, style: Style) -> Image.Image:
    """The stored picture, 128 x 128, with premultiplied alpha ("RGBa"), in which pixels mix."""
    offset, length = _index()["concepts"][concept.position]["pictures"][style]
    packed = _pictures(style)[offset : offset + length]
    return Image.open(io.BytesIO(packed)).convert("RGBA").convert("RGBa")


def emoji_image(concept: Concept | str, size: int = 128, style: Style = "fluent") -> Image.Image:
    """Return an emoji on nothing, for composing scenes.

    Args:
        concept: A `Concept`, or its name, caption or character.
        size: Pixels of a side; 128 is what is stored, others are resampled.
        style: ``"fluent"`` or ``"noto"``.

    Returns:
        An RGBA picture with straight alpha.

    Raises:
        DataError: If there is no such concept.
    """
    found = find_concept(concept) if isinstance(concept, str) else concept
    picture = _decode(found, style)
    if size != picture.width:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return picture.convert("RGBA")


class EmojiDataConfig(Config):
    """Which emoji, and how they are seen."""

    kind: Literal["emoji"] = "emoji"
    resolution: int = Field(default=64, gt=0)
    style: Style = "fluent"
    # which concepts; `names` and `subset` name them whatever their split
    split: Literal["train", "validation", "all"] = "train"
    subset: Subset | None = None
    names: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    background: Literal["white", "grey"] | tuple[int, int, int] = "white"
    # augmentation: at most this much of the side, of the size, and in degrees
    augment: bool = True
    max_shift: float = Field(default=0.03, ge=0, le=0.25)
    max_scale: float = Field(default=0.05, ge=0, le=0.5)
    max_rotation: float = Field(default=0.0, ge=0, le=45)
    flip: bool = False  # where it is harmless
    caption_templates: tuple[str, ...] = Field(default=DEFAULT_TEMPLATES, min_length=1)
    tag_probability: float = Field(default=0.1, ge=0, le=1)
    labels: Literal["group", "subgroup", "concept"] = "group"

    @field_validator("caption_templates")
    @classmethod
    def _templates(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            check_template(template)
        return templates

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str | tuple[int, int, int]) -> str | tuple[int, int, int]:
        if not isinstance(value, str) and not all(0 <= part <= 255 for part in value):
            raise ValueError(f"expected three numbers from 0 to 255, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.subset is not None and self.names is not None:
            raise ValueError("subset and names both say which emoji; keep one")
        return self

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as red, green and blue, 0 to 255."""
        if isinstance(self.background, tuple):
            return self.background
        return {"white": (255, 255, 255), "grey": (128, 128, 128)}[self.background]


class EmojiData:
    """Emoji as a data set; pictures are decoded once and kept.

    Args:
        config: Which emoji, and how they are seen.

    Raises:
        ConfigError: If a group does not exist, or nothing is left of the choice.
        DataError: If a name does not exist.

    Example:
        >>> data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=32))
        >>> len(data), data.load(0).caption, tuple(data.load(0).image.shape)
        (48, 'red apple', (3, 32, 32))
    """

    def __init__(self, config: EmojiDataConfig) -> None:
        self.config = config
        self.concepts = _choose(config)
        self.faults: list[Fault] = []
        self.class_names: tuple[str, ...] = _class_names(config, self.concepts)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [numbers[_class_of(c, config)] for c in self.concepts]
        self._decoded: dict[int, Image.Image] = {}
        self._plain: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures, the concepts and the configuration."""
        entry = _index()["styles"][self.config.style]
        content = [entry["sha256"], [c.name for c in self.concepts], self.config.to_dict()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return one emoji; see `mezzotint.data.ImageData.load`.

        Without a generator it stands in the middle under its plain caption. With one it is
        shifted, scaled, rotated and mirrored as configured, and a template and perhaps a tag are
        chosen.
        """
        concept = self.concepts[index]
        label = self._labels[index]
        if generator is None:
            return Example(self._plain_view(index), concept.caption, label, concept.name)
        # every draw is made whether it is used or not, so that options don't disturb each other
        chance: list[float] = torch.rand(9, generator=generator).tolist()
        image = self._augmented(index, chance[:5]) if self.config.augment else None
        caption = self._caption(concept, chance[5:])
        return Example(
            self._plain_view(index) if image is None else image, caption, label, concept.name
        )

    def describe(
        self, index: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and label; see `mezzotint.data.ImageData.describe`."""
        concept = self.concepts[index]
        if generator is None:
            return Description(concept.caption, self._labels[index])
        chance: list[float] = torch.rand(4, generator=generator).tolist()
        return Description(self._caption(concept, chance), self._labels[index])

    def captions_of(self, index: int) -> list[str]:
        """Return every caption of an emoji; see `mezzotint.data.base.ListsCaptions`."""
        concept, config = self.concepts[index], self.config
        plain = [fill_template(each, concept.caption) for each in config.caption_templates]
        tags = unsaid(concept.tags, concept.caption) if config.tag_probability else []
        return [concept.caption, *plain, *(f"{text}, {tag}" for text in plain for tag in tags)]

    def _picture(self, index: int) -> Image.Image:
        if index not in self._decoded:
            self._decoded[index] = _decode(self.concepts[index], self.config.style)
        return self._decoded[index]

    def _plain_view(self, index: int) -> torch.Tensor:
        if index not in self._plain:
            side = self.config.resolution
            view = self._picture(index).resize((side, side), Image.Resampling.LANCZOS)
            self._plain[index] = _on_background(view, self.config.background_rgb)
        return self._plain[index].clone()

    def _augmented(self, index: int, chance: Sequence[float]) -> torch.Tensor:
        config, picture = self.config, self._picture(index)
        scale, right, down, angle = (2 * draw - 1 for draw in chance[:4])  # -1 to 1
        if config.flip and chance[4] < 0.5 and self.concepts[index].mirrors:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if config.max_rotation:
            picture = picture.rotate(angle * config.max_rotation, Image.Resampling.BICUBIC)
        # a box of the padded picture becomes the view: one antialiased step shifts and scales
        side = picture.width
        pad = math.ceil(side * ((0.5 + config.max_shift) / (1 - config.max_scale) - 0.5))
        padded = Image.new("RGBa", (side + 2 * pad, side + 2 * pad))
        padded.paste(picture, (pad, pad))
        seen = side / (1 + scale * config.max_scale)
        left, top = (
            pad + (side - seen) / 2 - move * config.max_shift * seen for move in (right, down)
        )
        view = padded.resize(
            (config.resolution, config.resolution),
            Image.Resampling.LANCZOS,
            box=(left, top, left + seen, top + seen),
        )
        return _on_background(view, config.background_rgb)

    def _caption(self, concept: Concept, chance: Sequence[float]) -> str:
        templates = self.config.caption_templates
        text = fill_template(templates[int(chance[0] * len(templates))], concept.caption)
        tags = unsaid(concept.tags, concept.caption)
        if tags and chance[1] < self.config.tag_probability:
            text = f"{text}, {tags[int(chance[2] * len(tags))]}"
        return text


def _on_background(view: Image.Image, rgb: tuple[int, int, int]) -> torch.Tensor:
    """Composite premultiplied alpha onto one colour: ``(3, H, W)`` uint8."""
    pixels = np.asarray(view).astype(np.uint16)
    alpha = pixels[..., 3:]
    # Lanczos may overshoot, and premultiplied colour would then exceed its alpha
    colour = np.minimum(pixels[..., :3], alpha)
    behind = ((255 - alpha) * np.asarray(rgb, np.uint16) + 127) // 255
    mixed = (colour + behind).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(mixed.transpose(2, 0, 1)))


def _choose(config: EmojiDataConfig) -> tuple[Concept, ...]:
    named = SUBSETS[config.subset] if config.subset else config.names
    concepts = emoji_concepts() if named is None else tuple(find_concept(key) for key in named)
    if named is None and config.split != "all":
        concepts = tuple(c for c in concepts if c.split == config.split)
    if config.groups is not None:
        known = {c.group for c in emoji_concepts()}
        for group in config.groups:
            if group not in known:
                raise ConfigError(f"groups: unknown group {group!r}; {nearest(group, known)}")
        concepts = tuple(c for c in concepts if c.group in config.groups)
    if not concepts:
        raise ConfigError("names, groups and split leave no emoji; widen one of them")
    return concepts


def _class_of(concept: Concept, config: EmojiDataConfig) -> str:
    return {"group": concept.group, "subgroup": concept.subgroup, "concept": concept.name}[
        config.labels
    ]


def _class_names(config: EmojiDataConfig, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """The groups of the whole set, so that a choice or a split doesn't renumber them."""
    members = concepts if config.labels == "concept" else emoji_concepts()
    return tuple(dict.fromkeys(_class_of(c, config) for c in members))
