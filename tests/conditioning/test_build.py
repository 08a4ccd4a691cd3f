"""Every conditioning of a recipe becomes the conditioner it says."""

import itertools
from typing import Any, get_args

import pytest
import torch

from mezzotint.conditioning.base import Box, Conditioner, ConditionInputs, Region, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner
from mezzotint.conditioning.build import (
    ConditioningConfig,
    build_conditioner,
    concat_channels,
    main_config,
    spatial_config,
    with_class_names,
)
from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.conditioning.layout import LayoutConditioner
from mezzotint.conditioning.regions import RegionsConditioner
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    LowResConditioner,
    SemanticMapConditioner,
)
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig, train_tokenizer
from mezzotint.config import Config, parse
from mezzotint.errors import ConfigError

CAPTIONS = ("a red apple", "a blue car")
KINDS: dict[str, tuple[type[Conditioner], dict[str, Any]]] = {
    "text": (TextConditioner, {"width": 16, "layers": 1, "heads": 2}),
    "bert": (BertTextConditioner, {"width": 16, "layers": 1, "heads": 2, "head_dim": 8}),
    "class": (ClassConditioner, {"width": 16, "class_names": ["cat", "dog"]}),
    "layout": (LayoutConditioner, {"width": 16, "layers": 1, "vocab_size": 64}),
    "semantic_map": (SemanticMapConditioner, {"classes": 5, "stages": 1}),
    "low_res": (LowResConditioner, {"fold": 2}),
    "inpainting": (InpaintingConditioner, {"latent_channels": 3}),
    "regions": (RegionsConditioner, {"max_objects": 2}),
    "none": (Unconditional, {}),
}
INPUTS = ConditionInputs(
    count=2,
    captions=CAPTIONS,
    labels=[0, 1],
    layouts=[[Box(1, 0.0, 0.0, 0.5, 0.5)], []],
    regions=[[Region("a blue car", 0.0, 0.0, 0.5, 0.5)], []],
    latent_size=(4, 4),
    maps=torch.ones(2, 8, 8, dtype=torch.long),
    low_res=torch.zeros(2, 3, 8, 8),
    masked_latents=torch.zeros(2, 3, 4, 4),
    mask=torch.ones(2, 1, 4, 4),
)


class Holder(Config):
    """As a recipe holds it."""

    conditioning: ConditioningConfig


def read(fields: dict[str, Any]) -> ConditioningConfig:
    return parse(Holder, {"conditioning": fields}, "recipe").conditioning


def build(config: ConditioningConfig) -> Conditioner:
    main = main_config(config)
    learned = isinstance(main, TextConditionerConfig)
    return build_conditioner(
        config, train_tokenizer(CAPTIONS, main.vocab_size) if learned else None
    )


def test_every_kind_is_tried():
    union = get_args(ConditioningConfig)[0]
    known = {member.model_fields["kind"].default for member in get_args(union)}
    assert known == {*KINDS, "hybrid"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_gives_what_its_configuration_promises(kind):
    built, fields = KINDS[kind]
    config = read({"kind": kind, **fields})
    conditioner = build(config)
    assert type(conditioner) is built
    inputs = ConditionInputs(count=2) if kind == "none" else INPUTS
    cond = conditioner(inputs)
    main = main_config(config)
    assert (cond.crossattn is None) == (main is None)
    if main is not None:
        assert cond.crossattn.shape[2] == main.width
    channels = 0 if cond.concat is None else cond.concat.shape[1]
    assert channels == concat_channels(config) == conditioner.concat_channels


@pytest.mark.parametrize(
    ("main", "spatial"),
    [
        *itertools.product(
            ("text", "bert", "class", "layout"), ("semantic_map", "low_res", "inpainting")
        ),
        ("text", "regions"),
        ("bert", "regions"),
    ],
)
def test_any_two_ways_in_go_together(main, spatial):
    parts = {k: {"kind": v, **KINDS[v][1]} for k, v in (("main", main), ("spatial", spatial))}
    config = read({"kind": "hybrid", **parts})
    assert main_config(config) == read(parts["main"])
    assert spatial_config(config) == read(parts["spatial"])
    conditioner = build(config)
    assert isinstance(conditioner, HybridConditioner)
    assert type(conditioner.main) is KINDS[main][0]
    assert type(conditioner.spatial) is KINDS[spatial][0]
    cond = conditioner(INPUTS)
    assert cond.crossattn.shape[2] == 16
    assert cond.concat.shape[1] == concat_channels(config)


@pytest.mark.parametrize("kind", ["class", "layout"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_class_names_come_from_the_data(kind, hybrid):
    fields: dict[str, Any] = {"kind": kind, "width": 16}
    if hybrid:
        fields = {"kind": "hybrid", "main": fields, "spatial": {"kind": "low_res"}}
    config = read(fields)
    named = with_class_names(config, ("cat", "dog"))
    assert main_config(named).class_names == ("cat", "dog")
    assert spatial_config(named) == spatial_config(config)
    assert with_class_names(named, ("cat", "dog")) == named
    assert with_class_names(named, None) == named
    key = "conditioning.main" if hybrid else "conditioning"
    with pytest.raises(ConfigError, match=rf"{key}\.class_names are cat, dog, but the data has"):
        with_class_names(named, ("dog", "cat"))


def test_names_that_do_not_fit_are_refused():
    config = read({"kind": "layout", "vocab_size": 4, "layers": 0})
    with pytest.raises(ConfigError, match="4 classes are too many"):
        with_class_names(config, ("a", "b", "c", "d"))


def test_what_has_no_classes_is_left_as_it_is():
    config = read({"kind": "text"})
    assert with_class_names(config, ("cat", "dog")) is config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hybrid", "main": {"kind": "class"}}, r"conditioning\.spatial: required"),
        ({"kind": "class", "widht": 3}, "did you mean 'width'"),
        (
            {"kind": "hybrid", "main": {"kind": "low_res"}, "spatial": {"kind": "low_res"}},
            r"conditioning\.main: .*low_res",
        ),
        (
            {
                "kind": "hybrid",
                "main": {"kind": "text", "width": 0},
                "spatial": {"kind": "low_res"},
            },
            r"conditioning\.main\.width: .*greater than or equal to 1",
        ),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        read(fields)


def test_classes_without_names_and_words_without_room_are_refused():
    with pytest.raises(ConfigError, match="needs at least one class"):
        build(read({"kind": "class"}))
    with pytest.raises(ConfigError, match="vocab_size is 100, but the tokenizer has 30522"):
        build(read({"kind": "bert", "vocab_size": 100, "layers": 0}))
