"""What a batch is told, from a data set."""

from typing import Any

import pytest
import torch

from mezzotint.conditioning.build import ConditioningConfig, build_conditioner, with_class_names
from mezzotint.conditioning.classes import ClassConditionerConfig
from mezzotint.conditioning.layout import LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    InpaintingConditionerConfig,
    LowResConditionerConfig,
    SemanticMapConditionerConfig,
)
from mezzotint.conditioning.text import TextConditionerConfig
from mezzotint.data.degradation import DegradationConfig, bicubic_down
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.data.masks import MaskConfig
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import ConfigError, DataError
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.training.conditions import ConditionMaker, check_data, check_degradation

LAYOUT = LayoutConditionerConfig(width=16, layers=0, vocab_size=1024, max_length=11)
MAP = SemanticMapConditionerConfig(classes=33, out_channels=3, stages=2)
DATA = ScenesData(ScenesDataConfig(count=16))
CPU = torch.device("cpu")


def model(config: ConditioningConfig) -> LatentDiffusion:
    torch.manual_seed(0)
    first_stage = AutoencoderKL(
        AutoencoderKLConfig(
            block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=4, mid_attention=False
        )
    )
    conditioner = build_conditioner(with_class_names(config, DATA.class_names))
    unet = UNet(
        UNetConfig(
            in_channels=4 + conditioner.concat_channels,
            out_channels=4,
            block_out_channels=[8],
            layers_per_block=1,
            attention_levels=[False],
            cross_attention_dim=16 if conditioner.wants else None,
            norm_num_groups=4,
        )
    )
    scale = LatentNormalization.from_scale_factor(1.0)
    return LatentDiffusion(first_stage, unet, conditioner, ScheduleConfig(), scale, (64, 64))


def maker(config: ConditioningConfig, data: Any = DATA, **options: Any) -> ConditionMaker:
    defaults = {"degradation": DegradationConfig(), "masks": MaskConfig(), "seed": 0}
    return ConditionMaker(model(config), data, **(defaults | options))


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_layouts_and_maps_are_those_of_the_examples() -> None:
    layouts, maps = maker(LAYOUT), maker(MAP)
    for k in range(4):
        example = DATA.load(k)
        told = layouts.of_view(k, 0, generator())
        assert told.boxes == example.boxes and told.map is None and told.caption is None
        told = maps.of_view(k, 0, generator())
        assert example.map is not None and told.map is not None
        assert torch.equal(told.map, example.map) and told.boxes is None
    inputs = maps.inputs([maps.of_view(k, 0, generator()) for k in range(4)], CPU)
    assert inputs.maps is not None and inputs.maps.shape == (4, 64, 64)
    assert maps.model.conditioner(inputs).concat.shape == (4, 3, 16, 16)
    inputs = layouts.inputs([layouts.of_view(k, 0, generator()) for k in range(4)], CPU)
    assert layouts.model.conditioner(inputs).crossattn.shape == (4, 11, 16)


def test_small_pictures_are_those_of_the_view() -> None:
    conditions = maker(LowResConditionerConfig(fold=2), degradation=DegradationConfig(factor=2))
    told = conditions.of_view(3, 0, generator())
    assert told.low_res is not None
    expected = bicubic_down(DATA.load(3).image[None].float(), 2)[0].round().clamp(0, 255)
    assert torch.equal(told.low_res.float(), expected)
    cond = conditions.model.conditioner(conditions.inputs([told], CPU))
    assert cond.concat.shape == (1, 12, 16, 16)


def test_a_flipped_view_has_flipped_pictures() -> None:
    """The picture that conditions must be the one whose latents are cached."""
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=64, max_shift=0.2))
    conditions = maker(LowResConditionerConfig(), data)
    plain, moved = (conditions.of_view(0, view, generator()).low_res for view in (0, 3))
    assert plain is not None and moved is not None and not torch.equal(plain, moved)
    again = conditions.of_view(0, 3, generator(9)).low_res
    assert again is not None and torch.equal(moved, again)


def test_words_and_classes_need_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=64))
    conditions = maker(ClassConditionerConfig(width=16), data)
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("a picture was loaded"))
    assert conditions.of_view(5, 3, generator()).label == data.describe(5).label


def test_masks_cover_what_the_encoder_does_not_see() -> None:
    conditions = maker(InpaintingConditionerConfig(masked_value=0.0))
    told = [conditions.of_view(k, 0, generator(k)) for k in range(3)]
    inputs = conditions.inputs(told, CPU)
    assert inputs.masked_latents is not None and inputs.mask is not None
    assert inputs.masked_latents.shape == (3, 4, 16, 16)
    assert set(inputs.mask.unique().tolist()) == {0.0, 1.0}
    first = told[0]
    assert first.image is not None and first.mask is not None
    covered = first.mask[0].bool().expand(3, 64, 64)
    first.image[covered] = 255 - first.image[covered]  # what is covered makes no difference
    again = conditions.inputs(told, CPU).masked_latents
    assert again is not None and torch.equal(again, inputs.masked_latents)
    assert not torch.equal(told[0].mask, conditions.of_view(0, 0, generator(99)).mask)


def test_an_example_and_its_plain_view_tell_the_same() -> None:
    conditions = maker(InpaintingConditionerConfig())
    a = conditions.of_example(DATA.load(2), generator())
    b = conditions.of_view(2, 0, generator())
    assert a.image is not None and b.image is not None and torch.equal(a.image, b.image)


def test_small_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"factor 2 times .* fold 1 must be .* f, 4"):
        check_degradation(LowResConditionerConfig(), DegradationConfig(factor=2), 4)
    check_degradation(LowResConditionerConfig(fold=2), DegradationConfig(factor=2), 4)


def test_a_layout_needs_room_for_every_object() -> None:
    narrow = LAYOUT.model_copy(update={"max_length": 8})
    with pytest.raises(ConfigError, match="max_objects is 3, .* room for 2: .*max_length 11"):
        check_data(DATA, narrow)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LAYOUT, "have no boxes: use data.kind=coco or scenes"),
        (MAP, "the images have none: use data.kind=maps or scenes"),
    ],
)
def test_what_the_data_lack_is_said(config: ConditioningConfig, message: str) -> None:
    emoji = EmojiData(EmojiDataConfig(subset="demo-48"))
    with pytest.raises(DataError, match=message):
        check_data(emoji, config)
    check_data(DATA, config)
    check_data(emoji, TextConditionerConfig())
    check_data(emoji, ClassConditionerConfig())


def test_a_map_needs_a_class_for_the_background_too() -> None:
    too_few = MAP.model_copy(update={"classes": 32})
    with pytest.raises(ConfigError, match="classes are 32, but the data's maps need 33"):
        check_data(DATA, too_few)
