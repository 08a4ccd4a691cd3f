"""Evaluation while training: numbers in the log, cards and the best model, also after a stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import mezzotint.training.evaluations as evaluations_module
from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.lora import read_lora
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.generation.pipeline import load
from mezzotint.training.evaluations import Evaluations, Measurement
from mezzotint.training.log import RunLog

PSNR = {"every_steps": 2, "metric": "psnr", "samples": 8}


def rows(run: Path, name: str) -> list[tuple[int, float]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[name]) for row in lines if name in row]


def measured(run: Path) -> list[int]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if any(name.startswith("evaluation/") for name in row)]


def cards(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "evaluations").iterdir())


def test_a_model_is_measured_at_intervals_and_the_best_is_kept(tiny, quick, tmp_path):
    recipe = tiny.diffusion(run=quick(steps=1))
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


def test_evaluation_changes_nothing_in_the_training(tiny, quick, tmp_path, text_run):
    run = tiny.train(tiny.diffusion(run=quick()), tmp_path / "run")
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
def test_what_does_not_fit_is_refused_before_the_first_step(
    tiny, quick, tmp_path, changes, message
):
    recipe = tiny.diffusion(run=quick(**changes))
    with pytest.raises(ConfigError, match=message):
        tiny.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_interval_is_required(tiny):
    with pytest.raises(ConfigError, match="exactly one of every_steps and every_minutes"):
        tiny.autoencoder(run={"evaluation": {}})


def test_a_lora_is_measured_on_its_base(tiny, quick, text_run, tmp_path):
    recipe = tiny.finetune(
        text_run, run=quick(guidance_scale=1.5), optimizer={"learning_rate": 0.1}
    )
    run = tiny.train(recipe, tmp_path / "run")
    assert measured(run) == [2, 3]
    assert cards(run) == ["step-0000002.json", "step-0000003.json"]
    found = [EvaluationCard.read(run / "evaluations" / name) for name in cards(run)]
    drawn = [card.drawn_with for card in found]
    assert drawn[0] is not None and drawn[1] is not None
    assert drawn[0].steps == recipe.sample_steps and drawn[0].guidance_scale == 1.5
    hashes = {drawn[0].model_hash, drawn[1].model_hash, load(text_run).model_hash}
    assert len(hashes) == 3
    # what it does is seen
    assert found[0].numbers["kid_random"].value != found[1].numbers["kid_random"].value
    assert read_lora(run / "best" / "model").layers


def test_a_whole_fine_tuned_model_is_measured_as_it_is_told(tiny, quick, class_run, tmp_path):
    run = quick(steps=1, guidance_scale=1.5)
    changes = {"method": "full", "budget": {"max_steps": 2}, "run": run}
    done = tiny.train(tiny.finetune(class_run, **changes), tmp_path / "run")
    card = EvaluationCard.read(done / "evaluations" / "step-0000002.json")
    assert card.drawn_with is not None
    assert (card.drawn_with.steps, card.drawn_with.guidance_scale) == (1, 1.5)


def test_a_new_word_cannot_be_measured(tiny, text_run, tmp_path):
    token = {"word": "<ink>", "initial": "ab"}
    with pytest.raises(ConfigError, match="run.evaluation: draws from the captions of real pict"):
        tiny.finetune(text_run, method="textual_inversion", token=token, run={"evaluation": PSNR})


class Killed(Exception):
    """In place of the end of a process."""


def test_an_evaluation_that_was_killed_is_done_again(tiny, tmp_path, monkeypatch):
    real, asked = evaluations_module.evaluate, [0]

    def killed(*given: Any, **options: Any) -> EvaluationCard:
        asked[0] += 1
        if asked[0] in (1, 3):  # at step 2, and at the end
            raise Killed
        return real(*given, **options)

    monkeypatch.setattr(evaluations_module, "evaluate", killed)
    often = {"evaluation": PSNR, "checkpoint_minutes": 1e-7}
    recipe, run = tiny.autoencoder(run=often, budget={"max_steps": 3}), tmp_path / "run"
    with pytest.raises(Killed):
        tiny.train(recipe, run)
    for ends in (False, True):
        if ends:
            tiny.train(recipe, run, resume=True)
        else:
            with pytest.raises(Killed):
                tiny.train(recipe, run, resume=True)
        assert measured(run) == ([2, 3] if ends else [2])
    assert cards(run) == ["step-0000002.json", "step-0000003.json"]
    tiny.train(recipe, run, resume=True)
    assert measured(run) == [2, 3]


def of_nothing(tiny, folder: Path, config: dict[str, Any]) -> Evaluations:
    recipe = tiny.autoencoder(run={"evaluation": config})
    measurement, log = Measurement.of(recipe), RunLog(folder, "run", Console(quiet=True))
    assert measurement is not None
    log.close()
    return Evaluations(measurement, recipe, None, folder, log, torch.device("cpu"))  # type: ignore[arg-type]


def test_by_minutes_too(tiny, tmp_path):
    """Of minutes a checkpoint may say that they are over."""
    config = {"every_minutes": 1.0, "metric": "psnr"}
    assert not of_nothing(tiny, tmp_path, config).due(7, 61.0)
    (tmp_path / "evaluations" / ".step-0000007").mkdir(parents=True)
    begun = of_nothing(tiny, tmp_path, config)
    begun.on_rewind(7)
    assert begun.due(7, 61.0) and not begun.due(8, 62.0) and begun.due(9, 120.0)
    begun.on_rewind(6)
    assert not of_nothing(tiny, tmp_path, config).due(7, 61.0)


def test_what_was_measured_of_steps_gone_back_behind_is_dropped(tiny, tmp_path):
    place = tmp_path / "evaluations"
    place.mkdir()
    for step in (2, 4, 6):
        (place / f"step-{step:07d}.json").write_text("{}")
    found = of_nothing(tiny, tmp_path, PSNR)
    assert not found.due(4, 0.0) and not found.due(0, 0.0) and not found.due(9, 0.0)
    found.on_rewind(3)
    assert cards(tmp_path) == ["step-0000002.json"]
    assert found.due(4, 0.0) and not found.due(2, 0.0)


def test_a_best_model_that_was_measured_otherwise_does_not_count(tiny, tmp_path):
    run = tmp_path / "run"
    for steps, samples in ((2, 8), (4, 8), (6, 6)):
        config = {"evaluation": {**PSNR, "samples": samples}}
        recipe = tiny.autoencoder(run=config, budget={"max_steps": steps})
        tiny.train(recipe, run, resume=steps > 2)
        record = json.loads((run / "best" / "best.json").read_text())
        # the second is measured as the first was, the third is not
        assert record["step"] == (6 if steps == 6 else 2)
        (run / "best" / "best.json").write_text(json.dumps({**record, "value": 99.0}))
    told = (run / "log.txt").read_text()
    assert told.count("the best model until now does not count: it was measured otherwise") == 1
    assert "count of pictures (8 against 6)" in told


def test_a_wrong_path_is_told_before_the_first_stage_is_trained(tiny, quick, tmp_path):
    first = tiny.write(tmp_path / "first.yaml", "autoencoder", budget={"max_steps": 1})
    recipe = tiny.diffusion(
        first_stage={"kind": "trained", "recipe": str(first)},
        run=quick(against=str(tmp_path / "nowhere")),
    )
    with pytest.raises(DataError, match="nowhere"):
        tiny.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
