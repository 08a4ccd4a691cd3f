"""The programme that trains shipped models: in pieces, carried in small files, and shipped."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_programme import AUTOENCODER, CPU, TEXT, train, weights
from tools.train_shipped.__main__ import main, seconds_of, standing
from tools.train_shipped.carry import carry_in, carry_out
from tools.train_shipped.programme import (
    Programme,
    is_finished,
    open_programme,
    pieces_of,
    run_piece,
    steps_done,
)

from mezzotint.device import select_device
from mezzotint.errors import CheckpointError, ConfigError, TrainingError
from mezzotint.training.checkpoint import newest_checkpoint

ROOT = Path(__file__).parents[2]


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


def test_a_stage_begins_only_from_one_before_it(plan: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "plan"
    shutil.copytree(plan, wrong)
    (wrong / "text-to-image.yaml").write_text(yaml.safe_dump({**TEXT, "initial": "autoencoders"}))
    with pytest.raises(ConfigError, match="'autoencoders' is no stage before it: did you mean"):
        open_programme("tiny", str(wrong), tmp_path / "work", CPU)
    shutil.copytree(ROOT / "tools/train_shipped/plans/emoji-cpu", tmp_path / "changes")
    inpaint = tmp_path / "changes" / "inpaint.yaml"
    inpaint.write_text(inpaint.read_text().replace("initial: text-to-image", "initial: upscale"))
    with pytest.raises(ConfigError, match="initial: 'upscale' is kept as changes of another"):
        open_programme("emoji", str(tmp_path / "changes"), tmp_path / "work", CPU)


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
