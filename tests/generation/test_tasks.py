"""Drawing from a picture, with masks, twice and with variations, with a small real model."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mezzotint.errors import RequestError
from mezzotint.generation import sampling
from mezzotint.generation.generate import generate
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.metadata import write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.generation.request import HighRes
from mezzotint.models import autoencoder
from mezzotint.models.striped import decode_in_stripes

COMMON = {"prompt": "a red apple", "steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def pipeline(text_run: Path) -> Pipeline:
    return load(text_run, precision="float32")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photograph(width: int = 32, height: int = 32) -> Image.Image:
    """A picture of something: smooth colours with a corner of noise."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // width, y * 255 // height, (x + y) * 4 % 256], axis=-1)
    values[:8, :8] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    return Image.fromarray(values.astype(np.uint8))


def mask_of(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(("strength", "made"), [(0.05, 1), (0.25, 1), (0.5, 2), (0.99, 3), (1, 4)])
def test_strength_is_the_share_of_the_steps(pipeline: Pipeline, strength: float, made: int) -> None:
    told: list[tuple[int, int]] = []
    drawn = pipeline.generate(
        **COMMON,
        image=photograph(),
        strength=strength,
        on_progress=lambda done, of: told.append((done, of)),
    )[0]
    assert told == [(k + 1, made) for k in range(made)]
    assert drawn.request.task == "image-to-image" and drawn.image.size == (32, 32)


def test_at_full_strength_a_mask_is_filled_from_noise_alone(pipeline: Pipeline) -> None:
    """Of the picture under the mask nothing is left."""
    mask = mask_of(32, 32, (0, 0, 32, 32))
    drawn = pipeline.generate(**COMMON, image=photograph(), mask=mask)[0]
    assert drawn.image.tobytes() == pipeline.generate(**COMMON)[0].image.tobytes()


@pytest.mark.parametrize("strength", [0.5, 1.0, None])
@pytest.mark.parametrize("size", [(32, 32), (30, 45)])
def test_inpainting_leaves_every_other_pixel_exactly(
    pipeline: Pipeline, size: tuple[int, int], strength: float | None
) -> None:
    picture, mask = photograph(*size), mask_of(*size, (9, 10, 21, 23))
    drawn = pipeline.generate(**COMMON, image=picture, mask=mask, strength=strength)[0]
    assert drawn.image.size == size
    kept = pixels(mask) == 0
    assert (pixels(drawn.image)[kept] == pixels(picture)[kept]).all()
    assert (pixels(drawn.image)[~kept] != pixels(picture)[~kept]).any()


def test_a_soft_mask_blends(pipeline: Pipeline) -> None:
    picture = photograph()
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24], mask[12:20, 12:20] = 64, 255
    soft = pixels(pipeline.generate(**COMMON, image=picture, mask=Image.fromarray(mask))[0].image)
    hard = Image.fromarray(np.where(mask > 127, 255, 0).astype(np.uint8))
    drawn = pipeline.generate(**COMMON, image=picture, mask=hard)[0].image
    inside = mask == 255
    assert (soft[inside] == pixels(drawn)[inside]).all()
    assert (soft[mask == 0] == pixels(picture)[mask == 0]).all()


@pytest.mark.parametrize("padding", [(8, 0, 0, 0), (3, 5, 7, 10), (0, 0, 0, 1)])
def test_outpainting_adds_around_the_picture(
    pipeline: Pipeline, padding: tuple[int, int, int, int]
) -> None:
    picture = photograph()
    drawn = pipeline.generate(**COMMON, image=picture, padding=padding)[0]
    left, above, right, below = padding
    assert drawn.request.task == "outpainting"
    assert drawn.image.size == (32 + left + right, 32 + above + below)
    inside = drawn.image.crop((left, above, left + 32, above + 32))
    assert inside.tobytes() == picture.tobytes()


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_is_larger_and_of_the_first(pipeline: Pipeline, upscaler: str) -> None:
    first = pipeline.generate(**COMMON)[0].image
    drawn = pipeline.generate(
        **COMMON, high_res=HighRes(scale=1.5, strength=0.3, upscaler=upscaler)
    )[0]
    assert drawn.image.size == (48, 48)
    small = pixels(drawn.image.resize((32, 32), Image.Resampling.BOX))
    other = pipeline.generate(**{**COMMON, "seed": 99})[0].image
    near, far = abs(small - pixels(first)).mean(), abs(small - pixels(other)).mean()
    assert near < far


def test_variations_turn_from_one_seed_to_another(pipeline: Pipeline) -> None:
    plain = pipeline.generate(**COMMON)[0].image
    other = pipeline.generate(**{**COMMON, "seed": 50})[0].image
    varied = {
        s: pipeline.generate(**COMMON, variation_seed=50, variation_strength=s)[0].image
        for s in (0.1, 1.0)
    }
    assert varied[1.0].tobytes() == other.tobytes()  # ddim draws no noise but the start
    assert abs(pixels(varied[0.1]) - pixels(plain)).mean() > 0
    several = pipeline.generate(**COMMON, variation_seed=49, variation_strength=0.1, num_images=2)
    assert abs(pixels(several[1].image) - pixels(varied[0.1])).max() <= 1


def test_picture_k_of_a_batch_is_the_one_drawn_alone(pipeline: Pipeline) -> None:
    picture, mask = photograph(), mask_of(32, 32, (4, 4, 20, 20))
    batch = pipeline.generate(**COMMON, image=picture, mask=mask, num_images=3)
    for k in (0, 2):
        alone = pipeline.generate(**{**COMMON, "seed": 3 + k}, image=picture, mask=mask)[0]
        assert abs(pixels(batch[k].image) - pixels(alone.image)).max() <= 1


def test_tiled_sampling_draws_beyond_the_trained_size(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline.generate(**COMMON)[0].image
    assert pipeline.generate(**COMMON, tiled_sampling=True)[0].image.tobytes() == plain.tobytes()
    large: dict[str, Any] = {**COMMON, "width": 128, "height": 96}
    whole = pipeline.generate(**large)[0]
    monkeypatch.setattr(sampling, "tile_of", lambda height, width: 16)
    tiled = pipeline.generate(**large, tiled_sampling=True)[0]
    assert tiled.image.size == (128, 96) and tiled.request.tiled_sampling
    assert tiled.image.tobytes() != whole.image.tobytes()


def test_tiled_decoding_is_decoding(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    large: dict[str, Any] = {**COMMON, "width": 128, "height": 96, "num_images": 2}
    plain = pipeline.generate(**large)
    monkeypatch.setattr(autoencoder, "decode_in_stripes", partial(decode_in_stripes, stripe=1))
    tiled = pipeline.generate(**large, tiled_decoding=True)
    assert all(drawn.request.tiled_decoding for drawn in tiled)
    for a, b in zip(plain, tiled, strict=True):
        # a value that stands between two bytes may fall to either
        assert abs(pixels(a.image) - pixels(b.image)).max() <= 1


def test_a_tiling_picture_fits_together(pipeline: Pipeline) -> None:
    drawn = pixels(pipeline.generate(**COMMON, tiling=True)[0].image)
    plain = pixels(pipeline.generate(**COMMON)[0].image)
    inner = abs(np.diff(drawn, axis=1)).mean((0, 2))
    seam = abs(drawn[:, 0] - drawn[:, -1]).mean()
    assert seam < 2 * inner.max()
    assert (drawn != plain).any()


def test_inputs_are_recorded_and_held_to_their_sum(pipeline: Pipeline, tmp_path: Path) -> None:
    first, mask = tmp_path / "in.png", tmp_path / "mask.png"
    photograph().save(first)
    mask_of(32, 32, (4, 4, 20, 20)).save(mask)
    drawn = pipeline.generate(**COMMON, image=first, mask=mask, num_images=2)[1]
    request = drawn.request
    assert request.image is not None and request.image.path == str(first)
    assert request.image.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    path = tmp_path / "out.png"
    write_image(drawn.image, request, path)
    assert replay(path).image.tobytes() == drawn.image.tobytes()

    moved = first.rename(tmp_path / "moved.png")
    with pytest.raises(RequestError, match=r"in\.png: no such file; supply .* with --input"):
        replay(path)
    assert replay(path, inputs=[moved]).image.tobytes() == drawn.image.tobytes()

    photograph(32, 32).transpose(Image.Transpose.ROTATE_90).save(first)
    with pytest.raises(RequestError, match=r"in\.png: refused: its sha256 is"):
        replay(path)
    with pytest.raises(RequestError, match="it is no input of this request"):
        replay(path, inputs=[first])


def test_a_picture_from_memory_is_known_by_its_pixels(pipeline: Pipeline, tmp_path: Path) -> None:
    picture = photograph()
    drawn = pipeline.generate(**COMMON, image=picture)[0]
    assert drawn.request.image is not None and drawn.request.image.of == "pixels"
    path = tmp_path / "out.png"
    write_image(drawn.image, drawn.request, path)
    with pytest.raises(RequestError, match="came from memory"):
        replay(path)
    picture.save(tmp_path / "in.png")  # losslessly: the same pixels
    assert replay(path, inputs=[tmp_path / "in.png"]).image.tobytes() == drawn.image.tobytes()


def test_the_request_alone_finds_its_files(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    photograph().save(path)
    request = pipeline.request(**COMMON, image=InputPictures().add(path))
    expected = pipeline.generate(**COMMON, image=path)[0].image
    assert generate(pipeline, request)[0].image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": mask_of(16, 16, (0, 0, 8, 8))}, "mask: is 16x16, but the image is 32x32"),
        ({"mask": Image.new("L", (32, 32))}, "mask: is black or dark all over"),
        ({"padding": (0, 0, 0, 0)}, "padding: adds nothing"),
        ({"padding": (8, 0, 0, 0), "width": 64}, "outpainting's size is the image's"),
        ({"strength": 0.0}, "strength: Input should be greater than 0"),
        ({"high_res": {"scale": 0.5}}, r"high_res\.scale"),
        ({"tiling": True, "tiled_decoding": True}, "exclude each other"),
        ({"tiling": True, "tiled_sampling": True}, "exclude each other"),
        ({"variation_strength": 0.5}, "need one another"),
        ({"back_projection": 2}, "back_projection: not for the task 'image-to-image'"),
        ({"poisson_blending": True}, "poisson_blending: not for the task 'image-to-image'"),
        ({"class_label": "fruit"}, "wants a prompt, but was given a class"),
        ({"semantic_map": Image.new("L", (32, 32))}, "semantic_map: not for the task"),
    ],
)
def test_what_cannot_be_is_told(pipeline: Pipeline, fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.generate(**COMMON, image=photograph(), **fields)


def test_a_mask_without_a_picture_is_told(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="image: required by the task 'inpainting'"):
        pipeline.generate(**COMMON, mask=mask_of(32, 32, (0, 0, 8, 8)))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"no picture"])
def test_a_file_that_is_no_picture_is_told(
    pipeline: Pipeline, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "in.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"in\.png: is no picture that can be read"):
        pipeline.generate(**COMMON, image=path)


def test_deep_grey_values_are_brought_to_eight_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pictures = InputPictures()
    found = pictures.get(pictures.add(tmp_path / "deep.png"))
    assert found.mode == "L" and abs(np.asarray(found).ravel() - np.arange(256.0)).max() <= 1
    with pytest.raises(RequestError, match="floating-point pixels have no known range"):
        pictures.add(Image.new("F", (8, 8)))


def test_palettes_and_turned_pictures_are_told_apart(tmp_path: Path) -> None:
    one, other = Image.new("P", (8, 8), 1), Image.new("P", (8, 8), 1)
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 255, 0])
    pictures = InputPictures()
    assert pictures.add(one).sha256 != pictures.add(other).sha256
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(16, 8).save(tmp_path / "turned.png", exif=turned)
    with Image.open(tmp_path / "turned.png") as file:
        assert pictures.get(pictures.add(file)).size == (8, 16)


def test_what_is_transparent_in_a_mask_is_kept(pipeline: Pipeline) -> None:
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (8, 8, 24, 24))
    picture = photograph()
    drawn = pipeline.generate(**COMMON, image=picture, mask=mask)[0].image
    kept = np.asarray(mask)[..., 3] == 0
    assert (pixels(drawn)[kept] == pixels(picture)[kept]).all()


def test_a_second_pass_ends_where_an_odd_picture_does(pipeline: Pipeline) -> None:
    drawn = pipeline.generate(
        **COMMON, image=photograph(30, 22), high_res=HighRes(scale=2, strength=0.3)
    )[0]
    assert drawn.image.size == (60, 44)


def test_spacing_is_recorded_as_it_was(pipeline: Pipeline) -> None:
    drawn = pipeline.generate(**COMMON, sampler="DPM++ 2M")[0]
    assert (drawn.request.sampler, drawn.request.spacing) == ("dpmpp_2m", "trailing")
    named = pipeline.generate(**COMMON, sampler="dpmpp_2m", spacing="Karras")[0]
    assert named.request.spacing == "karras"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "bad \udcff"}, "prompt: is no valid Unicode text"),
        ({"clip_skip": 2}, "clip_skip is for models with a CLIP text encoder"),
        ({"image": photograph(30, 32), "tiling": True}, "width 30 is not divisible by f"),
        ({"image": photograph(300, 300)}, r"scale it down, or say the size \(--size 300x300\)"),
        ({"variation_seed": 3}, "need one another"),
        ({"image": np.zeros((8, 8, 3))}, "a path or a PIL.Image, not a ndarray"),
    ],
)
def test_what_would_be_ignored_or_fail_is_refused(
    pipeline: Pipeline, fields: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.generate(**{**COMMON, **fields})
