"""What is shipped of a programme: whole models, and others as what they change of one."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_programme import TEXT, train, weights
from tools.train_shipped.carry import carry_in, carry_out
from tools.train_shipped.programme import (
    Programme,
    is_finished,
    pieces_of,
    record,
    steps_done,
)
from tools.train_shipped.ship import describe_training, read_made, ship, take_shipped

import mezzotint
from mezzotint.checkpoints import shipped
from mezzotint.checkpoints.registry import resolve_model
from mezzotint.errors import CheckpointError, ConfigError, TrainingError
from mezzotint.training.checkpoint import newest_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_stage_begins_from_the_weights_of_another(whole: Programme, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    shutil.copytree(whole.plan, plan)
    flow = {**TEXT, "initial": "pretraining", "schedule": {"kind": "flow"}}
    (plan / "text-to-image.yaml").rename(plan / "pretraining.yaml")
    (plan / "text-to-image.yaml").write_text(yaml.safe_dump(flow))
    programme = Programme("tiny", plan, tmp_path / "work")
    assert programme.stages == ("autoencoder", "pretraining", "text-to-image")
    for stage, made in (("autoencoder", "autoencoder"), ("pretraining", "text-to-image")):
        shutil.copytree(whole.work / made / "half", programme.work / stage / "half")
    mine = [
        replace(piece, stage="pretraining") if piece.stage == "text-to-image" else piece
        for piece in pieces_of(whole.work)
    ]
    record(programme.work, mine)
    assert not train(programme, 1)
    begun, _ = newest_checkpoint(programme.work / "text-to-image" / "checkpoints")
    assert begun is not None
    # a step of the warm-up is a third of 1e-3 at most
    for name, before in weights(whole).items():
        assert torch.allclose(begun.tensors["weights"][f"unet.{name}"], before.float(), atol=5e-4)
    assert train(programme)
    (folder,) = ship(programme, tmp_path / "models")
    assert {path.stem for path in folder.glob("*.yaml")} == set(programme.stages)
    card = "\n".join(describe_training("tiny", read_made(folder)))
    assert "**pretraining**: 6 steps" in card
    assert "**text-to-image**: 6 steps" in card.split("**pretraining**")[1]
    assert card.count("Begun from the weights of pretraining.") == 1
    taken = Programme("tiny", plan, tmp_path / "taken")
    take_shipped(taken, tmp_path / "models")
    assert train(taken) and not (taken.work / "pretraining").exists()
    assert ship(taken, tmp_path / "models") == []
    record(programme.work, mine[:1])
    with pytest.raises(TrainingError, match="history.json says nothing of pretraining"):
        ship(programme, tmp_path / "models")


def test_other_tasks_are_shipped_as_what_they_change(
    whole: Programme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, models = tmp_path / "plan", tmp_path / "models"
    shutil.copytree(whole.plan, plan)
    hybrid = {"kind": "hybrid", "main": TEXT["conditioning"], "spatial": {"kind": "inpainting"}}
    unet = {**TEXT["unet"], "in_channels": 9}
    inpaint = {**TEXT, "unet": unet, "conditioning": hybrid, "initial": "text-to-image"}
    inpaint |= {"lora_rank": 2, "name": "tiny-inpaint"}
    (plan / "inpaint.yaml").write_text(yaml.safe_dump(inpaint))
    programme = Programme("tiny", plan, tmp_path / "work")
    shutil.copytree(whole.work, programme.work)
    assert [path.name for path in ship(programme, models)] == ["tiny"]
    assert not train(programme, 3)
    carry_out(programme, tmp_path / "carried")
    assert train(programme)
    there = Programme("tiny", plan, tmp_path / "there")
    carry_in(there, tmp_path / "carried")
    assert (steps_done(there.work / "inpaint"), is_finished(there.work / "text-to-image")) == (3, 1)
    assert train(there)
    assert [path.name for path in ship(programme, models)] == ["tiny", "tiny-inpaint"]
    folder = models / "tiny-inpaint"
    assert not (folder / "vae").exists() and not (folder / "conditioner" / "main").exists()
    assert {path.name for path in folder.glob("*.yaml")} == {"inpaint.yaml"}
    kept = mezzotint.load(programme.work / "inpaint" / "model").model.state_dict()
    monkeypatch.setattr(shipped, "_FOLDER", models)
    pipeline = mezzotint.load("tiny-inpaint")
    assert pipeline.task == "inpainting"
    for name, weight in pipeline.model.state_dict().items():
        assert (weight - kept[name]).abs().max() < 1e-3, name
    text = "\n".join(describe_training("tiny-inpaint", read_made(folder)))
    assert "`python -m tools.train_shipped tiny`" in text and "it changes of `tiny`" in text
    assert "Begun from the weights of text-to-image." in text
    # another work folder takes the text model from there, without the stages before it
    begun = Programme("tiny", plan, tmp_path / "begun")
    take_shipped(begun, models)
    assert train(begun)
    assert {piece.stage for piece in pieces_of(begun.work)} == set(begun.stages)
    again = mezzotint.load(ship(begun, models)[-1]).model.state_dict()
    for name, weight in pipeline.model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    before = pieces_of(begun.work)
    take_shipped(begun, models)  # the same command goes on
    assert pieces_of(begun.work) == before and train(begun)
    partly = Programme("tiny", plan, tmp_path / "partly")
    train(partly, 1)
    with pytest.raises(TrainingError, match="autoencoder: is there already"):
        take_shipped(partly, models)
    with pytest.raises(TrainingError, match="no model is shipped here"):
        take_shipped(begun, tmp_path)
    # a text model that was trained anew would leave the other without its base
    half = programme.work / "text-to-image" / "half" / "unet" / "config.json"
    kept_config = half.read_text()
    half.write_text(kept_config + " ")
    (programme.work / "inpaint").rename(tmp_path / "inpaint")
    with pytest.raises(TrainingError, match="tiny-inpaint: holds changes of the model that would"):
        ship(programme, models)
    half.write_text(kept_config)
    (tmp_path / "inpaint").rename(programme.work / "inpaint")
    assert len(ship(programme, models)) == 2
    # elsewhere the base is found by its name
    shutil.copytree(folder, tmp_path / "alone" / "tiny-inpaint")
    assert mezzotint.load(tmp_path / "alone" / "tiny-inpaint").task == "inpainting"


def test_weights_of_another_plan_are_refused(plan: Path, whole: Programme, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(plan, other)
    flow = {**TEXT, "schedule": {"kind": "flow"}, "budget": {"max_steps": 7}}
    (other / "text-to-image.yaml").write_text(yaml.safe_dump(flow))
    shutil.copytree(whole.work, tmp_path / "work")
    finished = Programme("tiny", other, tmp_path / "work")
    wrong = "text-to-image/half: trained by a recipe that has other values of schedule"
    with pytest.raises(ConfigError, match=wrong):
        train(finished)
    with pytest.raises(ConfigError, match=wrong):
        ship(finished, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    here = Programme("tiny", other, tmp_path / "here")
    carry_out(whole, tmp_path / "carried")
    with pytest.raises(ConfigError, match=wrong):
        carry_in(here, tmp_path / "carried")
    shutil.rmtree(tmp_path / "carried" / "text-to-image")
    begun = Programme("tiny", plan, tmp_path / "begun")
    shutil.copytree(whole.work / "autoencoder" / "half", begun.work / "autoencoder" / "half")
    train(begun, 2)
    carry_out(begun, tmp_path / "carried")
    with pytest.raises(ConfigError, match="carried/text-to-image: trained by a recipe"):
        carry_in(here, tmp_path / "carried")
    (tmp_path / "carried" / "text-to-image" / "plan.yaml").unlink()
    with pytest.raises(ConfigError, match="no plan.yaml says what made these weights"):
        carry_in(here, tmp_path / "carried")


def test_a_shipped_model_loads_and_draws_by_name(
    whole: Programme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = ship(whole, tmp_path / "models")
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, folder.with_name(".tiny.tmp"))  # as it is while it is written
    assert shipped.shipped_names() == ["tiny"]
    assert resolve_model("tiny") == folder
    pipeline = mezzotint.load("tiny", device="cpu", precision="float32")
    assert (pipeline.name, pipeline.defaults.guidance_scale) == ("tiny", 3.0)
    (drawn,) = pipeline.generate("a red apple", steps=2)
    assert drawn.image.size == (16, 16) and drawn.request.model == "tiny"
    made = read_made(folder)
    assert any("3 steps" in line for line in describe_training("tiny", made))
    with pytest.raises(CheckpointError, match="no such model folder; did you mean 'tiny'"):
        resolve_model("tny")
    # an existing path that holds a model comes before a name
    shutil.copytree(folder, tmp_path / "tiny")
    assert resolve_model("tiny") == Path("tiny")
    shutil.rmtree(tmp_path / "tiny")
    (folder / "LICENSE").write_text("another")
    with pytest.raises(CheckpointError, match="LICENSE: the shipped file is damaged; reinstall"):
        mezzotint.load("tiny")


def test_what_is_not_finished_or_too_large_is_not_shipped(
    plan: Path, whole: Programme, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="autoencoder: not finished; train on, then ship"):
        ship(Programme("tiny", plan, tmp_path / "work"), tmp_path / "models")
    (tmp_path / "models" / "other").mkdir(parents=True)
    (tmp_path / "models" / "other" / "weights").write_bytes(bytes(24_000_000))
    with pytest.raises(TrainingError, match="24,000,000 at most are shipped"):
        ship(whole, tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["other"]


def test_nothing_of_the_assets_is_left_out_of_the_wheel() -> None:
    """The wheel holds all of the package but what git ignores."""
    path = "src/mezzotint/assets/models/emoji/unet/diffusion_pytorch_model.safetensors"
    ignored = subprocess.run(["git", "check-ignore", path], cwd=ROOT, check=False)
    assert ignored.returncode == 1
