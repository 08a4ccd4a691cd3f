"""Texts that are kept: encoded once, anew where anything changed, and never taken for others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import bert, clip

from mezzotint.conditioning.base import Conditioner, ConditionInputs, TextOptions
from mezzotint.data import (
    EmojiData,
    EmojiDataConfig,
    ImageData,
    ScenesData,
    ScenesDataConfig,
)
from mezzotint.data.base import ListsCaptions
from mezzotint.data.captioned import CaptionedConfig, CaptionedImages, Entry
from mezzotint.data.files import ImageFile
from mezzotint.data.latent_store import TEXTS, find_shards
from mezzotint.data.texts import TextCache, all_captions, build_text_cache
from mezzotint.errors import RequestError
from mezzotint.rng import keyed_generator
from mezzotint.training.finetune_data import CaptionedData, WithPrior

CPU = torch.device("cpu")
LONG = "an apple " * 20  # two chunks of CLIP's
CAPTIONS = ["", "a (red:1.3) apple", "apple", "red", LONG]


@pytest.fixture
def encoder() -> Conditioner:
    torch.manual_seed(0)
    return clip()


def build(captions: Sequence[str], encoder: Conditioner, place: Path, **settings: Any) -> TextCache:
    return build_text_cache(captions, encoder, folder=place, device=CPU, **settings)


def counts(cache: TextCache) -> tuple[int, int]:
    return cache.report.encoded, cache.report.kept


@torch.no_grad()
def said(encoder: Conditioner, captions: Sequence[str], **inputs: Any) -> torch.Tensor:
    cond = encoder(ConditionInputs(count=len(captions), captions=captions, **inputs))
    return cond.crossattn


@pytest.mark.parametrize("kind", [clip, bert])
def test_what_was_encoded_is_found(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = kind()
    cache = build(CAPTIONS, encoder, tmp_path)
    assert counts(cache) == (5, 0) and [*cache] == CAPTIONS and len(cache) == 5
    for caption in CAPTIONS:
        assert cache[caption].dtype == torch.float32
        assert torch.equal(cache[caption], said(encoder, [caption])[0])
    again = build(CAPTIONS, encoder, tmp_path)
    assert counts(again) == (0, 5) and again.key == cache.key
    assert all(torch.equal(again[caption], cache[caption]) for caption in CAPTIONS)
    more = build([*CAPTIONS, "a"], encoder, tmp_path)
    assert counts(more) == (1, 5) and more.key != cache.key


def test_an_edited_caption_alone_is_encoded_anew(encoder: Conditioner, tmp_path: Path) -> None:
    build(CAPTIONS, encoder, tmp_path)
    edited = [*CAPTIONS[:3], "Red", LONG]
    cache = build(edited, encoder, tmp_path)
    assert counts(cache) == (1, 4) and cache.report.unused == 1
    assert torch.equal(cache["Red"], said(encoder, ["Red"])[0])


def test_another_encoder_or_way_to_read_are_other_texts(
    encoder: Conditioner, tmp_path: Path
) -> None:
    first = build(CAPTIONS, encoder, tmp_path)
    with torch.no_grad():
        other = clip()
        other.load_state_dict(encoder.state_dict())
        other.text_model.final_layer_norm.weight[0] += 1e-3
    worded = clip()
    worded.load_state_dict(encoder.state_dict())
    worded.add_word("apple", torch.ones(2, 16))
    deeper = clip(output_layer=2)
    deeper.load_state_dict(encoder.state_dict())
    settings: list[tuple[Conditioner, dict[str, Any]]] = [
        (other, {}),
        (worded, {}),
        (deeper, {}),
        (encoder, {"text": TextOptions(emphasis="none")}),
        (encoder, {"text": TextOptions(clip_skip=2)}),
        (encoder, {"dtype": torch.float16}),
    ]
    for changed, more in settings:
        cache = build(CAPTIONS, changed, tmp_path, **more)
        assert counts(cache) == (5, 0)
        wanted = said(changed, CAPTIONS[1:2], text=more.get("text", TextOptions()))[0]
        torch.testing.assert_close(cache[CAPTIONS[1]], wanted, rtol=2**-11, atol=1e-6)
        assert not torch.equal(cache[CAPTIONS[1]], first[CAPTIONS[1]])
    assert counts(build(CAPTIONS, encoder, tmp_path)) == (0, 5)


def test_tokens_do_not_depend_on_what_else_was_missing(
    encoder: Conditioner, tmp_path: Path
) -> None:
    whole = build(CAPTIONS, encoder, tmp_path / "whole")
    for caption in reversed(CAPTIONS):
        build([caption], encoder.train(), tmp_path / "one by one")
    parts = build(CAPTIONS, encoder, tmp_path / "one by one")
    assert counts(parts) == (0, 5)
    assert all(torch.equal(parts[caption], whole[caption]) for caption in CAPTIONS)


def test_a_damaged_shard_is_found_and_rebuilt(encoder: Conditioner, tmp_path: Path) -> None:
    whole = build(CAPTIONS[:3], encoder, tmp_path)
    (name,) = find_shards(tmp_path, TEXTS)
    build(CAPTIONS[3:], encoder, tmp_path)
    before = {caption: whole[caption] for caption in CAPTIONS[:3]}
    assert len(find_shards(tmp_path, TEXTS)) == 2 and not find_shards(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.unlink()  # what is mapped keeps the old one
    path.write_bytes(content)
    cache = build(CAPTIONS, encoder, tmp_path)
    assert counts(cache) == (3, 2) and path.name in cache.report.damaged[0]
    assert all(torch.equal(cache[caption], before[caption]) for caption in before)
    assert counts(build(CAPTIONS, encoder, tmp_path)) == (0, 5)


def test_a_caption_that_cannot_be_read_is_told(encoder: Conditioner, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected at most 1000"):
        build(["(apple:5000)"], encoder, tmp_path)


@pytest.mark.parametrize("kind", [clip, bert])
def test_conditions_are_those_of_the_encoder(kind: Any, tmp_path: Path) -> None:
    """With captions of several lengths, and dropped ones, which are the null."""
    torch.manual_seed(0)
    encoder = kind()
    cache = build(CAPTIONS, encoder, tmp_path)
    drop = torch.tensor([False, True, False, False])
    captions = [CAPTIONS[k] for k in (1, 1, 4, 3)]
    with torch.no_grad():
        own = encoder(ConditionInputs(count=4, captions=captions), drop)
        kept = encoder(ConditionInputs(count=4, captions=captions, tokens=cache), drop)
    torch.testing.assert_close(kept.crossattn, own.crossattn, rtol=1e-5, atol=1e-5)
    assert (own.crossattn_mask is None) == (kind is bert)
    if kind is clip:
        assert torch.equal(kept.crossattn_mask, own.crossattn_mask)
    with torch.no_grad():
        null = encoder.null(1).crossattn[0]
    assert torch.equal(kept.crossattn[1, : len(null)], null)
    wide = encoder.double()(ConditionInputs(count=4, captions=captions, tokens=cache), drop)
    assert wide.crossattn.dtype == torch.float64


def captioned(folder: Path) -> CaptionedImages:
    entries: list[Entry] = []
    for k, captions in enumerate([("one",), ("two", "zwei", "deux"), ()]):
        path = folder / f"{k}.png"
        Image.fromarray(np.full((16, 16, 3), k, np.uint8)).save(path)
        entries.append(Entry(ImageFile(path, path.name), captions, None))
    return CaptionedImages(folder, entries, [], None, CaptionedConfig(resolution=16))


def test_data_say_what_they_list(tmp_path: Path) -> None:
    images = captioned(tmp_path)
    emoji = EmojiData(EmojiDataConfig(names=("red-apple", "robot"), tag_probability=0.5))
    scenes = ScenesData(ScenesDataConfig(count=6))
    templates = ("{caption}", "a photo of {caption}", "a photo")
    of: list[ImageData] = [
        images,
        emoji,
        scenes,
        CaptionedData(images, templates),
        CaptionedData(scenes, templates),
        WithPrior(CaptionedData(images, templates), [tmp_path / "0.png"], "a cat", 16),
    ]
    for data in of:
        assert isinstance(data, ListsCaptions)
        for index in range(len(data)):
            chance = [None, *(keyed_generator(seed, index) for seed in range(400))]
            heard = {data.describe(index, generator).caption for generator in chance}
            assert heard - {None} == set(data.captions_of(index))
    assert all_captions(images, 4) == ["", "deux", "one", "two", "zwei"]
    assert all_captions(images, 3) is None
    assert all_captions(CaptionedData(images, ("{caption}",)), 4) == all_captions(images, 4)
    quiet = EmojiData(EmojiDataConfig(names=("robot",), tag_probability=0.0))
    assert len(quiet.captions_of(0)) == 1 + len(quiet.config.caption_templates)


def test_what_data_do_not_know_is_not_listed(tmp_path: Path) -> None:
    class Stubborn:
        """Captions that nobody knows before they are said."""

        def __init__(self, data: CaptionedImages) -> None:
            self.load, self.describe = data.load, data.describe
            self.class_names, self.faults = data.class_names, data.faults
            self.fingerprint, self.count = data.fingerprint, len(data)

        def __len__(self) -> int:
            return self.count

    data: Any = Stubborn(captioned(tmp_path))
    assert all_captions(data, 100) is None
    assert all_captions(CaptionedData(data, ("{caption}",)), 100) is None
    # unless nothing of theirs is said
    assert all_captions(CaptionedData(data, ("a cat",)), 100) == ["", "a cat"]
