"""Conditions that are concatenated."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.conditioning.base import ConditionInputs, Unconditional
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.errors import RequestError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def semantic(**fields: int) -> SemanticMapConditioner:
    torch.manual_seed(0)
    return SemanticMapConditioner(SemanticMapConditionerConfig(**fields))


def maps(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(32, 48), (22, 27)])
@pytest.mark.parametrize("stages", [0, 1, 2])
def test_semantic_maps_as_the_original_rescales_them(stages: int, size: tuple[int, int]):
    """One-hot, halved bilinearly stage by stage, then the convolution; odd sizes too."""
    model = semantic(classes=182, stages=stages)
    given = maps(182, 2, *size)
    x = F.one_hot(given, 182).movedim(-1, 1).float()
    for _ in range(stages):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    expected = F.conv2d(x, model.channel_mapper.weight)
    found = model(ConditionInputs(count=2, maps=given)).concat
    assert found.shape == (2, 3, size[0] >> stages, size[1] >> stages)
    # the same sums of at most 16 float32 numbers below 0.1 in another order
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_the_classes_vectors_are_learned():
    model = semantic(classes=5, out_channels=2)
    model(ConditionInputs(count=1, maps=torch.full((1, 8, 8), 3))).concat.sum().backward()
    grad = model.channel_mapper.weight.grad[:, :, 0, 0]  # of (out_channels, classes)
    assert grad.tolist() == [[0, 0, 0, 4, 0]] * 2  # each of 2 x 2 outputs is an average of class 3


def test_the_published_parameter_is_the_only_one():
    shapes = {name: tuple(p.shape) for name, p in semantic().state_dict().items()}
    assert shapes == {"channel_mapper.weight": (3, 182, 1, 1)}


@pytest.mark.parametrize(("value", "got"), [(7, "got 7"), (-1, "got -1")])
def test_a_class_that_there_is_not_is_refused(value: int, got: str):
    given = torch.zeros(1, 8, 8, dtype=torch.int64)
    given[0, 2, 3] = value
    with pytest.raises(RequestError, match=f"semantic_map: expected classes from 0 to 6, {got}"):
        semantic(classes=7)(ConditionInputs(count=1, maps=given))


def test_small_pictures_pass_as_they_are():
    model = LowResConditioner(LowResConditionerConfig())
    given = draw(2, 3, 8, 8)
    assert torch.equal(model(ConditionInputs(count=2, low_res=given)).concat, given)
    assert not model.state_dict()
    with pytest.raises(RequestError, match=r"low_res: expected \(B, 3, h, w\), got \(2, 4, 8, 8\)"):
        model(ConditionInputs(count=2, low_res=draw(2, 4, 8, 8)))


def test_larger_pictures_are_folded_onto_the_latents_and_nothing_is_lost():
    model = LowResConditioner(LowResConditionerConfig(fold=2))
    given = draw(2, 3, 8, 6)
    found = model(ConditionInputs(count=2, low_res=given)).concat
    assert found.shape == (2, model.concat_channels, 4, 3)
    assert torch.equal(torch.nn.functional.pixel_shuffle(found, 2), given)


def inpainting(**fields: Any) -> InpaintingConditioner:
    return InpaintingConditioner(InpaintingConditionerConfig(**fields))


MASK = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]


def test_stable_diffusion_puts_a_mask_of_zeros_and_ones_first():
    latents = draw(1, 4, 2, 2)
    found = inpainting()(ConditionInputs(count=1, mask=MASK, masked_latents=latents)).concat
    assert found.shape == (1, 5, 2, 2)
    assert found[0, 0].tolist() == [[0, 1], [1, 0]]
    assert torch.equal(found[:, 1:], latents)


def test_the_original_puts_a_signed_mask_last():
    latents = draw(1, 3, 2, 2)
    model = inpainting(latent_channels=3, order="mask_last", signed_mask=True, masked_value=-1.0)
    found = model(ConditionInputs(count=1, mask=MASK, masked_latents=latents)).concat
    assert model.concat_channels == 4
    assert found[0, 3].tolist() == [[-1, 1], [1, -1]]
    assert torch.equal(found[:, :3], latents)


def test_a_mask_in_another_precision_takes_that_of_the_latents():
    latents = draw(1, 4, 2, 2).bfloat16()
    found = inpainting()(ConditionInputs(count=1, mask=MASK, masked_latents=latents)).concat
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masked_latents": draw(1, 3, 2, 2)}, "masked_latents: expected .B, 4, h, w., got"),
        ({"mask": MASK.expand(1, 3, 2, 2)}, "mask: expected .B, 1, h, w., got"),
        ({"masked_latents": draw(1, 4, 4, 6)}, "mask: is 2x2, but the latents are 6x4"),
        ({"mask": None}, "wants a picture and a mask .*, but was given no condition"),
        ({"masked_latents": None}, "wants a picture and a mask"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields: dict[str, Any], message: str):
    given = {"mask": MASK, "masked_latents": draw(1, 4, 2, 2)} | fields
    with pytest.raises(RequestError, match=message):
        inpainting()(ConditionInputs(count=1, **given))


CONCATENATING = {
    "map": (semantic(), {"maps": maps(182, 2, 8, 8)}, 3),
    "low_res": (LowResConditioner(LowResConditionerConfig()), {"low_res": draw(2, 3, 2, 2)}, 3),
    "inpainting": (
        inpainting(),
        {"mask": MASK.expand(2, 1, 2, 2), "masked_latents": draw(2, 4, 2, 2)},
        5,
    ),
}


@pytest.mark.parametrize("wants", CONCATENATING)
def test_each_says_what_it_wants_and_gives_nothing_else(wants: str):
    model, given, channels = CONCATENATING[wants]
    assert (model.wants, model.wants_concat) == (None, wants)
    inputs = ConditionInputs(count=2, **given)
    cond = model(inputs)
    assert cond.concat.shape == (2, channels, 2, 2)
    assert model.concat_channels == channels
    assert cond.crossattn is None and cond.vector is None
    half = model(inputs, torch.tensor([True, False])).concat
    assert torch.equal(half[1], cond.concat[1])
    null = torch.zeros(channels, 2, 2)
    if wants == "inpainting":
        null[0] = 1.0  # draw everything
    assert torch.equal(half[0], null)
    with pytest.raises(RequestError, match="the model wants a .*, but was given a prompt"):
        model(ConditionInputs(count=2, captions=["a", "b"]))


@pytest.mark.parametrize("wants", CONCATENATING)
def test_settings_are_the_configuration(wants: str):
    model, _, _ = CONCATENATING[wants]
    settings = model.settings()
    assert type(model.config).from_dict(settings) == model.config
    assert settings["kind"] == {"map": "semantic_map"}.get(wants, wants)


def hybrid() -> HybridConditioner:
    torch.manual_seed(0)
    config = ClassConditionerConfig(width=8, class_names=("hat", "shoe"))
    return HybridConditioner(ClassConditioner(config), inpainting())


HYBRID_INPUTS = ConditionInputs(count=2, labels=[0, 1], **CONCATENATING["inpainting"][1])


def test_a_hybrid_conditions_in_both_ways():
    model = hybrid()
    cond = model(HYBRID_INPUTS)
    assert torch.equal(cond.crossattn, model.main(HYBRID_INPUTS).crossattn)
    assert torch.equal(cond.concat, model.spatial(HYBRID_INPUTS).concat)
    assert (model.wants, model.wants_concat, model.concat_channels) == ("label", "inpainting", 5)
    assert list(model.state_dict()) == ["main.embedding.weight"]
    assert model.description.startswith("a class")
    assert model.description.endswith(", and a picture and a mask (--image and --mask)")


def test_only_the_main_part_of_a_hybrid_is_dropped_and_the_halves_can_be_joined():
    model = hybrid()
    cond = model(HYBRID_INPUTS)
    null = model(HYBRID_INPUTS, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(null.crossattn, model.null(2).crossattn)
    assert torch.equal(null.concat, cond.concat)
    assert cond.cat(null).concat.shape == (4, 5, 2, 2)


def test_the_spatial_part_of_a_hybrid_has_a_dropout_of_its_own():
    model = hybrid()
    cond = model(HYBRID_INPUTS, torch.tensor([True, False]), torch.tensor([False, True]))
    torch.testing.assert_close(cond.crossattn[0], model.null(2).crossattn[0])
    assert torch.equal(cond.crossattn[1], model(HYBRID_INPUTS).crossattn[1])
    assert torch.equal(cond.concat[0], model(HYBRID_INPUTS).concat[0])
    assert bool((cond.concat[1, 0] == 1).all()) and not cond.concat[1, 1:].any()


def test_a_null_without_the_picture_is_never_taken_for_one_with_it():
    model = hybrid()
    assert model.null(2).concat is None
    with pytest.raises(AssertionError, match="lack concat"):
        model(HYBRID_INPUTS).cat(model.null(2))


def test_a_hybrid_that_lacks_one_of_its_inputs_says_which():
    model = hybrid()
    with pytest.raises(RequestError, match="wants a class .*, but was given no condition"):
        model(ConditionInputs(count=2, **CONCATENATING["inpainting"][1]))
    with pytest.raises(RequestError, match="wants a picture and a mask .*was given a class"):
        model(ConditionInputs(count=2, labels=[0, 1]))


def test_settings_of_a_hybrid_are_those_of_both():
    settings = hybrid().settings()
    assert settings["kind"] == "hybrid"
    assert settings["main"]["class_names"] == ["hat", "shoe"]
    assert settings["spatial"] == InpaintingConditionerConfig().to_dict()


def test_two_of_one_way_are_no_hybrid():
    with pytest.raises(AssertionError, match="each has its own way in"):
        HybridConditioner(inpainting(), inpainting())
    assert HybridConditioner(Unconditional(), inpainting()).wants is None
