"""Every comparison with a peer, rehearsed with tiny networks."""

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmarks.peers import running
from benchmarks.side_by_side import AGREEMENT, Comparison, Record

from benchmarks import (
    approximation_cost,
    decode,
    growth,
    performance,
    startup,
    text_to_image,
    training_step,
    unet_step,
)


def rehearse(module: ModuleType, work: Path, output: Path, *words: str) -> Record:
    told = ["--tiny", "--pairs", "2", "--output", str(output / "record.json")]
    module.main([*words, *told, *(["--work", str(work)] if module is not training_step else [])])
    return Record.read(output / "record.json")


def one(record: Record) -> Comparison:
    (found,) = record.comparisons
    assert len(found.seconds) == len(found.peer_seconds) == 2
    assert min(*found.seconds, *found.peer_seconds) > 0
    return found


@pytest.mark.parametrize("module", [unet_step, decode])
@pytest.mark.parametrize("peer", ["diffusers", "diffusers-best", "openvino"])
def test_networks_agree_with_their_peer(
    module: ModuleType, peer: str, work: Path, tmp_path: Path
) -> None:
    record = rehearse(module, work, tmp_path, "--precision", "float32", "--peer", peer)
    found = one(record)
    assert found.difference is not None and found.difference <= AGREEMENT
    assert found.share is not None and found.share > 0
    assert record.tiny and record.machine.precision == "float32"


def test_bfloat16_is_told_apart(work: Path, tmp_path: Path) -> None:
    record = rehearse(unet_step, work, tmp_path, "--precision", "bfloat16", "--batch", "2")
    found = one(record)
    assert record.machine.precision == found.mezzotint == "bfloat16"
    assert "float32" in found.peer and found.images == 2
    assert found.difference is not None and AGREEMENT < found.difference < 0.5


def test_whole_pictures_are_the_same(work: Path, tmp_path: Path) -> None:
    record = rehearse(
        text_to_image, work, tmp_path, "--precision", "float32", "--steps", "3", "--batch", "2"
    )
    found = one(record)
    assert found.difference is not None and found.difference <= text_to_image.AGREEMENT
    assert found.images == 2


def test_approximations_are_named(work: Path, tmp_path: Path) -> None:
    words = ["--feature-reuse", "2", "--guidance-interval", "0.5", "5", "--steps", "4"]
    record = rehearse(text_to_image, work, tmp_path, *words, "--precision", "float32")
    exact, near = record.comparisons
    assert exact.mezzotint == "float32"
    assert near.mezzotint == "float32, feature reuse 2, guided from 0.5 to 5"
    assert exact.peer_seconds == near.peer_seconds and exact.seconds != near.seconds
    assert exact.difference is not None and exact.difference <= text_to_image.AGREEMENT
    assert near.difference is not None and near.difference > exact.difference
    assert "--guidance-interval 0.5 5.0" in record.command
    words = ["--quantization", "int8", "--precision", "float32", "--peer", "diffusers"]
    record = rehearse(unet_step, work, tmp_path, *words)
    assert one(record).mezzotint == "float32, int8"
    assert "--quantization int8" in record.command


@pytest.mark.parametrize(
    ("stage", "peer"),
    [
        ("diffusion", "diffusers"),
        ("diffusion", "diffusers-autocast"),
        ("autoencoder", "diffusers"),
        ("autoencoder", "original"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")
def test_training_steps_begin_from_networks_that_agree(
    stage: str, peer: str, work: Path, tmp_path: Path
) -> None:
    words = (stage, "--peer", peer, "--precision", "float32", "--set", "channels_last=true")
    record = rehearse(training_step, work, tmp_path, *words)
    assert record.command.startswith(f"python -m benchmarks.training_step {stage} --")
    assert "--set channels_last=true" in record.command
    found = one(record)
    assert found.mezzotint == "float32, float32 weights, channels_last=true"
    assert found.difference is not None and found.difference <= AGREEMENT
    assert (found.flops is not None) == (stage == "diffusion")


@pytest.mark.parametrize("told", ["batch_size=8", "accumulate=4", "loss.l2=1", "patch=32"])
def test_what_the_peer_would_not_follow_is_refused(
    told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        training_step.main(["autoencoder", "--set", told])
    assert stopped.value.code == 2
    assert f"--set {told}: the peer's loop would not follow" in capsys.readouterr().err


def test_a_peer_of_the_other_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        training_step.main(["diffusion", "--peer", "original"])
    assert stopped.value.code == 2
    assert "of the stage diffusion, one of" in capsys.readouterr().err


def test_a_curve_and_its_page(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "performance"
    record = rehearse(growth, work, tmp_path, "batch", "--precision", "float32")
    assert [each.at for each in record.comparisons] == [1, 2]
    folder.mkdir()
    (tmp_path / "record.json").rename(folder / "growth-batch.json")
    assert "grows with the power" in capsys.readouterr().out
    rehearse(unet_step, work, folder, "--precision", "float32")
    page = tmp_path / "performance.md"
    performance.main(["--page", str(page), "--tiny"])
    text = page.read_text()
    assert "| UNet step, latents 2 x 4 x 8 x 8 | float32 |" in text
    assert "![Seconds by pictures at once](performance/growth-batch.webp)" in text
    assert "Seconds a picture, by how many are drawn at once: 1:" in text
    assert text.count("python -m benchmarks.growth") == 1
    assert (folder / "growth-batch.webp").stat().st_size > 1000
    with pytest.raises(SystemExit, match="rehearsal with tiny networks"):
        performance.main(["--page", str(page)])


def test_a_page_needs_measurements(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no JSON file of a benchmark"):
        performance.main(["--page", str(tmp_path / "performance.md")])


def test_importing_is_measured_in_processes(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = rehearse(startup, work, tmp_path, "--only", "import", "--precision", "float32")
    assert one(record).peer == "Python alone"
    assert record.command.endswith("--only import --steps 20 --model emoji")
    assert "import mezzotint itself" in capsys.readouterr().out


def test_the_shipped_model_draws_from_a_cold_shell(tmp_path: Path) -> None:
    told = Namespace(model="emoji", device="cpu", precision="float32", steps=20)
    what, peer, ours, _ = startup.processes("shipped", tmp_path, told)
    ours()
    assert (what, peer) == ("mezzotint sample emoji -n 4", "import torch")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4


@pytest.mark.parametrize(("peer", "inference"), [("diffusers", False), ("diffusers-best", True)])
def test_a_peer_runs_as_its_name_says(peer: str, inference: bool) -> None:
    with running(peer):
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == inference


def test_the_price_of_approximations_is_of_the_same_captions_and_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that change nothing cost nothing; what lies there is not drawn again."""
    output, work = tmp_path / "cost.json", tmp_path / "work"
    told = ["--pictures", "4", "--steps", "2", "--work", str(work), "--output", str(output)]
    same = ["--feature-reuse", "1", "--guidance-interval", "0", "1e9"]
    approximation_cost.main([*told, *same])
    result = json.loads(output.read_text())
    assert result["costs"] == pytest.approx(0, abs=1e-6) and result["pictures"] == 4
    assert result["kid"]["plain"][0] > 0
    assert "the options cost +0.0%" in capsys.readouterr().out.replace("-0.0%", "+0.0%")
    approximation_cost.main([*told, "--feature-reuse", "2", "--guidance-interval", "0", "1e-6"])
    assert json.loads(output.read_text())["costs"] != result["costs"]
    drawn = capsys.readouterr().out
    assert "approximated-" in drawn and "plain-" not in drawn
