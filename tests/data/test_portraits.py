"""Portraits: what they show, what is said of them, and what only validation shows."""

import pytest
import torch

from mezzotint.config import parse
from mezzotint.data import open_data
from mezzotint.data.emoji import emoji_concepts, find_concept
from mezzotint.data.portraits import (
    PortraitsData,
    PortraitsDataConfig,
    is_held_out,
    portrait_caption,
    well_known,
)
from mezzotint.data.scene_backgrounds import COLOURS
from mezzotint.errors import ConfigError, DataError
from mezzotint.rng import keyed_generator

FEW = ("red-apple", "fox", "key", "star", "guitar", "cloud", "bus", "owl")


def data(**changes: object) -> PortraitsData:
    settings = {"kind": "portraits", "concepts": FEW, "count": 400, "resolution": 32, **changes}
    return PortraitsData(PortraitsDataConfig.from_dict(settings))


def combinations(chosen: PortraitsData) -> list[tuple[str, str, bool]]:
    portraits = [chosen.portrait(k) for k in range(len(chosen))]
    return [
        (chosen.class_names[p.label], p.background.colour, p.style == "noto") for p in portraits
    ]


def test_the_well_known_concepts_exist_and_each_word_names_one_of_them() -> None:
    words = [
        word
        for name, others in well_known().items()
        for word in {find_concept(name).caption.lower(), *others}
    ]
    assert len(well_known()) == 256
    assert len(set(words)) == len(words)


def test_a_picture_depends_on_its_index_and_a_generator_chooses_words_alone() -> None:
    first, again = data(), data()
    for index in (0, 7, 399):
        plain = first.load(index)
        told = again.load(index, keyed_generator(1, index))
        assert torch.equal(plain.image, told.image)
        assert plain.label == told.label == index % len(FEW)
        described = again.describe(index, keyed_generator(1, index))
        assert (described.caption, described.label) == (told.caption, told.label)
    captions = {first.describe(0, keyed_generator(1, k)).caption for k in range(30)}
    assert len(captions) > 5


def test_what_is_said_is_true() -> None:
    chosen = data(second_style=0.5)
    for index in range(60):
        portrait = chosen.portrait(index)
        for k in range(3):
            caption = chosen.describe(index, keyed_generator(2, index, k)).caption
            assert caption is not None
            colours = [c for c in ("white", *COLOURS) if f" {c} background" in caption]
            wanted = portrait.background.colour
            assert colours == [wanted] or (wanted == "white" and not colours), caption
            assert ("Noto style" in caption) == (portrait.style == "noto"), caption
    assert portrait_caption("red-apple") == "a red apple"
    assert portrait_caption("fox", "orange") == "a fox on an orange background"


def test_the_background_is_the_colour_that_is_named_and_the_emoji_stands_in_the_middle() -> None:
    chosen = data(max_shift=0.0, white=0.5, styles=["fluent"])
    for index in range(24):
        image, portrait = chosen.load(index).image.float(), chosen.portrait(index)
        shade = torch.tensor(portrait.background.shades[0]).float()
        assert torch.equal(image[:, 0, 0], shade)
        painted = (image - shade[:, None, None]).abs().amax(0) > 40
        rows, columns = painted.nonzero().unbind(1)
        for places in (rows, columns):
            middle = (float(places.min()) + float(places.max()) + 1) / 2
            assert abs(middle - 16) <= 2.5


def test_training_and_validation_share_no_coloured_combination() -> None:
    names = tuple(well_known())[:64]
    told = {"concepts": names, "count": 2000, "second_style": 0.5}
    trained = combinations(data(**told))
    validated = combinations(data(**told, split="validation"))
    assert not any(is_held_out(c, g, second_style=s) for c, g, s in trained)
    assert all(is_held_out(c, g, second_style=s) for c, g, s in validated)
    # but for what is held out, everything is shown: each concept, colour and style
    assert {g for _, g, _ in trained} == {"white", *COLOURS}
    assert {c for c, _, s in trained if not s} == set(names)
    styled = {c for c, _, s in trained if s}
    assert 0.7 * len(names) < len(styled) < len(names)


def test_choices_of_concepts() -> None:
    for choice in ("train", "validation"):
        named = {c.name for c in emoji_concepts() if c.split == choice}
        assert set(data(concepts=choice, count=1).class_names) == named
    assert len(data(concepts="all", count=1).class_names) == len(emoji_concepts())
    assert isinstance(open_data(data().config), PortraitsData)


def test_the_fingerprint_is_of_pictures_and_words() -> None:
    assert data().fingerprint == data().fingerprint
    assert len({data(**c).fingerprint for c in ({}, {"seed": 1}, {"tag_probability": 0.2})}) == 3


def test_mistakes_are_told() -> None:
    with pytest.raises(DataError, match="no emoji is called 'red-aple'; nearest: red"):
        data(concepts=["red-aple"])
    with pytest.raises(ConfigError, match="twice under different names"):
        data(concepts=["fox", "🦊"])
    with pytest.raises(DataError, match="names none"):
        data(concepts=[])
    for wrong, message in (
        ({"styles": ["noto", "noto"]}, "'noto' stands there twice"),
        ({"min_size": 0.9, "max_size": 0.8}, "min_size: expected at most max_size, which is 0.8"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(PortraitsDataConfig, {"kind": "portraits", **wrong}, "data")
