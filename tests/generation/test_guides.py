"""Guides: what they measure, and real models that are led by them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mezzotint.cli.asked import guides_of, interval
from mezzotint.errors import RequestError
from mezzotint.generation.generate import generate
from mezzotint.generation.guides import (
    Guide,
    classifier_guide,
    colour_energy,
    guide_uses,
    known_pixels_energy,
    low_res_energy,
)
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.generation.request import GenerationRequest

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
PIXEL_DIFFUSION = {
    "data": {"kind": "emoji", "subset": "demo-48", "resolution": 32, "tag_probability": 0.0},
    "first_stage": {"kind": "identity"},
    "unet__in_channels": 3,
    "unet__out_channels": 3,
    "unet__cross_attention_dim": None,
    "conditioning": {"kind": "none"},
    "optimizer": {"learning_rate": 2e-3},
    "ema_decay": 0.9,
    "batch_size": 8,
    "budget": {"max_steps": 100},
}


@pytest.fixture(scope="module")
def unconditional(tiny, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Pixel diffusion of emoji that nobody told anything."""
    recipe = tiny.diffusion(**PIXEL_DIFFUSION)
    run = tiny.train(recipe, tmp_path_factory.mktemp("unconditional") / "run")
    return load(run, precision="float32")


@pytest.fixture(scope="module")
def pipeline(text_run: Path) -> Pipeline:
    return load(text_run, precision="float32")


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float) / 127.5 - 1


def small(image: Image.Image) -> Image.Image:
    return image.resize((8, 8), Image.Resampling.BOX)


def psnr(image: Image.Image, target: Image.Image) -> float:
    return 10 * math.log10(4 / ((values(small(image)) - values(target)) ** 2).mean())


def picture(seed: int = 0, side: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(60, 200, (side, side, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("filter", ["area", "bicubic"])
def test_a_small_picture_of_itself_costs_nothing(filter: str) -> None:
    shrunk = (
        torch.nn.functional.adaptive_avg_pool2d(IMAGES, 4)
        if filter == "area"
        else torch.nn.functional.interpolate(IMAGES, (4, 4), mode="bicubic", antialias=True)
    )
    energy = low_res_energy(shrunk[1], filter)(IMAGES)
    assert energy[1] == 0 and energy[0] > 1 and energy[2] > 1
    # 48 values that are off by the 0.05 that is allowed cost half each
    off = low_res_energy(shrunk[1] + 0.05, filter)(IMAGES)[1]
    assert off.item() == pytest.approx(24, rel=1e-4)


def test_a_colour_is_meant_where_the_mask_is_white() -> None:
    region = torch.zeros(1, 8, 8)
    region[:, :4] = 1
    images = IMAGES.clone()
    images[:, :, :8] = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    mean = torch.tensor([0.1, 0.2, 0.3])
    half = images[:, :, :7]  # the mask is enlarged softly, so its edge is left out
    inside = torch.zeros(1, 7, 16)
    inside[:, :6] = 1
    assert colour_energy(mean, inside)(half).abs().max() < 1e-6
    assert (colour_energy(mean, region)(IMAGES) > 1).all()
    everywhere = colour_energy(IMAGES[0].mean((1, 2)))(IMAGES)
    assert everywhere[0] < 1e-6 < everywhere[1]
    with pytest.raises(RequestError, match="its mask is black all over"):
        colour_energy(mean, torch.zeros(1, 4, 4))


def test_known_pixels_are_those_under_black() -> None:
    mask = torch.ones(1, 16, 16)
    mask[:, :5, :7] = 0
    target = IMAGES[0].clone()
    target[:, 5:], target[:, :, 7:] = 9.0, 9.0
    energy = known_pixels_energy(target, mask)(IMAGES)
    assert energy[0] == 0 and energy[1] > 1
    with pytest.raises(RequestError, match="its mask is 4x4, but its picture is 16x16"):
        known_pixels_energy(target, torch.ones(1, 4, 4))


def test_a_classifier_leads_to_its_class() -> None:
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # the class is the channel
    energy = classifier_guide(classifier, 2)(IMAGES)
    expected = -IMAGES.mean((2, 3)).log_softmax(1)[:, 2]
    torch.testing.assert_close(energy, expected)


def test_an_unconditional_model_reaches_a_small_picture(unconditional: Pipeline) -> None:
    """The paper's low-resolution guiding (appendix C): from chance to 25 dB and more."""
    plain = unconditional.generate(num_images=3, steps=50, seed=100)
    target = small(plain[0].image)
    other = [psnr(drawn.image, target) for drawn in plain[1:]]
    drawn = unconditional.generate(
        guide=Guide(kind="low-res", image=target), num_images=3, steps=50, seed=0
    )
    agreement = [psnr(item.image, target) for item in drawn]
    assert max(other) < 20 and min(agreement) >= 25, (other, agreement)
    # the pictures differ among themselves as they differ from the one that the target is of
    detail = [
        values(item.image) - np.kron(values(small(item.image)), np.ones((4, 4, 1)))
        for item in (*drawn, plain[0])
    ]
    apart = [((detail[i] - detail[j]) ** 2).mean() for i in range(3) for j in range(i)]
    from_truth = [((detail[i] - detail[3]) ** 2).mean() for i in range(3)]
    assert np.mean(apart) > 0.5 * np.mean(from_truth)
    assert not any(p.grad is not None for p in unconditional.model.parameters())
    assert all(p.requires_grad for p in unconditional.model.unet.parameters())


def test_a_function_of_ones_own(unconditional: Pipeline) -> None:
    def symmetric(images: Tensor) -> Tensor:
        return (images - images.flip(3)).square().sum((1, 2, 3)) / (2 * 0.1**2)

    def asymmetry(image: Image.Image) -> float:
        return float(np.abs(values(image) - values(image)[:, ::-1]).mean())

    plain = unconditional.generate(steps=20)[0]
    led = unconditional.generate(guide=symmetric, steps=20)[0]
    assert asymmetry(led.image) < asymmetry(plain.image) / 4
    assert [(g.kind, g.name) for g in led.request.guides] == [("function", symmetric.__qualname__)]


def test_guides_add_up(unconditional: Pipeline) -> None:
    """Known pixels on the left, and a colour on the right."""
    known, mask = picture(1).resize((32, 32)), Image.new("L", (32, 32), 255)
    mask.paste(0, (0, 0, 16, 32))
    led = unconditional.generate(
        guide=[
            Guide(kind="known-pixels", image=known, mask=mask, scale=10),
            Guide(kind="colour", colour="#c08040", mask=mask),
        ],
        steps=20,
    )[0]
    got = values(led.image)
    assert np.abs(got - values(known))[:, :15].mean() < 0.1
    assert np.allclose(got[:, 16:].mean((0, 1)), [0.5, 0.0, -0.5], atol=0.2)


def test_a_picture_does_not_depend_on_its_neighbours(pipeline: Pipeline) -> None:
    fields = {"prompt": "a red apple", "steps": 4, "guide": Guide(kind="low-res", image=picture())}
    together = pipeline.generate(**fields, num_images=3)
    alone = pipeline.generate(**fields, num_images=3, batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert np.abs(values(a.image) - values(b.image)).max() <= 2.01 / 127.5
    plain = pipeline.generate("a red apple", steps=4)[0]
    assert plain.image.tobytes() != together[0].image.tobytes()


def test_a_led_picture_is_replayed_bit_for_bit(pipeline: Pipeline, tmp_path: Path) -> None:
    target = tmp_path / "small.png"
    picture().save(target)
    drawn = pipeline.generate(
        "a red apple", guide=Guide(kind="low-res", image=target, scale=0.5), steps=3
    )[0]
    path = tmp_path / "drawn.png"
    write_image(drawn.image, drawn.request, path)
    assert read_request(path) == drawn.request
    assert replay(path).image.tobytes() == drawn.image.tobytes()
    moved = target.rename(tmp_path / "moved.png")
    with pytest.raises(RequestError, match="no such file; supply"):
        replay(path)
    assert replay(path, inputs=[moved]).image.tobytes() == drawn.image.tobytes()


def test_what_a_function_led_is_not_replayed(pipeline: Pipeline, tmp_path: Path) -> None:
    drawn = pipeline.generate("a red apple", guide=lambda x: x.square().sum((1, 2, 3)), steps=2)[0]
    write_image(drawn.image, drawn.request, tmp_path / "drawn.png")
    with pytest.raises(RequestError, match=r"the Python function '.*<lambda>' guided this"):
        replay(tmp_path / "drawn.png")
    with pytest.raises(RequestError, match="holds only its name"):
        generate(pipeline, drawn.request)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.mean(), r"expected one energy for each of 1 images.*got \(\)"),
        (lambda x: 1.0, "got <class 'float'>"),
        (lambda x: x.detach().sum((1, 2, 3)), "is not differentiable"),
        (lambda x: x.sum((1, 2, 3)) * math.nan, "infinite or not a number"),
    ],
)
def test_bad_functions_are_told(pipeline: Pipeline, function: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pipeline.generate("a red apple", guide=function, steps=2)


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide(kind="low-res"), "image: required by the guide 'low-res'"),
        (Guide(kind="colour", colour="orange"), "colour: String should match"),
        (Guide(kind="colour", colour="#ff8800", filter="area"), "filter: not for the guide"),
        (Guide(kind="known-pixels", image=picture()), "mask: required"),
        (Guide(kind="colour", colour="#ff8800", scale=0), "scale: Input should be greater"),
        ("low-res", "expected a Guide or a function"),
    ],
)
def test_bad_guides_are_told(guide: Guide, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        guide_uses(guide, InputPictures())


def test_a_target_that_is_larger_than_the_picture_is_told(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="is 64x64, larger than the 32x32"):
        guide = Guide(kind="low-res", image=picture(side=64))
        pipeline.generate("a red apple", guide=guide, steps=2)


def test_a_second_pass_is_led_too(unconditional: Pipeline) -> None:
    target = picture(4)
    drawn = unconditional.generate(
        guide=Guide(kind="low-res", image=target, scale=4),
        steps=10,
        high_res={"scale": 1.5, "strength": 0.5},
    )[0]
    assert drawn.image.size == (48, 48) and psnr(drawn.image, target) > 25


def test_classifier_free_guidance_in_an_interval(pipeline: Pipeline) -> None:
    common = {"prompt": "a red apple", "steps": 4}
    sizes: list[int] = []
    hook = pipeline.model.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    full = pipeline.generate(**common, guidance_scale=5.0)[0].image
    everywhere = pipeline.generate(**common, guidance_scale=5.0, guidance_interval=(0.0, 1e4))[0]
    assert sizes == [2] * 8
    nowhere = pipeline.generate(**common, guidance_scale=5.0, guidance_interval=(1e4, 2e4))[0]
    assert sizes[8:] == [1] * 4
    some = pipeline.generate(**common, guidance_scale=5.0, guidance_interval=(0.5, 20.0))[0]
    assert set(sizes[12:]) == {1, 2}
    hook.remove()
    assert everywhere.image.tobytes() == full.tobytes()
    plain = pipeline.generate(**common, guidance_scale=1.0)[0].image
    assert nowhere.image.tobytes() == plain.tobytes()
    assert some.image.tobytes() not in (full.tobytes(), plain.tobytes())
    assert some.request.guidance_interval == (0.5, 20.0)


def test_an_interval_has_a_lower_and_an_upper_end() -> None:
    assert interval(None) is None and interval("0.2,5") == (0.2, 5.0)
    for text in ("5", "a,b", "1,2,3"):
        with pytest.raises(RequestError, match="expected two noise levels"):
            interval(text)
    with pytest.raises(RequestError, match=r"5.0 is not below 0.2"):
        GenerationRequest.from_dict({"task": "unconditional", "guidance_interval": [5, 0.2]})


def test_guides_are_read_as_they_are_typed(tmp_path: Path) -> None:
    pictures = InputPictures()
    small_, mask = tmp_path / "a:b.png", tmp_path / "mask.png"
    picture().save(small_)
    Image.new("L", (8, 8)).save(mask)
    assert guides_of(None, pictures) is None
    typed = [f"low-res:{small_}", f"low-res:{small_}:2", "colour:#ff8800:0.5"]
    found = guides_of([*typed, f"known-pixels:{small_},{mask}:3"], pictures)
    assert found is not None
    sums = [pictures.add(small_), pictures.add(mask)]
    assert found == (
        {"kind": "low-res", "image": sums[0]},
        {"kind": "low-res", "image": sums[0], "scale": 2.0},
        {"kind": "colour", "colour": "#ff8800", "scale": 0.5},
        {"kind": "known-pixels", "image": sums[0], "mask": sums[1], "scale": 3.0},
    )
    GenerationRequest.from_dict({"task": "unconditional", "guides": found})
    with pytest.raises(RequestError, match="did you mean 'colour'"):
        guides_of(["color:#ff8800"], pictures)
    with pytest.raises(RequestError, match="expected known-pixels:PICTURE,MASK"):
        guides_of([f"known-pixels:{small_}"], pictures)
