"""A student of few steps: what it begins as, what it learns, how it is written and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from tiny_pipelines import CONDITIONERS, kl, model
from torch import Tensor, nn

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.model import save_model
from mezzotint.diffusion.loss import pseudo_huber
from mezzotint.errors import ConfigError
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.sampling import sample_latents
from mezzotint.training.distill import student_of

PLAIN = {"conditioning": {"kind": "none"}, "unet__cross_attention_dim": None}


@pytest.fixture(scope="module")
def text_student(tiny, text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train(tiny.distill(text_run), tmp_path_factory.mktemp("student") / "run")


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_student_begins_as_its_teacher(text_run) -> None:
    teacher = load_any(text_run).model
    student = student_of(teacher.unet, 16)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), teacher.conditioner.null(2)
    told = {"context": cond.crossattn, "context_mask": cond.crossattn_mask}
    with torch.no_grad():
        expected = teacher.unet(x, t, **told)
        found = student(x, t, **told, guidance=torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(found, expected)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_loss_is_squared_near_zero_and_absolute_far_from_it() -> None:
    zero = torch.zeros(2, 3)
    near = pseudo_huber(torch.full((2, 3), 1e-3), zero, 0.1)  # d**2 / (2 c)
    torch.testing.assert_close(near, torch.full((2,), 5e-6), rtol=1e-2, atol=0)
    far = pseudo_huber(zero, torch.full((2, 3), 5.0), 0.01)
    torch.testing.assert_close(far, torch.full((2,), 4.99), rtol=1e-5, atol=0)


def test_what_is_written_says_how_it_is_sampled(text_student: Path) -> None:
    folder = text_student / "model"
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert theirs.config.time_cond_proj_dim == 16
    assert theirs.time_embedding.cond_proj.weight.any(), "the guidance was learned"
    pipeline = load(text_student, precision="float32")
    request = pipeline.request(prompt="a red apple")
    assert (request.sampler, request.steps, request.guidance_scale) == ("lcm", 4, 3.0)
    pictures = [
        pipeline.generate("a red apple", guidance_scale=scale)[0].image.tobytes()
        for scale in (1.0, 5.0)
    ]
    assert pictures[0] != pictures[1]
    assert (text_student / "samples").is_dir()


@pytest.mark.parametrize("kind", ["class", "inpainting", "nothing"])
def test_whatever_the_teacher_is_told(tiny, class_run: Path, kind: str, tmp_path: Path) -> None:
    where = class_run if kind == "class" else tmp_path / "teacher"
    if kind != "class":
        torch.manual_seed(0)
        untrained = model(CONDITIONERS[kind](), kl(), size=(32, 32))
        nn.init.normal_(untrained.unet.conv_out.weight, std=0.1)
        save_model(untrained, where)
    student = load_any(tiny.train(tiny.distill(where), tmp_path / "run")).model
    teacher = load_any(where).model
    told = kind == "class"  # what is told nothing by attention is not guided
    assert student.unet.config.guidance_embed_dim == (16 if told else None)
    moved = student.unet.conv_in.weight - teacher.unet.conv_in.weight
    assert 1e-4 < moved.abs().max() < 1
    for key, value in teacher.conditioner.state_dict().items():
        assert torch.equal(student.conditioner.state_dict()[key], value)


def drawn(pipeline: Pipeline, **asked: Any) -> Tensor:
    return sample_latents(pipeline, [pipeline.request(seed=seed, **asked) for seed in range(16)])


def test_few_steps_come_nearer_to_the_teacher_than_its_own(tiny, tmp_path: Path) -> None:
    """From the same noise, against the end of the teacher's path in 50 steps."""
    quick = {"batch_size": 8, "latent_variants": 1, "run": {"log_steps": 20}}
    taught = tiny.diffusion(
        **PLAIN, **quick, budget={"max_steps": 60}, optimizer={"learning_rate": 5e-3}
    )
    teacher = tiny.train(taught, tmp_path / "teacher")
    rate = {"learning_rate": 5e-3, "warmup_steps": 10}
    recipe = tiny.distill(teacher, **quick, budget={"max_steps": 160}, optimizer=rate)
    student = tiny.train(recipe, tmp_path / "student")
    found = losses(student)
    assert sum(found[-3:]) / 3 < 0.8 * found[0], found
    old, new = (load(run, precision="float32", device="cpu") for run in (teacher, student))
    end = drawn(old, steps=50, sampler="ddim", spacing="trailing")
    for steps in (1, 2):
        own = (drawn(old, steps=steps, sampler="ddim", spacing="trailing") - end).square().mean()
        few = (drawn(new, steps=steps, eta=0.0) - end).square().mean()
        print(steps, float(own), float(few))
        assert few < 0.6 * own, (steps, float(few), float(own))


def test_what_does_not_fit_is_refused(tiny, text_run, text_student, tmp_path) -> None:
    for changes, message in (
        ({"guidance_range": [5.0, 2.0]}, "guidance_range: 5 is above 2"),
        ({"guidance_scale": 9.0}, "guidance_scale 9 is outside of guidance_range 1 to 5"),
        ({"ema_decay": None}, "is the target network"),
        ({"ema": {"kind": "power"}, "ema_decay": None}, "power functions are not"),
        ({"run": {"compile": True}}, "run.compile is not for distillation"),
        ({"sample_steps": 60}, "sample_steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.distill(text_run, **changes)
    with pytest.raises(ConfigError, match="teacher: .* was distilled to be told its guidance"):
        tiny.train(tiny.distill(text_student), tmp_path / "run")
