"""Planted faults are named, healthy runs are left alone, and there is one way back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import mezzotint.training.run as run_module
from mezzotint.checkpoints.first_stages import load_first_stage, save_first_stage
from mezzotint.data import open_data
from mezzotint.data.base import Example
from mezzotint.device import select_precision
from mezzotint.errors import TrainingError
from mezzotint.latent_diffusion import LatentNormalization
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.gauges import derive, latent_gauges, noise_gauges, usage_gauges
from mezzotint.training.health import Health, Rollback
from mezzotint.training.log import RunLog
from mezzotint.training.oversight import HealthConfig
from mezzotint.training.symptoms import Facts, Window, symptoms_of

VQ = {
    "kind": "vq",
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_attention": False,
    "codebook_size": 64,
    "embedding_dim": 4,
}
ADVERSARY = {
    "start_step": 10,
    "pretrain_steps": 5,
    "discriminator": {"channels": 16, "layers": 2},
}
UNCONDITIONAL = {"conditioning": {"kind": "none"}, "unet__cross_attention_dim": None}
# windows of ten steps
LOGGED = {"log_steps": 10, "checkpoint_minutes": 1000.0, "sample_minutes": 1000.0}
FAST = {"batch_size": 8, "optimizer": {"learning_rate": 1e-3}, "run": LOGGED}
SMALL = {**FAST, "data__resolution": 16}
FACTS = Facts(epoch_steps=6, max_steps=100, learning_rate=1e-3, diffusion=True)


class WithNaN:
    """Data of a broken source: some images are no numbers."""

    def __init__(self, data: Any, broken: set[int]) -> None:
        self.data, self.broken = data, broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        example = self.data.load(index, generator)
        if index in self.broken:
            example = replace(example, image=example.image * torch.nan)
        return example


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def warnings(run: Path) -> dict[str, str]:
    return {row["warning"]: row["text"] for row in rows(run) if "warning" in row}


def broken_source(monkeypatch, *broken: int) -> None:
    """Let the data of recipes have images that are no numbers."""
    monkeypatch.setattr(
        run_module, "open_training_data", lambda c, *_: WithNaN(open_data(c), set(broken))
    )


@pytest.mark.parametrize("kind", ["kl", "vq", "class"])
def test_a_healthy_run_draws_no_warning(tiny, tmp_path, kind):
    budget = {"budget": {"max_steps": 40}}
    recipe = {
        "kl": lambda: tiny.autoencoder(**SMALL, **budget, ema_decay=0.99),
        "vq": lambda: tiny.autoencoder(model=VQ, loss__adversarial=ADVERSARY, **SMALL, **budget),
        "class": lambda: tiny.diffusion(
            conditioning={"kind": "class", "width": 32}, **FAST, **budget
        ),
    }[kind]()
    run = tiny.train(recipe, tmp_path / "run")
    assert warnings(run) == {}
    assert "warning" not in (run / "log.txt").read_text()
    assert not (run / "report.md").exists()
    last = rows(run)[-1]
    assert 0 < last["unexplained"] < 1
    assert 0 < last["peak_share"] < 2  # above 1 where others kept the processor from its peak
    told = {
        "kl": {"latent_std/3", "ema_distance"},
        "vq": {"discriminator_gap", "adaptive_weight", "codes_used"},
        "class": {"loss_by_noise/1", "loss_by_noise/4", "ema_distance", "latent_mean/0"},
    }[kind]
    assert told <= {name for row in rows(run) for name in row}
    if kind == "class":
        assert last["latent_std"] == pytest.approx(1.0, abs=0.3)


def test_a_learning_rate_a_hundred_times_too_high_is_named_and_lowered(tiny, tmp_path):
    changes = {**SMALL, "optimizer": {"learning_rate": 0.1}, "budget": {"max_steps": 30}}
    run = tiny.train(tiny.autoencoder(**changes), tmp_path / "run")
    said = warnings(run)
    assert "optimizer.learning_rate" in said["learning rate"]
    assert "Gone back to step 0, with 0.1 times the learning rate" in said["rollback"]
    rates = sorted({row["learning_rate"] for row in rows(run) if "learning_rate" in row})
    assert rates == pytest.approx([0.01])  # what went before is done anew, and so are its rows
    steps = [row["step"] for row in rows(run) if "loss" in row]
    assert steps == [10, 20, 30]
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 30
    assert [r["to"] for r in checkpoint.values["rollbacks"]] == [0]


def test_what_diverges_twice_stops_with_a_report(tiny, tmp_path):
    changes = {**SMALL, "optimizer": {"learning_rate": 10.0}, "budget": {"max_steps": 30}}
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"Tried before: with 0\.1 times .*report\.md"):
        tiny.train(tiny.autoencoder(**changes), run)
    report = (run / "report.md").read_text()
    assert "lower optimizer.learning_rate" in report.lower()
    assert "Gone back to step 0" in report
    assert "| step | loss | unexplained |" in report


def test_the_newest_checkpoint_from_before_the_trouble_is_kept(tiny, tmp_path):
    """One is saved at every step, and in ten steps many that are bad."""
    often = {**LOGGED, "checkpoint_minutes": 1e-7, "keep_checkpoints": 1}
    changes = {**SMALL, "optimizer": {"learning_rate": 0.1}, "run": often}
    run = tiny.train(tiny.autoencoder(**changes, budget={"max_steps": 12}), tmp_path / "run")
    assert "Gone back to step 0, with 0.1 times" in warnings(run)["rollback"]
    assert "may be bad" not in warnings(run)["rollback"]


def test_it_is_said_if_none_is_left_from_before_the_trouble(tiny, tmp_path):
    """The steps before the stop are seen with those after it."""
    changes = {**SMALL, "optimizer": {"learning_rate": 0.1}, "budget": {"max_steps": 12}}
    run = tiny.train(tiny.autoencoder(**changes), tmp_path / "run", stop_after=5)
    tiny.train(tiny.autoencoder(**changes), run, resume=True)
    told = warnings(run)["rollback"]
    assert "steps 1 to 10: " in told and "Gone back to step 5" in told
    assert "may be bad too: all was well up to step 0, and no whole checkpoint is left" in told


def test_a_warning_is_given_once_however_often_a_run_is_resumed(tiny, tmp_path):
    optimizer = {"learning_rate": 1e-4, "warmup_steps": 50}
    changes = {**SMALL, "optimizer": optimizer, "budget": {"max_steps": 6}}
    run = tiny.train(tiny.autoencoder(**changes), tmp_path / "run", stop_after=2)
    tiny.train(tiny.autoencoder(**changes), run, resume=True)
    assert [row["warning"] for row in rows(run) if "warning" in row] == ["warm-up"]


@pytest.fixture
def watching(tmp_path):
    """Makes watchers of a run without a training."""
    log = RunLog(tmp_path, "run", Console(quiet=True))
    execution = select_precision("float32", torch.device("cpu"))

    def made(facts: Facts = FACTS) -> Health:
        return Health(HealthConfig(), log, execution, images_per_step=8, facts=facts)

    yield made
    log.close()


def test_what_was_seen_is_kept_with_a_checkpoint(watching):
    """A run that is stopped after every row finds the same trouble as one that is not."""
    shares = [0.9, 0.5, 0.4, 0.03, 0.05, 0.04, 0.3, 0.35]
    whole, part = watching(), watching()
    for k, share in enumerate(shares):
        row = {"unexplained": share, "loss": share, "learning_rate": 1e-3}
        found = whole.observe(10 * k, 10 * k + 10, row)
        # half a window, a stop, and the other half
        assert part.observe(10 * k, 10 * k + 5, row) is None
        resumed = watching()
        resumed.load_state(json.loads(json.dumps(part.state())), 10 * k + 5)
        assert resumed.observe(10 * k + 5, 10 * k + 10, row) == found
        assert (found is not None) == (k == len(shares) - 1)
        assert resumed.well_until == whole.well_until == 10 * max(k, 1)
        part = resumed
        assert len(part.state()["seen"]["windows"]) <= 5
    assert found is not None and found.since == 60 and "rose from 0.03 at step 40" in found.text
    assert part.told == {"learning rate"}
    older = watching()
    older.load_state({"rollbacks": [Rollback(9, 3, "why", ((1, "a"),), 1.0).plain()]}, 12)
    assert older.excluded == {1} and older.well_until == 12 and older.told == set()


def test_the_report_names_the_discriminator_where_it_is_to_blame(watching, tmp_path):
    health = watching(replace(FACTS, diffusion=False, adversary=0))
    trouble = health.observe(0, 10, {"unexplained": 9.0, "adversarial": 0.1})
    assert trouble is not None
    said = health.report(tmp_path / "report.md", trouble, [])
    assert "Raise loss.adversarial.start_step" in said
    assert "optimizer.learning_rate" not in (tmp_path / "report.md").read_text()


def test_a_fine_tuning_run_is_read_as_what_it_is(tiny, text_run):
    facts = Facts.of(tiny.finetune(text_run), 48)
    assert facts.diffusion and facts.latents
    # what is above this has diverged for a diffusion model, and not for a first stage
    assert [s.name for s in symptoms_of([Window(0, 10, {"unexplained": 2.0})], facts)]
    assert not Facts.of(tiny.finetune(text_run), 48, pixels=True).latents
    assert not Facts.of(tiny.autoencoder(), 48).diffusion


def test_without_a_way_back_divergence_stops_at_once(tiny, tmp_path):
    run = {**LOGGED, "health": {"rollback": False}}
    changes = {**SMALL, "optimizer": {"learning_rate": 0.1}, "run": run}
    with pytest.raises(TrainingError, match=r"training diverges.*report\.md"):
        tiny.train(tiny.autoencoder(**changes, budget={"max_steps": 30}), tmp_path / "run")
    assert "run.health.rollback is false" in (tmp_path / "run" / "report.md").read_text()


def test_a_dead_codebook_is_named(tiny, tmp_path):
    """More codes than the first epoch lets near the latents, and no second one."""
    changes = {**FAST, "model": {**VQ, "codebook_size": 256}, "budget": {"max_steps": 30}}
    recipe = tiny.autoencoder(data={"kind": "emoji", "resolution": 16}, **changes)
    said = warnings(tiny.train(recipe, tmp_path / "run"))
    assert set(said) == {"codebook"}
    assert "model.codebook_size" in said["codebook"]


def test_a_discriminator_too_early_and_too_strong_is_named(tiny, tmp_path):
    strong = {**ADVERSARY, "start_step": 0, "pretrain_steps": 0}
    strong |= {"weight": 10.0, "learning_rate": 1e-2}
    changes = {**SMALL, "loss__adversarial": strong, "budget": {"max_steps": 50}}
    said = warnings(tiny.train(tiny.autoencoder(**changes), tmp_path / "run"))
    assert set(said) - {"rollback"} == {"discriminator"}
    assert "loss.adversarial.start_step" in said["discriminator"]


def test_latents_of_the_wrong_scale_are_named(tiny, tmp_path):
    stage, measured = load_first_stage(tiny.autoencoder_run / "model" / "vae")
    wrong = LatentNormalization.from_scale_factor(5 * measured.scale_factor)
    save_first_stage(stage, wrong, tmp_path / "vae", torch.float32)
    changes = {**FAST, "first_stage__path": str(tmp_path / "vae"), "budget": {"max_steps": 10}}
    said = warnings(tiny.train(tiny.diffusion(**changes), tmp_path / "run"))
    assert set(said) == {"latents"}
    assert "scaling_factor 0.2 times as large" in said["latents"].replace("0.199", "0.2")


def test_constant_captions_are_named(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines: list[str] = []
    for k in range(8):
        Image.new("RGB", (32, 32), (30 * k, 40, 60)).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": "a photo"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = {"kind": "folder", "path": str(folder), "resolution": 32, "caption_column": "text"}
    said = warnings(tiny.train(tiny.diffusion(data=data), tmp_path / "run"))
    assert set(said) == {"captions"}
    assert "8 of 8 captions looked at are the same, 'a photo'" in said["captions"]


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_an_image_that_is_no_number_is_named_and_left_out(tiny, tmp_path, monkeypatch, stage):
    broken_source(monkeypatch, 7)
    changes = {**SMALL, "budget": {"max_steps": 20}}
    recipe = (
        tiny.autoencoder(**changes)
        if stage == "autoencoder"
        else tiny.diffusion(**UNCONDITIONAL, **changes, latent_variants=0)
    )
    run = tiny.train(recipe, tmp_path / "run")
    said = warnings(run)
    name = open_data(recipe.data).load(7).name
    assert set(said) == {"rollback"}
    assert f"without {name} (image 7)" in said["rollback"]
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 20
    weights = checkpoint.tensors["autoencoder" if stage == "autoencoder" else "weights"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_what_was_left_out_stays_so_when_a_run_is_resumed(tiny, tmp_path, monkeypatch):
    broken_source(monkeypatch, 7)
    # which of ten steps are looked at together does not matter
    whole = tiny.train(tiny.autoencoder(**SMALL, budget={"max_steps": 14}), tmp_path / "whole")
    part = tiny.train(tiny.autoencoder(**SMALL, budget={"max_steps": 9}), tmp_path / "part")
    tiny.train(tiny.autoencoder(**SMALL, budget={"max_steps": 14}), part, resume=True)
    a, b = (newest_checkpoint(run / "checkpoints")[0] for run in (whole, part))
    assert a is not None and b is not None
    assert a.values["rollbacks"] == b.values["rollbacks"] != []
    for name, tensor in a.tensors["autoencoder"].items():
        assert torch.equal(tensor, b.tensors["autoencoder"][name]), name


def test_the_second_broken_image_stops_the_run_by_name(tiny, tmp_path, monkeypatch):
    recipe = tiny.autoencoder(**SMALL, budget={"max_steps": 40})
    order = run_module.AutoencoderTask(
        recipe, open_data(recipe.data), run_module.execution_for("float32", torch.device("cpu"))
    ).order
    first, second = order.index(3), order.index(30)
    broken_source(monkeypatch, first, second)
    with pytest.raises(TrainingError, match=rf"image {first}\).*image {second}\) alone is no num"):
        tiny.train(recipe, tmp_path / "run")
    assert f"image {second}" in (tmp_path / "run" / "report.md").read_text()


def test_gauges_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 3, 4, 4, generator=generator) * 2 + 1
    losses, level = torch.rand(8, generator=generator), torch.arange(8) / 8

    def both(a: Tensor, b: Tensor) -> list[float]:
        return ((a + b) / 2).tolist()

    parts = [{**latent_gauges(z[k]), **noise_gauges(losses[k], level[k])} for k in (_A, _B)]
    told = derive({name: both(parts[0][name], parts[1][name]) for name in parts[0]})
    assert told["latent_std"] == pytest.approx(float(z.std(correction=0)), rel=1e-5)
    assert told["latent_mean/1"] == pytest.approx(float(z[:, 1].mean()), rel=1e-5)
    assert told["loss_by_noise/2"] == pytest.approx(float(losses[2:4].mean()), rel=1e-5)


_A, _B = slice(0, 4), slice(4, 8)


def test_usage_of_a_codebook():
    told = usage_gauges(torch.tensor([4, 4, 0, 0]))
    assert told["codes_used"] == 0.5
    assert told["codes_perplexity"] == pytest.approx(2.0)
    assert told["vectors_per_code"] == 2.0
