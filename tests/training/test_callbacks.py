"""Evaluation while training: numbers in the log, cards, and the best model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mezzotint.checkpoints.model import load_first_stage
from mezzotint.errors import ConfigError, TrainingError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.generation.pipeline import load

QUICK = {
    "name": "quick",
    "metrics": ["kid"],
    "network": "random",
    "resize": "bicubic-antialias",
    "samples": 6,
    "kid_subsets": None,
    "batch_size": 8,
}


def rows(run: Path, name: str) -> list[tuple[int, float]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[name]) for row in lines if name in row]


def evaluation(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    protocol = tmp_path / "quick.yaml"
    protocol.write_text(json.dumps(QUICK))
    config = {"every_steps": 2, "protocol": str(protocol), "samples": 6, **changes}
    return {"evaluation": config}


def test_a_model_is_measured_at_intervals_and_the_best_is_kept(tiny, tmp_path):
    recipe = tiny.diffusion(run=evaluation(tmp_path, steps=1))
    run = tiny.train(recipe, tmp_path / "run")
    told = rows(run, "evaluation/kid_random")
    assert [step for step, _ in told] == [2, 4]
    cards = sorted(p.name for p in (run / "evaluations").iterdir())
    assert cards == ["step-0000002.json", "step-0000004.json"]
    card = EvaluationCard.read(run / "evaluations" / cards[0])
    assert card.numbers["kid_random"].value == pytest.approx(told[0][1])
    assert card.drawn_with is not None and card.drawn_with.steps == 1
    best = json.loads((run / "best" / "best.json").read_text())
    step, value = min(told, key=lambda pair: pair[1])
    assert (best["step"], best["value"]) == (step, pytest.approx(value))
    # it is a model of its own, with the averages of that step
    loaded = load(run / "best")
    assert (loaded.model_hash == load(run).model_hash) == (step == 4)


def test_evaluation_changes_nothing_in_the_training(tiny, tmp_path, text_run):
    run = tiny.train(tiny.diffusion(run=evaluation(tmp_path)), tmp_path / "run")
    assert load(run).model_hash == load(text_run).model_hash


def test_a_first_stage_is_measured_by_what_it_keeps(tiny, tmp_path):
    config = {"every_steps": 3, "metric": "psnr", "samples": 8}
    run = tiny.train(tiny.autoencoder(run={"evaluation": config}), tmp_path / "run")
    told = rows(run, "evaluation/psnr")
    assert [step for step, _ in told] == [3, 4]
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["value"] == pytest.approx(max(value for _, value in told))
    assert best["metric"] == "psnr"
    load_first_stage(run / "best" / "model" / "vae")


def test_a_worse_model_does_not_replace_the_best(tiny, tmp_path):
    """Nor does a resumed run forget what was the best before."""
    config = {"every_steps": 4, "metric": "psnr", "samples": 8}
    run = tiny.train(tiny.autoencoder(run={"evaluation": config}), tmp_path / "run")
    record = run / "best" / "best.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "value": 99.0}))
    later = tiny.autoencoder(run={"evaluation": config}, budget={"max_steps": 5})
    shutil.rmtree(run / "model")
    tiny.train(later, run, resume=True)
    assert json.loads(record.read_text()) == {"step": 4, "metric": "psnr", "value": 99.0}
    assert [step for step, _ in rows(run, "evaluation/psnr")] == [4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "reconstruction"}, "does not measure a diffusion model"),
        ({"metric": "recall"}, "does not measure recall"),
        ({"split": "train"}, "the data configuration names its emoji"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(tiny, tmp_path, changes, message):
    recipe = tiny.diffusion(run=evaluation(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        tiny.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_interval_is_required(tiny):
    with pytest.raises(ConfigError, match="exactly one of every_steps and every_minutes"):
        tiny.autoencoder(run={"evaluation": {}})


def test_a_tracker_that_is_not_installed_is_named(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(TrainingError, match="pip install wandb, or leave run.wandb out"):
        tiny.train(tiny.autoencoder(run={"wandb": "emoji"}), tmp_path / "run")
