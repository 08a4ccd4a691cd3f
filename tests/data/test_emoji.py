import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import EmojiData, EmojiDataConfig, emoji, open_data
from mezzotint.data.emoji import SUBSETS, emoji_concepts, emoji_image, find_concept
from mezzotint.errors import ConfigError, DataError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_set_holds_1590_concepts_that_names_tell_apart() -> None:
    concepts = emoji_concepts()
    assert len(concepts) == 1590
    for field in ("name", "caption", "character", "code_points"):
        assert len({getattr(c, field) for c in concepts}) == 1590, field
    assert len({c.group for c in concepts}) == 9
    held_out = sum(c.split == "validation" for c in concepts)
    assert 0.08 < held_out / len(concepts) < 0.12


def test_no_concept_is_a_skin_tone() -> None:
    tones = {f"1f3f{digit}" for digit in "bcdef"}
    assert not any(tones & set(c.code_points.split("-")) for c in emoji_concepts())


def test_demo_is_trained_on_and_its_candidates_are_held_out() -> None:
    trained, candidates = (
        [find_concept(name) for name in SUBSETS[key]] for key in ("demo-48", "demo-candidates-16")
    )
    assert (len(set(trained)), len(set(candidates))) == (48, 16)
    assert {c.split for c in trained} == {"train"}
    assert {c.split for c in candidates} == {"validation"}


@pytest.mark.parametrize("style", ["fluent", "noto"])
def test_every_picture_is_whole(style: emoji.Style) -> None:
    for concept in emoji_concepts():
        picture = emoji_image(concept, style=style)
        assert (picture.mode, picture.size) == ("RGBA", (128, 128))
        covered = (np.asarray(picture.getchannel("A")) > 127).mean()
        assert covered > 0.02, concept.name  # the thinnest are signs such as the minus


def test_pictures_show_what_their_names_say() -> None:
    """Mean colours of plain things, as a guard against shifted offsets."""
    for name, channel in (("red-apple", 0), ("green-heart", 1), ("blue-heart", 2)):
        for style in ("fluent", "noto"):
            pixels = np.asarray(emoji_image(name, style=style), np.float32)
            mean = (pixels[..., :3] * pixels[..., 3:]).sum((0, 1)) / pixels[..., 3].sum()
            assert mean.argmax() == channel, (name, style)


@pytest.mark.parametrize("resolution", [8, 33, 64, 128, 200])
def test_plain_view_is_the_picture_on_its_background(resolution: int) -> None:
    config = EmojiDataConfig(
        names=("octopus",), resolution=resolution, background=(200, 100, 0), split="all"
    )
    seen = EmojiData(config).load(0).image.permute(1, 2, 0).numpy().astype(int)
    behind = Image.new("RGBA", (resolution, resolution), (200, 100, 0, 255))
    expected = Image.alpha_composite(behind, emoji_image("octopus", resolution)).convert("RGB")
    # straight alpha rounds colour once more than premultiplied alpha does
    assert np.abs(seen - np.asarray(expected).astype(int)).max() <= 3


def test_a_full_view_is_white_where_nothing_is() -> None:
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=48, background="grey"))
    image = data.load(SUBSETS["demo-48"].index("banana")).image
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [128, 128, 128]


def test_an_example_depends_on_its_generator_alone() -> None:
    config = EmojiDataConfig(subset="demo-48", resolution=32, max_rotation=5, flip=True)
    first, second = EmojiData(config), EmojiData(config)
    second.load(3, generator(1))
    for seed in range(5):
        one, other = first.load(7, generator(seed)), second.load(7, generator(seed))
        assert torch.equal(one.image, other.image)
        assert (one.caption, one.label, one.name) == (other.caption, other.label, other.name)
    assert not torch.equal(first.load(7, generator(0)).image, first.load(7, generator(1)).image)


def test_a_view_that_is_given_away_can_be_changed() -> None:
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=16))
    data.load(0).image.zero_()
    assert data.load(0).image.max() > 0


def centre(image: torch.Tensor) -> tuple[float, float]:
    """Centre of what is not white, in shares of the side."""
    ink = 255 - image.float().mean(0)
    places = torch.arange(image.shape[1]) + 0.5
    side, total = image.shape[1], ink.sum()
    return (
        float((ink.sum(0) * places).sum() / total / side),
        float((ink.sum(1) * places).sum() / total / side),
    )


def test_shift_moves_the_centre_as_far_as_it_says() -> None:
    config = EmojiDataConfig(names=("key",), resolution=64, max_shift=0.05, max_scale=0)
    data = EmojiData(config)
    x, y = centre(data.load(0).image)
    moves = []
    for seed in range(60):
        moved = centre(data.load(0, generator(seed)).image)
        moves += [moved[0] - x, moved[1] - y]
    largest = max(abs(move) for move in moves)
    # uniform in +-0.05: the largest of 120 falls short of it by more than a tenth in 4e-6
    assert 0.045 < largest <= 0.0505
    assert abs(sum(moves) / len(moves)) < 0.01  # 3.8 standard errors


def test_scale_changes_the_covered_area_by_its_square() -> None:
    config = EmojiDataConfig(names=("red-circle",), resolution=64, max_shift=0, max_scale=0.2)
    data = EmojiData(config)

    def area(image: torch.Tensor) -> float:
        return float((255 - image.float().mean(0)).sum())

    plain = area(data.load(0).image)
    ratios = [(area(data.load(0, generator(seed)).image) / plain) ** 0.5 for seed in range(40)]
    assert min(ratios) >= 0.79 and max(ratios) <= 1.21
    assert min(ratios) < 0.86 and max(ratios) > 1.06  # the view may cut what grows past its edge


def test_without_augmentation_only_the_caption_varies() -> None:
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=16, augment=False))
    examples = [data.load(2, generator(seed)) for seed in range(40)]
    assert all(torch.equal(e.image, data.load(2).image) for e in examples)
    assert len({e.caption for e in examples}) >= 6
    for seed in range(10):
        known = data.describe(2, generator(seed))
        assert "strawberry" in str(known.caption) and known.label == examples[0].label


def test_tags_follow_the_caption_as_often_as_asked() -> None:
    always = EmojiData(EmojiDataConfig(names=("red apple",), tag_probability=1.0))
    never = EmojiData(EmojiDataConfig(names=("red apple",), tag_probability=0.0))
    tags = set(always.concepts[0].tags)
    for seed in range(20):
        text, _, tag = str(always.load(0, generator(seed)).caption).rpartition(", ")
        assert "red apple" in text and tag in tags
        assert "," not in str(never.load(0, generator(seed)).caption)


def test_mirroring_is_left_out_where_it_would_lie() -> None:
    for caption in (
        "ZZZ",
        "hundred points",
        "three o'clock",
        "left arrow",
        "stop sign",
        "ATM sign",
    ):
        assert not find_concept(caption).mirrors, caption
    for caption in ("dog face", "automobile", "banana", "running shoe"):
        assert find_concept(caption).mirrors, caption


def test_flip_mirrors_half_of_the_views() -> None:
    config = EmojiDataConfig(names=("snail",), resolution=32, max_shift=0, max_scale=0, flip=True)
    data = EmojiData(config)
    plain = data.load(0).image.int()
    views = [data.load(0, generator(seed)).image.int() for seed in range(60)]
    as_it_is = sum(bool((v - plain).abs().max() <= 1) for v in views)
    mirrored = sum(bool((v - plain.flip(2)).abs().max() <= 1) for v in views)
    assert as_it_is + mirrored == 60 and 15 <= mirrored <= 45


@pytest.mark.parametrize("labels", ["group", "subgroup"])
def test_classes_are_numbered_alike_in_every_split(labels: str) -> None:
    train, held_out = (
        open_data(EmojiDataConfig.from_dict({"split": split, "labels": labels}))
        for split in ("train", "validation")
    )
    assert train.class_names == held_out.class_names
    example = held_out.load(0)
    assert train.class_names is not None and example.label is not None
    assert train.class_names[example.label] == getattr(find_concept(example.name), labels)


def test_splits_and_groups_choose() -> None:
    sizes = [len(EmojiData(EmojiDataConfig(split=s))) for s in ("train", "validation", "all")]
    assert sizes[0] + sizes[1] == sizes[2] == 1590
    food = EmojiData(EmojiDataConfig(groups=("food-drink",)))
    assert {c.group for c in food.concepts} == {"food-drink"}


def test_fingerprint_follows_the_view_and_the_choice() -> None:
    one = EmojiData(EmojiDataConfig(subset="demo-48"))
    assert one.fingerprint == EmojiData(EmojiDataConfig(subset="demo-48")).fingerprint
    assert one.fingerprint != EmojiData(EmojiDataConfig(subset="demo-48", style="noto")).fingerprint
    assert one.fingerprint != EmojiData(EmojiDataConfig(names=("key",))).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 0}, "resolution: Input should be greater than 0, got 0"),
        ({"subset": "demo-48", "names": ["key"]}, "subset and names both say which emoji"),
        ({"caption_templates": ["an emoji"]}, "expected text with {caption} in it"),
        ({"caption_templates": ["{caption} {style}"]}, "expected text with {caption} in it"),
        ({"background": [0, 0, 300]}, "expected three numbers from 0 to 255"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EmojiDataConfig.from_dict(settings)
    assert message in str(error.value)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match="no emoji is called 'red aple'; nearest: .*red apple"):
        EmojiData(EmojiDataConfig(names=("red aple",)))
    with pytest.raises(ConfigError, match="unknown group 'food'; did you mean 'food-drink'"):
        EmojiData(EmojiDataConfig(groups=("food",)))
    with pytest.raises(ConfigError, match="leave no emoji"):
        EmojiData(EmojiDataConfig(names=("key",), groups=("flags",)))


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = emoji._asset("noto.bin")
    monkeypatch.setattr(emoji, "_asset", lambda name: whole[:-1] + b"x")
    with pytest.raises(DataError, match="noto.bin is damaged; reinstall"):
        emoji._pictures.__wrapped__("noto")
