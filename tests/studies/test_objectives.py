"""The study of objectives, from training to the table, at a tiny size."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mezzotint.checkpoints.model import load_model
from mezzotint.cli.main import app
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.studies.conditions import judging
from mezzotint.studies.objectives import OBJECTIVES, run_objectives_study, runs, write_report
from mezzotint.studies.objectives.results import read_results
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe


def test_the_objectives_are_one_recipe_but_for_what_they_say() -> None:
    recipes = {name: load_recipe(runs.RECIPE, told) for name, told in OBJECTIVES.items()}
    base = load_recipe(runs.RECIPE).to_dict()
    assert {"schedule", "weighting", "times"} < set(base)
    for name, recipe in recipes.items():
        assert isinstance(recipe, DiffusionRecipe)
        told = recipe.to_dict()
        same = {key for key in base if told[key] == base[key]}
        assert set(base) - same <= {"schedule", "weighting", "times"}, name
    said = [
        (r.to_dict()["schedule"], r.to_dict()["weighting"], r.to_dict()["times"])
        for r in recipes.values()
    ]
    assert all(said.count(each) == 1 for each in said)
    assert recipes["v"].to_dict()["schedule"] == base["schedule"]


def test_from_training_to_the_table(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_SINGLES", 40)
    monkeypatch.setattr(runs, "STEPS", (1, 2))
    output, work = tmp_path / "results", tmp_path / "work"
    small = ("data.count=16", "unet.block_out_channels=[32, 32, 32]", "sample_steps=1")
    common = {"steps": 2, "pictures": 4, "overrides": small, "device": "cpu"}
    common |= {"autoencoder": tiny.autoencoder_run, "console": Console(quiet=True)}
    run_objectives_study(output, work, only=["flow-logit-normal", "v-min-snr"], **common, seeds=[0])
    results = read_results(output)
    assert [(r.objective, r.seed) for r in results] == [
        ("flow-logit-normal", 0),
        ("v-min-snr", 0),
    ]
    scale = load_recipe(runs.RECIPE).to_dict()["guidance_scale"]
    for result in results:
        assert (result.steps, result.budget, result.pictures) == (2, "2 steps", 4)
        drawn = [(point.steps, point.guidance_scale) for point in result.points]
        assert drawn == [(1, 1.0), (2, 1.0), (2, scale)]
    flow = load_model(work / "flow-logit-normal-seed0" / "model").schedule_config
    assert flow.to_dict() == {"kind": "flow", "shift": 1.0, "num_train_timesteps": 1000}
    text = write_report(output).read_text()
    assert "| flow-logit-normal | 1 |" in text and "| v-min-snr | 1 |" in text
    assert (
        "trained for 2 steps" in text
        and "`sample_steps=1`" in text
        and "(flow-logit-normal-seed0.webp)" in text
    )
    before = (output / "v-min-snr-seed0.json").stat().st_mtime_ns
    run_objectives_study(output, work, only=["v-min-snr"], **common, seeds=[0])
    assert (output / "v-min-snr-seed0.json").stat().st_mtime_ns == before  # is there already
    with pytest.raises(ConfigError, match="has 2 steps and 4 pictures and .*, not 3 steps and 4"):
        run_objectives_study(output, work, **common | {"steps": 3})
    with pytest.raises(ConfigError, match="was trained by another recipe; use another --work"):
        run_objectives_study(tmp_path / "b", work, only=["v-min-snr"], **common | {"steps": 3})
    done = CliRunner().invoke(app, ["study", "objectives", "-o", str(output), "--report-only"])
    assert done.exit_code == 0 and "objectives.md" in done.stdout


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown objective 'velocity'"):
        run_objectives_study(tmp_path, tmp_path, only=["velocity"])
    with pytest.raises(DataError, match="holds no results"):
        write_report(tmp_path)
    (tmp_path / "v-seed0.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged; delete it to measure anew"):
        write_report(tmp_path)
