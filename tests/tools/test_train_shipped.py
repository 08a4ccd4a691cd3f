"""The programme that trains shipped models: in pieces, carried in small files, and shipped."""

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tools.train_shipped import programme as programme_module
from tools.train_shipped.__main__ import main, seconds_of, standing
from tools.train_shipped.carry import carry_in, carry_out
from tools.train_shipped.programme import (
    Programme,
    is_finished,
    open_programme,
    pieces_of,
    record,
    run_piece,
    steps_done,
)
from tools.train_shipped.ship import describe_training, read_made, ship, take_shipped

import mezzotint
from mezzotint.checkpoints import shipped
from mezzotint.checkpoints.registry import resolve_model
from mezzotint.device import select_device
from mezzotint.errors import CheckpointError, ConfigError, TrainingError
from mezzotint.training import run as run_module
from mezzotint.training.checkpoint import newest_checkpoint

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DATA = {
    "kind": "portraits",
    "concepts": ["red-apple", "fox", "key", "star"],
    "resolution": 16,
    "count": 16,
}
COMMON = {
    "data": DATA,
    "batch_size": 4,
    "ema_decay": 0.9,
    "precision": "float32",
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3},
}
AUTOENCODER = {
    "kind": "autoencoder",
    "name": "tiny-autoencoder",
    "model": {
        "kind": "kl",
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_attention": False,
    },
    "loss": {"perceptual": 0.0, "adversarial": None, "kl": 0.1},
    "normalization": "channel",
    "budget": {"max_steps": 3},
    **COMMON,
}
TEXT = {
    "kind": "diffusion",
    "name": "tiny-text-to-image",
    "first_stage": {"kind": "trained", "path": "autoencoder"},
    "unet": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "attention_levels": [False, True],
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "norm_num_groups": 4,
    },
    "conditioning": {
        "kind": "text",
        "width": 8,
        "layers": 1,
        "heads": 2,
        "max_length": 12,
        "vocab_size": 128,
    },
    "schedule": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "sample_steps": 2,
    "budget": {"max_steps": 6},
    **COMMON,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "tiny"
    folder.mkdir()
    for name, recipe in (("autoencoder", AUTOENCODER), ("text-to-image", TEXT)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def train(programme: Programme, steps: int | None = None) -> bool:
    """A piece of so many steps of each stage that it reaches, in place of so many minutes."""
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:

            def few(*given: Any, stop_minutes: float, **told: Any) -> Path:
                return run_module.train(*given, stop_after=steps, **told)

            patch.setattr(programme_module, "train", few)
        return run_piece(programme, time.time() + 600, CPU, processes=1)


@pytest.fixture(scope="module")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Programme:
    """Trained in one piece."""
    programme = Programme("tiny", plan, tmp_path_factory.mktemp("whole") / "work")
    assert train(programme)
    return programme


def weights(programme: Programme) -> dict[str, torch.Tensor]:
    half = programme.work / "text-to-image" / "half"
    return load_file(half / "unet" / "diffusion_pytorch_model.safetensors")


def test_pieces_give_what_one_gives(plan: Path, whole: Programme, tmp_path: Path) -> None:
    pieces = Programme("tiny", plan, tmp_path / "work")
    assert [train(pieces, 2) for _ in range(4)] == [False, False, False, True]
    assert [(p.stage, p.start, p.end) for p in pieces_of(pieces.work)] == [
        ("autoencoder", 0, 2),
        ("autoencoder", 2, 3),
        ("text-to-image", 0, 2),
        ("text-to-image", 2, 4),
        ("text-to-image", 4, 6),
    ]
    assert not any(piece.restarted for piece in pieces_of(pieces.work))
    mine, theirs = weights(pieces), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert train(pieces), "what is finished stays so"


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
    with pytest.raises(TrainingError, match="autoencoder: is there already"):
        take_shipped(begun, models)
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


def test_a_stage_begins_only_from_one_before_it(plan: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "plan"
    shutil.copytree(plan, wrong)
    (wrong / "text-to-image.yaml").write_text(yaml.safe_dump({**TEXT, "initial": "autoencoders"}))
    with pytest.raises(ConfigError, match="'autoencoders' is no stage before it: did you mean"):
        open_programme("tiny", str(wrong), tmp_path / "work", CPU)


def test_what_is_carried_goes_on_from_averages_and_warms_up(
    plan: Path, whole: Programme, tmp_path: Path
) -> None:
    there = Programme("tiny", plan, tmp_path / "there")
    shutil.copytree(whole.work / "autoencoder" / "half", there.work / "autoencoder" / "half")
    train(there, 4)
    carry_out(there, tmp_path / "carried")
    here = Programme("tiny", plan, tmp_path / "here")
    carry_in(here, tmp_path / "carried")
    assert is_finished(here.work / "autoencoder")
    checkpoint, _ = newest_checkpoint(here.work / "text-to-image" / "checkpoints")
    saved, _ = newest_checkpoint(there.work / "text-to-image" / "checkpoints")
    assert checkpoint is not None and saved is not None and checkpoint.step == saved.step == 4
    for name, weight in checkpoint.tensors["weights"].items():
        assert torch.equal(weight, saved.tensors["ema"][name].half().float())
        assert torch.equal(weight, checkpoint.tensors["ema"][name])
    assert train(here)
    first, last = pieces_of(here.work)
    assert (first.restarted, last.start, last.end, last.restarted) == (False, 4, 6, True)
    rows = (here.work / "text-to-image" / "metrics.jsonl").read_text().splitlines()
    # of the last two steps the cosine leaves 0.25 and 0.067, a new warm-up 1/4 and 2/4 of these
    assert json.loads(rows[-1])["learning_rate"] < 6.4e-5
    after, _ = newest_checkpoint(here.work / "text-to-image" / "checkpoints")
    assert after is not None and after.values["begun"] == 4
    # where the state itself is as far, it is not replaced by what was carried
    carry_in(there, tmp_path / "carried")
    kept, _ = newest_checkpoint(there.work / "text-to-image" / "checkpoints")
    assert kept is not None and "optimizer" in kept.tensors


def test_a_piece_ends_when_its_time_is_up(plan: Path, tmp_path: Path) -> None:
    programme = Programme("tiny", plan, tmp_path / "work")
    assert not run_piece(programme, time.time() + 0.01, CPU, processes=1)
    assert steps_done(programme.work / "autoencoder") < 3
    assert not is_finished(programme.work / "autoencoder")


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


def test_the_plans_are_recipes_whose_models_fit() -> None:
    for device, more in (("cpu", ("pretraining",)), ("gpu", ())):
        programme = open_programme("emoji", device, None, CPU)
        further = ("upscale", "inpaint", "scenes") if device == "cpu" else ()
        assert programme.stages == ("autoencoder", *more, "text-to-image", *further)
        first, *before, text = (
            programme.recipe(stage) for stage in ("autoencoder", *more, "text-to-image")
        )
        for stage in further:
            other = programme.recipe(stage)
            assert other.initial == f"runs/shipped/emoji-{device}/text-to-image/half"
            assert other.conditioning.main == text.conditioning and other.schedule == text.schedule
            same = {"in_channels": text.unet.in_channels}
            assert other.unet.model_copy(update=same) == text.unet
        assert text.initial == (f"runs/shipped/emoji-{device}/pretraining/half" if more else None)
        for other in before:
            for part in ("unet", "data", "conditioning", "first_stage"):
                assert getattr(other, part) == getattr(text, part)
        assert text.data.resolution == first.data.resolution
        assert text.unet.out_channels == first.model.latent_channels
        assert text.first_stage.path == f"runs/shipped/emoji-{device}/autoencoder/half"
        assert all(recipe.budget.max_minutes is None for recipe in (first, *before, text))


def test_nothing_of_the_assets_is_left_out_of_the_wheel() -> None:
    """The wheel holds all of the package but what git ignores."""
    path = "src/mezzotint/assets/models/emoji/unet/diffusion_pytorch_model.safetensors"
    ignored = subprocess.run(["git", "check-ignore", path], cwd=ROOT, check=False)
    assert ignored.returncode == 1


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [seconds_of(text) for text in ("9m", "90s", "1.5h")] == [540, 90, 5400]
    for arguments, message in (
        (["emoji", "--budget", "9"], "--budget 9: expected a time such as 9m, 90s or 1.5h"),
        (["emojis", "--plan", "cpu"], "no plan 'cpu' to train it by: did you mean 'emoji-cpu'"),
        (["emoji", "--plan", str(tmp_path)], "no recipes here; expected autoencoder, pretraining"),
        (
            ["emoji", "--work", str(tmp_path / "w"), "--carry-in", str(tmp_path)],
            "nothing was carried here; expected history.json in it",
        ),
    ):
        assert main([*arguments, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    assert select_device("cpu") == CPU
    with pytest.raises(ConfigError, match="--budget 0m"):
        seconds_of("0m")


def test_what_could_not_go_on_elsewhere_is_not_carried(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    averages = {"kind": "power", "sigma_rel": [0.05, 0.1]}
    codes = {**AUTOENCODER["model"], "kind": "vq", "codebook_size": 16}
    several: tuple[dict[str, Any], ...] = (
        {"ema_decay": None},
        {"ema_decay": None, "ema": averages},
        {"model": codes, "normalization": "scalar"},
    )
    for number, changes in enumerate(several):
        recipe = {**AUTOENCODER, **changes}
        (folder / "autoencoder.yaml").write_text(yaml.safe_dump(recipe))
        programme = Programme("tiny", folder, tmp_path / f"work-{number}")
        train(programme, 1)
        with pytest.raises(TrainingError, match="only weights with one average travel"):
            carry_out(programme, tmp_path / "carried")


def test_what_is_carried_keeps_what_was_done_here_of_other_stages(
    plan: Path, whole: Programme, tmp_path: Path
) -> None:
    there, here = (Programme("tiny", plan, tmp_path / name) for name in ("there", "here"))
    assert not train(here, 3)  # the autoencoder, and three steps of the other
    shutil.copytree(whole.work / "autoencoder" / "half", there.work / "autoencoder" / "half")
    train(there, 4)
    carry_out(there, tmp_path / "carried")
    carry_in(here, tmp_path / "carried")
    told = [(piece.stage, piece.start, piece.end) for piece in pieces_of(here.work)]
    assert told == [("autoencoder", 0, 3), ("text-to-image", 0, 4)]


def test_what_was_carried_in_part_is_told(plan: Path, whole: Programme, tmp_path: Path) -> None:
    there, here = (Programme("tiny", plan, tmp_path / name) for name in ("there", "here"))
    shutil.copytree(whole.work / "autoencoder" / "half", there.work / "autoencoder" / "half")
    train(there, 2)
    carry_out(there, tmp_path / "carried")
    place = tmp_path / "carried" / "text-to-image"
    average = place / "average.safetensors"
    average.write_bytes(average.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="text-to-image: what was carried is not whole"):
        carry_in(here, tmp_path / "carried")
    (place / "state.json").unlink()
    with pytest.raises(CheckpointError, match="not whole.*carry it out again"):
        carry_in(here, tmp_path / "carried")


def test_a_stage_that_ends_by_the_clock_has_a_standing(tmp_path: Path) -> None:
    recipe = {**AUTOENCODER, "budget": {"max_minutes": 1}}
    (tmp_path / "autoencoder.yaml").write_text(yaml.safe_dump(recipe))
    programme = Programme("tiny", tmp_path, tmp_path / "work")
    assert standing(programme) == ["tiny, autoencoder: step 0"]
