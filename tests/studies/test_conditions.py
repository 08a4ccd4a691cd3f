"""The study of conditions, from training to the table, at a tiny size."""

from pathlib import Path

import pytest
import torch

from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.evaluation import judges
from mezzotint.studies.conditions import (
    CONDITIONS,
    MeasuredGap,
    guided,
    judging,
    run_conditions_study,
    runs,
    write_report,
)
from mezzotint.studies.conditions.judging import scenes_of
from mezzotint.studies.conditions.measures import MEASURES, Asked, diffusion_fill
from mezzotint.studies.conditions.results import read_guided, read_result
from mezzotint.studies.conditions.runs import nulled
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe


def judged_alike(data: dict[str, object], judge: str) -> bool:
    """A judge of all backgrounds judges some of them too; that of single objects goes by names."""
    left_out = {"backgrounds": None} | ({"concepts": None} if judge == judging.SINGLE else {})
    return load_recipe(judge).data.to_dict() | left_out == data | left_out


def test_every_condition_has_a_recipe_on_one_autoencoder_and_measures() -> None:
    assert set(MEASURES) == set(CONDITIONS)
    kinds = {judging.SINGLE: set[str](), judging.MANY: set[str]()}
    for name in CONDITIONS.values():
        recipe = load_recipe(name)
        assert isinstance(recipe, DiffusionRecipe)
        assert recipe.first_stage.to_dict()["recipe"] == "emoji-autoencoder"
        assert recipe.data.to_dict()["split"] == "train"  # and the study asks for validation
        kinds[next(k for k in kinds if judged_alike(recipe.data.to_dict(), k))].add(name)
        assert recipe.budget.max_minutes is not None and recipe.budget.max_minutes <= 15
    assert {"emoji-class", "emoji-text", "emoji-hybrid"} == kinds[judging.SINGLE]  # by their judges


@pytest.mark.parametrize("name", ["emoji-class", "emoji-text", "emoji-hybrid"])
def test_judges_call_classes_by_the_same_names(name: str) -> None:
    asked, known = (scenes_of(recipe, "train", 1).class_names for recipe in (name, judging.SINGLE))
    assert [known[k] for k in judging.judged_classes(name)] == list(asked)


def test_what_no_judge_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="emoji-demo: data.kind is .emoji."):
        judging.judged_classes("emoji-demo")
    monkeypatch.setattr(judging, "SINGLE", "emoji-layout")
    with pytest.raises(ConfigError, match="emoji-class: the judges, .* do not know .'alarm-clock'"):
        judging.judged_classes("emoji-class")


def test_the_gap_that_is_closed() -> None:
    assert MeasuredGap(name="a", null=0.1, drawn=0.7, real=0.9).closed == pytest.approx(0.75)
    # of a distance, which is smaller where it is better
    assert MeasuredGap(name="a", null=0.8, drawn=0.2, real=0.0).closed == pytest.approx(0.75)


def test_a_nulled_conditioner_says_its_null_for_a_while() -> None:
    conditioner = ClassConditioner(ClassConditionerConfig(width=4, class_names=("a", "b")))
    inputs = ConditionInputs(count=2, labels=[0, 1])
    told, null = conditioner(inputs).crossattn, conditioner.null(2).crossattn
    with nulled(conditioner, "main"):
        assert torch.equal(conditioner(inputs).crossattn, null)
    assert torch.equal(conditioner(inputs).crossattn, told)
    assert not torch.equal(told, null)


def test_diffusion_fill_solves_the_heat_equation() -> None:
    """Harmonic functions, planes among them, are what it restores exactly."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24), indexing="ij")
    plane = (0.5 * x + 0.2 * y).expand(1, 3, 24, 24)
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    mask[..., 6:16, 5:18] = True
    filled = diffusion_fill(plane.masked_fill(mask, 9.0), mask)
    torch.testing.assert_close(filled, plane, atol=1e-4, rtol=0)


def test_from_training_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_SINGLES", 96)
    monkeypatch.setattr(judging, "_SCENES", 96)
    monkeypatch.setattr(runs, "STEPS", 3)
    monkeypatch.setattr(guided, "STEPS", 3)
    asked: list[tuple[str, Asked]] = []
    ask = runs._ask

    def noted(pipeline, recipe, name, count, **more) -> Asked:
        asked.append((name, ask(pipeline, recipe, name, count, **more)))
        return asked[-1][1]

    monkeypatch.setattr(runs, "_ask", noted)
    few_steps = judges.train_segmenter.__kwdefaults__ | {"steps": 3}
    monkeypatch.setattr(judges.train_segmenter, "__kwdefaults__", few_steps)
    output, work = tmp_path / "results", tmp_path / "work"
    run_conditions_study(
        output,
        work,
        only=["layout", "hybrid", "guided"],
        pictures=3,
        minutes=0.01,
        count=32,
        device="cpu",
    )
    judged = scenes_of(judging.SINGLE, "train", 1).class_names  # the hybrid's scenes have fewer
    (_, told), _ = (each for each in asked if each[0] == "hybrid")
    assert all(judged[e.label].replace("-", " ") in e.caption for e in told.examples)
    layout, hybrid = (read_result(output / f"{name}.json") for name in ("layout", "hybrid"))
    assert [gap.name for gap in layout.gaps] == ["class accuracy in the boxes", "IoU of the boxes"]
    assert hybrid.further["largest change outside the mask (of 255)"] == 0.0
    assert layout.pictures == 3 and layout.steps >= 1
    text = write_report(output).read_text()
    assert text.count("| layout |") == 2
    assert text.count("| hybrid (begun from the model of text) |") == 2
    numbers = {name.removesuffix(", the object hidden") for name in hybrid.further}
    assert len(hybrid.further) == 2 * len(numbers) == text.count("| hybrid |")
    assert hybrid.initial == "text" and (work / "text" / "model").is_dir()
    led = read_guided(output / "guided.json")
    assert (led.targets, led.each, led.side) == (2, 4, 8)
    assert led.between_guided > 0 and led.to_true_draw > 0 and led.diversity_left > 0
    assert "diversity left of what the target allows" in text
    before = (output / "layout.json").stat().st_mtime_ns
    run_conditions_study(output, work, only=["layout"], device="cpu")  # is there already
    assert (output / "layout.json").stat().st_mtime_ns == before


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown condition 'depth'"):
        run_conditions_study(tmp_path, tmp_path, only=["depth"])
    damaged = tmp_path / "guided.json"
    damaged.write_text("{")
    with pytest.raises(CheckpointError, match="damaged; delete it to measure anew"):
        write_report(tmp_path)
    damaged.unlink()
    with pytest.raises(DataError, match="holds no results"):
        write_report(tmp_path)
