import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch

from mezzotint.conditioning.base import Box
from mezzotint.data import ScenesData, ScenesDataConfig, open_data
from mezzotint.data.chance import Chance
from mezzotint.data.emoji import emoji_image, find_concept
from mezzotint.data.scene_backgrounds import PATTERNED, Kind, draw_background, paint
from mezzotint.data.scene_layout import RELATIONS, Relation, Scene, is_reserved, reserved_kind
from mezzotint.data.scenes import SCENE_CONCEPTS
from mezzotint.data.wording import with_article
from mezzotint.errors import ConfigError, DataError
from mezzotint.rng import keyed_generator

MANY = range(150)


def scenes(**fields: object) -> ScenesData:
    return ScenesData(ScenesDataConfig.from_dict(fields))


@pytest.fixture(scope="module")
def train() -> ScenesData:
    return scenes()


@pytest.fixture(scope="module")
def validation() -> ScenesData:
    return scenes(split="validation")


def relation(a: Box, b: Box) -> Relation:
    """By the definition, from the boxes alone."""
    ax, ay, bx, by = a.left + a.right, a.top + a.bottom, b.left + b.right, b.top + b.bottom
    if abs(bx - ax) >= abs(by - ay):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def drawn(data: ScenesData, scene: Scene) -> tuple[list[np.ndarray], np.ndarray]:
    """What Pillow would draw: each object's alpha on the whole picture, and the picture."""
    side = data.config.resolution
    picture = paint(scene.background, side).astype(np.float64)
    alphas: list[np.ndarray] = []
    for thing in scene.objects:
        stored = emoji_image(thing.concept, style=data.config.style)
        left, top, right, bottom = stored.getchannel("A").point(lambda v: 255 * (v > 127)).getbbox()
        size = round(128 * thing.size / max(right - left, bottom - top))
        view = np.asarray(emoji_image(thing.concept, size, data.config.style))
        if thing.flipped:
            view = view[:, ::-1]
        rows, columns = view[..., 3].any(1).nonzero()[0], view[..., 3].any(0).nonzero()[0]
        view = view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        padded = np.zeros((3 * side, 3 * side, 4))
        padded[side + thing.top :, side + thing.left :][: view.shape[0], : view.shape[1]] = view
        whole = padded[side : 2 * side, side : 2 * side]
        alpha = whole[..., 3:] / 255
        picture = whole[..., :3] * alpha + picture * (1 - alpha)
        alphas.append(alpha[..., 0])
    return alphas, picture


def test_the_concepts_are_known_and_those_held_out_are_the_emojis_own() -> None:
    seen, unseen = (SCENE_CONCEPTS[key] for key in ("scenes-32", "scenes-held-out-8"))
    assert (len(set(seen)), len(set(unseen))) == (32, 8)
    assert {find_concept(name).split for name in seen} == {"train"}
    assert {find_concept(name).split for name in unseen} == {"validation"}
    captions = [find_concept(name).caption for name in seen + unseen]
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", c.replace("-", " ")) for c in captions)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("resolution", [64, 72])
def test_a_scene_depends_on_its_index_alone(split: str, resolution: int) -> None:
    once, again = (scenes(split=split, resolution=resolution) for _ in range(2))
    expected = {k: once.load(k) for k in range(20)}
    torch.manual_seed(7)
    np.random.seed(7)
    for k in reversed(range(20)):
        found = again.load(k, keyed_generator(k))
        assert again.scene(k) == once.scene(k)
        assert torch.equal(found.image, expected[k].image)
        assert found.map is not None and torch.equal(found.map, expected[k].map)
        assert (found.boxes, found.label) == (expected[k].boxes, expected[k].label)
        assert again.load(k).caption == expected[k].caption


def test_seed_split_and_index_give_other_scenes(train: ScenesData, validation: ScenesData) -> None:
    others = (train, validation, scenes(seed=1))
    found = [tuple(data.scene(k).boxes) for data in others for k in range(30)]
    assert len(set(found)) == 90
    assert len({data.fingerprint for data in others}) == 3
    assert scenes().fingerprint == train.fingerprint


def test_an_index_outside_is_refused() -> None:
    data = scenes(count=3)
    assert len(data) == 3 and data.load(2).name == "scene-train-2"
    with pytest.raises(IndexError):
        data.load(3)


def test_describe_says_what_load_shows(train: ScenesData) -> None:
    for k in range(20):
        example = train.load(k, keyed_generator(k))
        known = train.describe(k, keyed_generator(k), with_map=True)
        assert (known.caption, known.label) == (example.caption, example.label)
        assert known.boxes == example.boxes
        assert known.map is not None and torch.equal(known.map, example.map)
        assert train.describe(k).map is None


@pytest.mark.parametrize("resolution", [64, 72, 128])
@pytest.mark.parametrize("style", ["fluent", "noto"])
def test_boxes_maps_and_pixels_are_what_is_drawn(resolution: int, style: str) -> None:
    """Against each object drawn anew, alone, by Pillow on a straight canvas."""
    data = scenes(resolution=resolution, style=style, max_objects=4, max_overlap=0.5)
    hidden = 0
    for k in range(25):
        scene, example = data.scene(k), data.load(k)
        alphas, picture = drawn(data, scene)
        assert example.boxes is not None and example.map is not None
        expected = np.zeros((resolution, resolution), np.uint8)
        for box, alpha in zip(example.boxes, alphas, strict=True):
            rows, columns = (alpha > 0.5).any(1).nonzero()[0], (alpha > 0.5).any(0).nonzero()[0]
            tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            corners = (box.left, box.top, box.right, box.bottom)
            assert [round(c * resolution, 6) for c in corners] == list(tight)
            hidden += int(expected[alpha >= 0.5].any())
            expected[alpha >= 0.5] = box.label + 1
        assert np.array_equal(example.map.numpy(), expected)
        # straight alpha was rounded once more than the premultiplied one of the picture
        difference = example.image.numpy().transpose(1, 2, 0) - picture
        assert np.abs(difference).max() < 3 and np.abs(difference).mean() < 0.3
    assert hidden > 5  # some objects lie over others, so that their order was tested


def test_objects_are_as_asked() -> None:
    data = scenes(min_objects=2, max_objects=3, min_size=0.25, max_size=0.4, max_overlap=0.05)
    numbers: Counter[int] = Counter()
    for k in MANY:
        scene = data.scene(k)
        numbers[len(scene.objects)] += 1
        sizes = [thing.size for thing in scene.objects]
        assert sizes == sorted(sizes, reverse=True)
        for thing, size in zip(scene.objects, sizes, strict=True):
            box = thing.box
            assert 0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1
            longer = 64 * max(box.right - box.left, box.bottom - box.top)
            assert abs(longer - size) <= 2.001 and 16 <= size <= 26
            assert not thing.flipped or thing.concept.mirrors
        for a, b in itertools.combinations(scene.boxes, 2):
            width = max(0.0, min(a.right, b.right) - max(a.left, b.left))
            height = max(0.0, min(a.bottom, b.bottom) - max(a.top, b.top))
            least = min((c.right - c.left) * (c.bottom - c.top) for c in (a, b))
            assert width * height <= 0.05 * least + 1e-9
    assert set(numbers) == {2, 3}
    none = scenes(flip=False)
    assert any(thing.flipped for k in MANY for thing in data.scene(k).objects)
    assert not any(thing.flipped for k in MANY for thing in none.scene(k).objects)


def test_without_room_there_are_fewer_objects() -> None:
    data = scenes(min_objects=3, max_objects=3, min_size=0.5, max_size=0.6, max_overlap=0)
    numbers = Counter(len(data.scene(k).objects) for k in range(20))
    assert min(numbers) in (1, 2)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_captions_are_true(split: str) -> None:
    """Whatever a caption says is read from its text and held against the boxes."""
    data = scenes(split=split, max_objects=5, min_size=0.2, max_size=0.4)
    wordings: Counter[str] = Counter()
    for k in MANY:
        scene = data.scene(k)
        boxes = {with_article(t.concept.caption): t.box for t in scene.objects}
        for caption in (data.describe(k).caption, data.describe(k, keyed_generator(k)).caption):
            assert caption is not None
            if len(boxes) == 1:
                ground = f" on {scene.background.caption}"
                assert caption in (next(iter(boxes)), next(iter(boxes)) + ground)
                wordings["grounded" if ground in caption else "bare"] += 1
                continue
            first, found, rest = re.split(" (left of|right of|above|below) ", caption)
            second, *others = re.split(", and | and |, ", rest)
            assert sorted([first, second, *others]) == sorted(boxes)  # each once
            assert relation(boxes[first], boxes[second]) == found
            assert {boxes[first], boxes[second]} == set(scene.boxes[:2])  # the two largest
            wordings[found] += 1
    assert set(wordings) == {*RELATIONS, "grounded", "bare"}


def test_the_plain_caption_and_the_label_begin_with_the_largest_object(train: ScenesData) -> None:
    for k in MANY:
        first = train.scene(k).objects[0]
        known = train.describe(k)
        assert known.caption is not None and known.label is not None
        assert known.caption.startswith(with_article(first.concept.caption))
        assert train.class_names[known.label] == first.concept.name


def test_training_never_shows_what_is_reserved(train: ScenesData) -> None:
    for k in range(400):
        scene = train.scene(k)
        assert all(reserved_kind(t.concept.name) != scene.background.kind for t in scene.objects)
        for a, b in itertools.permutations(scene.objects, 2):
            found = relation(a.box, b.box)
            assert not is_reserved(a.concept.name, found, b.concept.name)


def test_every_validation_scene_is_a_new_composition(validation: ScenesData) -> None:
    for k in range(400):
        scene = validation.scene(k)
        if len(scene.objects) == 1:
            assert reserved_kind(scene.objects[0].concept.name) == scene.background.kind
            continue
        a, b = scene.objects[:2]
        found = relation(a.box, b.box)
        assert is_reserved(a.concept.name, found, b.concept.name)


def test_a_fifth_is_reserved_and_a_relation_is_one_with_its_converse() -> None:
    names = SCENE_CONCEPTS["scenes-32"]
    pairs = list(itertools.permutations(names, 2))
    share = np.mean([is_reserved(a, r, b) for a, b in pairs for r in RELATIONS])
    assert 0.18 < share < 0.22
    assert all(is_reserved(a, "left of", b) == is_reserved(b, "right of", a) for a, b in pairs)
    assert all(is_reserved(a, "above", b) == is_reserved(b, "below", a) for a, b in pairs)
    assert {reserved_kind(name) for name in names} == set(PATTERNED)


def test_the_splits_are_fixed() -> None:
    """A model trained today is to be tested tomorrow on what it has not seen."""
    names = SCENE_CONCEPTS["scenes-32"][:6]
    found = [(a, r, b) for a, b in itertools.permutations(names, 2) for r in RELATIONS[::2]]
    assert [" ".join(triple) for triple in found if is_reserved(*triple)] == [
        "red-apple left of watermelon",
        "banana above red-apple",
        "banana left of watermelon",
        "banana above watermelon",
        "banana above hamburger",
        "carrot above red-apple",
        "watermelon above red-apple",
        "watermelon above banana",
        "hamburger left of red-apple",
        "hamburger left of carrot",
        "hamburger left of watermelon",
    ]
    assert [reserved_kind(name) for name in names] == [
        "checks",
        "stripes",
        "gradient",
        "checks",
        "stripes",
        "noise",
    ]


def test_both_splits_show_every_concept(train: ScenesData, validation: ScenesData) -> None:
    for data in (train, validation):
        seen = {t.concept.name for k in range(400) for t in data.scene(k).objects}
        assert seen == set(data.class_names)


def test_unseen_concepts_make_scenes() -> None:
    data = open_data(
        ScenesDataConfig(concepts="scenes-held-out-8", split="validation", min_objects=2)
    )
    assert data.class_names == SCENE_CONCEPTS["scenes-held-out-8"]
    example = data.load(0)
    assert example.map is not None and set(example.map.unique().tolist()) <= set(range(9))


@pytest.mark.parametrize("kind", ["plain", *PATTERNED])
def test_backgrounds_are_soft_and_of_their_colour(kind: Kind) -> None:
    for k in range(20):
        ground = draw_background(kind, Chance(keyed_generator(k)))
        pixels = paint(ground, 64).astype(int)
        assert ground.colour in ground.caption and ground.caption.endswith("background")
        light, dark = (np.asarray(shade) for shade in ground.shades)
        assert (pixels >= dark - 1).all() and (pixels <= light + 1).all()
        assert pixels.min() > 120  # never dark
        varied = np.ptp(pixels, axis=(0, 1)).max()
        assert varied == 0 if kind == "plain" else varied > 10


def test_backgrounds_are_those_asked_for() -> None:
    for ground, kinds in (("plain", {"plain"}), ("texture", set(PATTERNED) - {"gradient"})):
        data = scenes(backgrounds=[ground])
        assert {data.scene(k).background.kind for k in MANY} == kinds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 60}, "resolution: "),
        ({"resolution": 68}, "resolution: "),
        ({"concepts": "scenes-31"}, "concepts"),
        ({"concepts": ["bus", "key", "bus"]}, "'bus' stands there twice"),
        ({"concepts": ["bus", "key"]}, "at least max_objects, which is 3"),
        ({"concepts": [f"n{k}" for k in range(300)]}, "at most 255"),
        ({"min_objects": 4}, "min_objects: expected at most max_objects, which is 3, got 4"),
        ({"max_objects": 7}, "max_objects: "),
        ({"min_size": 0.6}, "min_size: expected at most max_size"),
        ({"min_objects": 2, "min_size": 0.6, "max_size": 0.7}, "beside each other up to 0.53"),
        ({"backgrounds": []}, "backgrounds: "),
        ({"backgrounds": ["plain", "plain"]}, "'plain' stands there twice"),
        ({"backgrounds": ["forest"]}, "backgrounds"),
        ({"max_overlap": 0.9}, "max_overlap: "),
        ({"labels": "last"}, "labels: "),
    ],
)
def test_a_wrong_configuration_is_told(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        scenes(**fields)


def test_a_choice_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="never be trained on; add plain or texture"):
        scenes(backgrounds=["gradient"])
    with pytest.raises(ConfigError, match="add gradient or texture, or set min_objects to 2"):
        scenes(backgrounds=["plain"], split="validation")
    assert (
        len(scenes(backgrounds=["plain"], split="validation", min_objects=2).scene(0).objects) > 1
    )
    names = SCENE_CONCEPTS["scenes-32"]
    free = next(
        pair
        for pair in itertools.combinations(names, 2)
        if not any(is_reserved(pair[0], r, pair[1]) for r in RELATIONS)
    )
    with pytest.raises(ConfigError, match="no relation between any two"):
        scenes(concepts=free, max_objects=2, split="validation")
    with pytest.raises(ConfigError, match="under different names"):
        scenes(concepts=["red-apple", "red apple", "bus"])
    with pytest.raises(DataError, match="no emoji is called 'red-aple'; nearest: red-apple"):
        scenes(concepts=["red-aple", "bus", "key"])
