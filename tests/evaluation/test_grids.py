"""Grids and strips: where each picture stands, and that a strip's ends are real pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.errors import RequestError
from mezzotint.evaluation.grids import (
    InterpolatedNoise,
    denoising_strip,
    image_grid,
    interpolation_strip,
    labelled_rows,
    reconstruction_grid,
)
from mezzotint.generation.generate import (
    decode_latents,
    generate_each,
    sample_latents,
    to_images,
)
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.rng import SampleNoise

GAP = 4


@pytest.fixture(scope="module")
def pipeline(text_run: Path) -> Pipeline:
    return load(text_run, device="cpu", precision="float32")


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 10), colour)


def cells(sheet: Image.Image, columns: int, rows: int = 1, side: int = 32) -> np.ndarray:
    """The pictures ``(rows, columns, side, side, 3)`` that stand right and below in a sheet."""
    pixels = np.asarray(sheet)
    pitch = side + GAP
    corner = pixels[pixels.shape[0] - rows * pitch :, pixels.shape[1] - columns * pitch :]
    found = corner.reshape(rows, pitch, columns, pitch, 3).swapaxes(1, 2)
    return found[:, :, :side, :side]


def test_rows_of_pictures_stand_under_one_another_beside_their_names() -> None:
    rows = {"a name": [plain("red"), plain("lime")], "b": [plain("blue")]}
    sheet = labelled_rows(rows, headings=["one", "two"], scale=2)
    bare = labelled_rows({"": rows["a name"]}, scale=2)
    assert bare.size == (GAP + 2 * 44, GAP + 24)
    left = sheet.width - 2 * 44
    assert sheet.height == GAP + 16 + 2 * 24
    assert [sheet.getpixel((left + x, 20 + y)) for x, y in ((0, 0), (83, 19), (39, 24))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    names = np.asarray(sheet)[20:, :left]
    assert (names < 128).any()
    assert (np.asarray(sheet)[:20, left:] < 128).any()
    assert sheet.getpixel((left + 44, 20 + 24)) == (255, 255, 255)


def test_headings_take_as_many_lines_as_they_need() -> None:
    row = {"": [plain("red"), plain("lime")]}
    one, three = (
        labelled_rows(row, headings=["apple", text], scale=3) for text in ("", "red blue on green")
    )
    assert three.height == one.height + 16
    ink = (np.asarray(three.convert("L")) < 128)[:36, :]
    assert ink[20:36, 70:].any() and not ink[20:36, :60].any()


def test_a_grid_goes_row_by_row() -> None:
    sheet = image_grid([plain("red"), plain("lime"), plain("blue")], columns=2)
    assert sheet.size == (2 * 24 + GAP, 2 * 14 + GAP)
    assert [sheet.getpixel(at) for at in ((5, 5), (30, 5), (5, 20), (30, 20))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_reconstructions_stand_below_their_originals_with_their_errors() -> None:
    originals = torch.full((3, 3, 32, 32), 100, dtype=torch.uint8)
    near, far = originals.clone(), originals.clone()
    near[1, :, 0, 0] += 10
    near[1, 0, 0, 1] += 30  # one channel of three
    far[2] = 255
    sheet = reconstruction_grid(originals, {"near": near, "far": far}, error_maps=True)
    found = cells(sheet, columns=3, rows=5)
    for row, images in ((0, originals), (1, near), (3, far)):
        assert np.array_equal(found[row], images.permute(0, 2, 3, 1).numpy())
    expected = np.zeros((32, 32, 3))
    expected[0, :2] = 40
    assert np.array_equal(found[2, 1], expected)
    assert not found[2, 0].any()
    assert (found[4, 2] == 255).all()
    assert cells(reconstruction_grid(originals, {"near": near}), 3, 2).shape[0] == 2


def test_noise_between_two_seeds_is_still_noise() -> None:
    shape, fractions = (4, 64, 64), [k / 7 for k in range(8)]
    noise = InterpolatedNoise((3, 4), fractions)
    for step in (-1, 5):
        drawn = noise.normal(shape, step)
        ends = SampleNoise([3, 4]).normal(shape, step)
        assert torch.equal(drawn[[0, -1]], ends)
        # of 16,384 numbers; the straight way would give 0.71 in the middle
        torch.testing.assert_close(drawn.std((1, 2, 3)), torch.ones(8), atol=0.03, rtol=0)
    assert not torch.equal(noise.normal(shape, 5), noise.normal(shape, 6))


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_an_interpolation_ends_in_the_pictures_of_its_seeds(
    pipeline: Pipeline, sampler: str
) -> None:
    request = pipeline.request(prompt="red apple", steps=3, sampler=sampler, seed=99)
    strip = interpolation_strip(pipeline, request, (7, 2), columns=4)
    found = cells(strip, columns=4)[0]
    rows = [request.model_copy(update={"seed": s}) for s in (7, 7, 2, 2)]
    drawn = [np.asarray(d.image) for d in generate_each(pipeline, rows, batch_size=4)]
    assert np.array_equal(found[0], drawn[0])
    assert np.array_equal(found[-1], drawn[-1])
    ways = [np.abs(found[k].astype(int) - found[0]).mean() for k in range(4)]
    assert 0 == ways[0] < ways[1] < ways[2] < ways[3]


def test_denoising_ends_in_the_picture(pipeline: Pipeline) -> None:
    request = pipeline.request(prompt="red apple", steps=5, sampler="ddim", seed=4)
    strip = denoising_strip(pipeline, request, columns=3, noisy=True)
    states, estimates = cells(strip, columns=3, rows=2)
    drawn = np.asarray(generate_each(pipeline, [request])[0].image).astype(int)
    # ddim's last step is its last estimate; decoded three at a time instead of alone
    for last in (states[-1], estimates[-1]):
        assert np.abs(last - drawn).max() <= 1
    assert not np.array_equal(states[0], estimates[0])
    assert not np.array_equal(estimates[0], estimates[-1])
    alone = denoising_strip(pipeline, request, columns=3)
    assert np.array_equal(cells(alone, columns=3)[0], estimates)


def test_a_state_is_decoded_at_the_variance_of_latents(pipeline: Pipeline) -> None:
    """Early states are nearly noise, which is of variance 1 and not of sigma squared."""
    request = pipeline.request(prompt="red apple", steps=5, sampler="euler", seed=4)
    kept: list[torch.Tensor] = []
    sample_latents(pipeline, [request], callback=lambda _i, _n, x, _d: kept.append(x))
    early = kept[0] / kept[0].std()
    assert float(kept[0].std()) > 3
    decoded = to_images(decode_latents(pipeline, early))[0]
    strip = denoising_strip(pipeline, request, columns=2, noisy=True)
    state = cells(strip, columns=2, rows=2)[0, 0].astype(int)
    assert np.abs(state - np.asarray(decoded)).mean() < 3


def test_a_strip_shows_all_steps_where_there_are_few(pipeline: Pipeline) -> None:
    request = pipeline.request(prompt="red apple", steps=2)
    strip = denoising_strip(pipeline, request, columns=8)
    assert strip.width == GAP + 2 * (32 + GAP)
    one = denoising_strip(pipeline, request.model_copy(update={"steps": 1}), columns=8)
    assert one.width == GAP + 32 + GAP


def test_a_strip_of_one_picture_is_refused(pipeline: Pipeline) -> None:
    request = pipeline.request(prompt="red apple", steps=2)
    with pytest.raises(RequestError, match="at least 2 pictures, got 1"):
        denoising_strip(pipeline, request, columns=1)
    with pytest.raises(RequestError, match="at least 2 pictures, got 0"):
        interpolation_strip(pipeline, request, (0, 1), columns=0)
