"""Models of rectified flow, trained, written, read and drawn with in every way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.model import load_model
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.generation.guides import Guide
from mezzotint.generation.metadata import write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.generation.sampling import to_images
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.recipe import DiffusionRecipe

FLOW = {"schedule": {"kind": "flow", "shift": 2.0}, "times": {"kind": "logit_normal"}}
TEXT = {"prompt": "a red apple", "steps": 3, "seed": 3}


@pytest.fixture(scope="module")
def flow_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny.diffusion(**FLOW, weighting="min_snr")
    return tiny.train(recipe, tmp_path_factory.mktemp("flow") / "run")


@pytest.fixture(scope="module")
def pipeline(flow_run: Path) -> Pipeline:
    return load(flow_run, precision="float32")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photograph() -> Image.Image:
    y, x = np.mgrid[0:32, 0:32]
    values = np.stack([x * 8, y * 8, (x + y) * 4], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def test_resumed_equals_uninterrupted(tiny: Any, tmp_path: Path) -> None:
    def recipe(steps: int) -> DiffusionRecipe:
        return tiny.diffusion(**FLOW, budget={"max_steps": steps})

    whole = tiny.train(recipe(4), tmp_path / "whole")
    part = tiny.train(recipe(2), tmp_path / "part")
    tiny.train(recipe(4), part, resume=True)
    a, _ = newest_checkpoint(whole / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None and a.step == b.step == 4
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}.{name}"


@pytest.mark.parametrize("flow", [False, True])
def test_the_stream_of_a_sample_is_a_promise(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: bool
) -> None:
    """As it was before there were flows: a run of that time goes on with the same times."""
    seen: dict[int, Any] = {}
    made = DiffusionTask._make_batch

    def make(task: DiffusionTask, step: int) -> Any:
        seen[step] = made(task, step)
        return seen[step]

    monkeypatch.setattr(DiffusionTask, "_make_batch", make)
    changes = FLOW if flow else {}
    tiny.train(tiny.diffusion(**changes, budget={"max_steps": 1}), tmp_path / "run")
    first, t = seen[0], seen[0].drawn[:, 0]
    assert first.drop.tolist() == [False, True, True, False]
    assert first.seeds[0] == 3213723659418404481
    if flow:
        assert first.drawn.dtype == torch.float32 and bool((t != t.round()).all())
    else:
        assert first.drawn.dtype == torch.int64 and t.tolist() == [137, 905, 383, 214]


def test_a_trained_flow_learns_its_data(tiny: Any, tmp_path: Path) -> None:
    """Overfitting one colour: what is drawn has that colour, so the whole chain fits together."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (16, 16), (200, 40, 60)).save(folder / f"{k}.png")
    recipe = tiny.diffusion(
        data={"kind": "folder", "path": str(folder), "resolution": 16},
        first_stage={"kind": "identity"},
        unet__in_channels=3,
        unet__out_channels=3,
        unet__attention_levels=[False, False],
        unet__cross_attention_dim=None,
        conditioning={"kind": "none"},
        schedule={"kind": "flow"},
        optimizer={"learning_rate": 3e-3},
        ema_decay=0.9,
        batch_size=8,
        budget={"max_steps": 80},
    )
    run = tiny.train(recipe, tmp_path / "run")
    pipeline = load(run, precision="float32")
    for sampler in ("euler", "dpmpp_2m", "ddpm"):
        picture = pipeline.generate(steps=10, sampler=sampler, spacing="trailing")[0].image
        colour = torch.from_numpy(pixels(picture)).view(-1, 3).float().mean(0)
        off = (colour - torch.tensor([200.0, 40.0, 60.0])).abs().max()
        assert off < 25, (sampler, colour)


def test_the_folder_says_that_it_is_a_flow(flow_run: Path) -> None:
    folder = flow_run / "model"
    assert load_model(folder).schedule_config == FlowScheduleConfig(shift=2.0)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert (theirs.config.shift, theirs.config.num_train_timesteps) == (2.0, 1000)
    inspected = inspect_model(flow_run)
    assert (inspected.prediction, inspected.problems) == ("flow_prediction", ())


def test_models_that_differ_in_the_flow_alone_have_other_hashes(flow_run: Path) -> None:
    model = load_model(flow_run / "model")
    before = model.weights_hash()
    model.schedule_config = FlowScheduleConfig(shift=3.0)
    assert model.weights_hash() != before
    # a discrete one is hashed as before there were kinds
    assert "kind" not in ScheduleConfig().to_dict()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws(pipeline: Pipeline, name: str) -> None:
    drawn = pipeline.generate(**TEXT, sampler=name)[0]
    again = pipeline.generate(**TEXT, sampler=name)[0]
    assert drawn.image.tobytes() == again.image.tobytes()
    assert 2 < pixels(drawn.image).std() < 126  # neither flat nor clipped


def test_image_to_image_begins_from_the_picture(pipeline: Pipeline) -> None:
    picture = torch.from_numpy(pixels(photograph())).permute(2, 0, 1)[None] / 127.5 - 1
    model = pipeline.model
    with torch.no_grad():
        decoded = pixels(to_images(model.decode(model.encode(picture)))[0])

    def off(strength: float) -> float:
        told = TEXT | {"steps": 20, "image": photograph(), "strength": strength}
        return float(abs(pixels(pipeline.generate(**told)[0].image) - decoded).mean())

    assert off(0.05) < off(0.5) < off(1.0)


def test_guidance_its_rescale_and_its_interval(pipeline: Pipeline) -> None:
    plain, guided, rescaled, never, always = (
        pixels(pipeline.generate(**TEXT, **told)[0].image)
        for told in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 6.0},
            {"guidance_scale": 6.0, "guidance_rescale": 0.7},
            {"guidance_scale": 6.0, "guidance_interval": (1e-6, 1e-5)},
            {"guidance_scale": 6.0, "guidance_interval": (0.0, 4096.0)},
        )
    )
    assert (plain != guided).any() and (guided != rescaled).any()
    assert (plain == never).all() and (guided == always).all()


def test_what_is_known_is_held_in_inpainting(pipeline: Pipeline) -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    for strength in (0.5, 1.0):
        drawn = pipeline.generate(**TEXT, image=photograph(), mask=mask, strength=strength)[0]
        kept = pixels(mask) == 0
        assert (pixels(drawn.image)[kept] == pixels(photograph())[kept]).all()
        assert (pixels(drawn.image)[~kept] != pixels(photograph())[~kept]).any()


def test_a_picture_is_drawn_again_from_what_it_says(pipeline: Pipeline, tmp_path: Path) -> None:
    drawn = pipeline.generate(**TEXT, sampler="heun", spacing="linspace")[0]
    write_image(drawn.image, drawn.request, tmp_path / "a.png")
    assert replay(tmp_path / "a.png").image.tobytes() == drawn.image.tobytes()


def test_tiles_and_guides(pipeline: Pipeline) -> None:
    tiled = pipeline.generate(**TEXT, width=48, height=64, tiled_sampling=True)[0].image
    assert tiled.size == (48, 64)
    colours = [
        pixels(pipeline.generate(**TEXT, guide=Guide(kind="colour", colour=told))[0].image)
        .reshape(-1, 3)
        .mean(0)
        for told in ("#c02020", "#2020c0")
    ]
    assert colours[0][0] > colours[1][0] + 20 and colours[1][2] > colours[0][2] + 20


def test_inpainting_by_concatenation(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.diffusion(
        **FLOW,
        conditioning={"kind": "inpainting"},
        unet__in_channels=9,
        unet__cross_attention_dim=None,
        budget={"max_steps": 2},
    )
    pipeline = load(tiny.train(recipe, tmp_path / "run"), precision="float32")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    drawn = pipeline.generate(image=photograph(), mask=mask, steps=3)[0].image
    kept = pixels(mask) == 0
    assert (pixels(drawn)[kept] == pixels(photograph())[kept]).all()
    assert (pixels(drawn)[~kept] != pixels(photograph())[~kept]).any()
