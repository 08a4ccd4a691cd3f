"""The same request draws the same picture, alone or in company, now or later."""

import shutil

import numpy as np
import pytest
from PIL import Image

from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError
from mezzotint.generation.generate import generate, generate_each
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def pipeline(text_run) -> Pipeline:
    return load(text_run, precision="float32")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_k_of_a_batch_equals_the_image_drawn_alone(pipeline, sampler):
    common = {"prompt": "a red apple", "steps": 4, "sampler": sampler}
    batch = pipeline.generate(**common, num_images=8, seed=5, batch_size=8)
    for k in (0, 3, 7):
        alone = pipeline.generate(**common, seed=5 + k)
        assert abs(pixels(batch[k].image) - pixels(alone[0].image)).max() <= 1
    assert (pixels(batch[0].image) != pixels(batch[1].image)).any()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_replay_is_bit_for_bit(text_run, tmp_path, precision, index):
    """Whole batches and the smaller last one, at the recorded precision."""
    drawn = load(text_run, precision=precision).generate(
        "a rocket", num_images=5, batch_size=3, seed=11, steps=3, sampler="euler_ancestral"
    )
    path = tmp_path / "picture.png"
    write_image(drawn[index].image, drawn[index].request, path)
    again = replay(path)
    assert again.image.tobytes() == drawn[index].image.tobytes()
    assert again.request == drawn[index].request == read_request(path)


def test_a_picture_drawn_beside_other_captions_is_replayed(text_run, tmp_path):
    pipeline = load(text_run)
    prompts = ["a red apple", "a very long caption about a blue car", "", "a robot"]
    requests = [pipeline.request(prompt=p, seed=k, steps=3) for k, p in enumerate(prompts)]
    for item in generate_each(pipeline, requests):
        write_image(item.image, item.request, tmp_path / "picture.png")
        assert replay(tmp_path / "picture.png").image.tobytes() == item.image.tobytes()


def test_replay_refuses_a_model_with_another_schedule(text_run, tmp_path):
    model = shutil.copytree(text_run / "model", tmp_path / "model")
    drawn = load(model).generate("a rocket", steps=1)
    write_image(drawn[0].image, drawn[0].request, tmp_path / "picture.png")
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.00085", "0.0008"))
    with pytest.raises(RequestError, match="drawn by a model with the hash"):
        replay(tmp_path / "picture.png")


def test_a_request_for_another_task_is_refused(text_run, class_run):
    request = load(class_run).request(class_label=0)
    with pytest.raises(RequestError, match="'text-to-image', not 'class-to-image'"):
        generate(load(text_run), request)


def test_replay_refuses_another_model(text_run, class_run, tmp_path):
    drawn = load(text_run).generate("a rocket", steps=1)
    path = tmp_path / "picture.png"
    write_image(drawn[0].image, drawn[0].request, path)
    with pytest.raises(RequestError, match="name the right one with --model"):
        replay(path, model=str(class_run))


def test_other_sizes_are_drawn_and_indivisible_ones_refused(pipeline):
    drawn = pipeline.generate("a rocket", steps=2, width=48, height=24)
    assert drawn[0].image.size == (48, 24)
    with pytest.raises(RequestError, match=r"width 30 is not divisible by f = 4.* 28 or 32"):
        pipeline.generate("a rocket", steps=2, width=30)


def test_a_negative_prompt_changes_the_picture(pipeline):
    plain = pipeline.generate("a rocket", steps=3, guidance_scale=4.0)
    away = pipeline.generate("a rocket", steps=3, guidance_scale=4.0, negative_prompt="a cat")
    assert (pixels(plain[0].image) != pixels(away[0].image)).any()


def test_guidance_of_one_ignores_the_null(pipeline):
    plain = pipeline.generate("a rocket", steps=3, guidance_scale=1.0)
    away = pipeline.generate("a rocket", steps=3, guidance_scale=1.0, negative_prompt="a cat")
    assert (pixels(plain[0].image) == pixels(away[0].image)).all()


def test_progress_counts_every_step_of_every_batch(pipeline):
    seen: list[tuple[int, int]] = []
    pipeline.generate(
        "x",
        steps=3,
        num_images=3,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k, 6) for k in range(1, 7)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_label": "cat"}, "wants a prompt"),
        ({}, "wants a prompt"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": -3}, "steps"),
        ({"prompt": "x", "steps": 1001}, "more than the 1000 noise levels"),
        ({"prompt": "x", "sampler": "dimm"}, "did you mean 'ddim'"),
        ({"prompt": "x", "sampler": "heun", "eta": 0.5}, "no option eta"),
        ({"prompt": "x", "num_images": 0}, "num_images"),
        ({"prompt": "x", "batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_given_is_refused(pipeline, fields, message):
    with pytest.raises(RequestError, match=message):
        pipeline.generate(**fields)


def test_a_prompt_to_a_class_model_names_its_classes(class_run):
    with pytest.raises(RequestError, match=r"wants a class \(--class, one of: .*given a prompt"):
        load(class_run).generate("a cat", steps=1)
