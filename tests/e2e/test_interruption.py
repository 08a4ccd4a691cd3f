"""Whatever kills a run, it goes on from its newest whole checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mezzotint.training.checkpoint import list_checkpoints, newest_checkpoint

MEZZOTINT = str(Path(sys.executable).with_name("mezzotint"))
KILLS = int(os.environ.get("MEZZOTINT_KILLS", "6"))


def start(recipe: Path, run: Path, *options: str) -> subprocess.Popen:
    command = [MEZZOTINT, "train", str(recipe), "--output", str(run), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(recipe: Path, run: Path, *options: str) -> tuple[int, str, str]:
    """Train to the end: exit code, output, errors."""
    process = start(recipe, run, *options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for_checkpoint(run: Path, process: subprocess.Popen, newer_than: int = -1) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        saved = list_checkpoints(run / "checkpoints")
        if saved and int(saved[-1].name.removeprefix("step-")) > newer_than:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("no checkpoint within a minute")


def test_kills_at_random_moments(tiny, tmp_path):
    """A checkpoint every tenth of a second, so that some of the kills strike while one is saved."""
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "autoencoder",
        budget={"max_steps": 1_000_000},
        run={"checkpoint_minutes": 1 / 600, "log_steps": 1},
    )
    run, moments, reached = tmp_path / "run", random.Random(0), -1
    for kill in range(KILLS):
        process = start(recipe, run, *(["--resume"] if kill else []))
        wait_for_checkpoint(run, process, newer_than=reached)
        time.sleep(moments.random() * 0.5)
        process.kill()
        output, _ = process.communicate()
        if kill:
            assert f"going on from step {reached:,} " in output
        checkpoint, damaged = newest_checkpoint(run / "checkpoints")
        assert checkpoint is not None and damaged == []
        assert checkpoint.step > reached
        reached = checkpoint.step
    # what the kills left half written is gone with the next checkpoint
    process = start(recipe, run, "--resume")
    wait_for_checkpoint(run, process, newer_than=reached)
    process.terminate()
    process.communicate(timeout=60)
    assert not list((run / "checkpoints").glob(".*"))


def test_kills_while_both_stages_are_trained(tiny, tmp_path):
    """Wherever they strike, the first stage, the encoding or the second, the run ends well."""
    quick = {"run": {"checkpoint_minutes": 1 / 600}, "precision": "float32"}
    first = tiny.write(tmp_path / "first.yaml", "autoencoder", budget={"max_steps": 60}, **quick)
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "diffusion",
        first_stage={"kind": "trained", "recipe": str(first)},
        budget={"max_steps": 60},
        **quick,
    )
    run, moments, kills = tmp_path / "run", random.Random(1), 0
    log = run / "log.txt"
    for _ in range(30):
        said = len(log.read_bytes()) if log.is_file() else 0
        process = start(recipe, run, *(["--resume"] if (run / "recipe.yaml").is_file() else []))
        while process.poll() is None and (not log.is_file() or len(log.read_bytes()) == said):
            time.sleep(0.02)  # imports are slow, and nothing is to be lost by a kill yet
        try:
            _, errors = process.communicate(timeout=1 + 4 * moments.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    assert kills >= 1
    checkpoint, damaged = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 60 and damaged == []
    assert (run / "model" / "model_index.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_exits_with_130(tiny, tmp_path, number):
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "autoencoder",
        budget={"max_steps": 1_000_000},
        run={"checkpoint_minutes": 1 / 600},
    )
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for_checkpoint(run, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    step = int(output.split(f"stopped by {number.name} at step ")[1].split(";")[0].replace(",", ""))
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == step


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tiny, tmp_path):
    """On a file system of 8 MB of its own, filled up while training goes on."""
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "autoencoder",
        budget={"max_steps": 1_000_000},
        run={"checkpoint_minutes": 1 / 600},
    )
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = f"""
        set -e
        mount -t tmpfs -o size=8m tmpfs {disk}
        {MEZZOTINT} train {recipe} --output {disk}/run 2>{tmp_path}/errors &
        trainer=$!
        until ls {disk}/run/checkpoints/step-* >/dev/null 2>&1; do sleep 0.05; done
        dd if=/dev/zero of={disk}/filler bs=64k >/dev/null 2>&1 || true
        set +e
        wait $trainer
        code=$?
        cp -r {disk}/run {copy}
        exit $code
    """
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    errors = (tmp_path / "errors").read_text()
    assert done.returncode == 2, done.stderr + errors
    assert errors.count("\n") == 1 and "the disk is full" in errors and "is intact" in errors
    checkpoint, damaged = newest_checkpoint(copy / "checkpoints")
    assert checkpoint is not None and damaged == []
    assert not [p for p in os.listdir(copy / "checkpoints") if p.endswith(".tmp")]


def test_a_run_is_not_begun_again_over_another(tiny, tmp_path):
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder")
    assert finish(recipe, tmp_path / "run")[0] == 0
    code, _, errors = finish(recipe, tmp_path / "run")
    assert code == 2
    assert "already holds a run; go on with it by --resume" in errors


def test_another_recipe_cannot_resume_a_run(tiny, tmp_path):
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder")
    assert finish(recipe, tmp_path / "run")[0] == 0
    other = tiny.write(tmp_path / "other.yaml", "autoencoder", seed=3, loss__l1=0.5)
    code, _, errors = finish(other, tmp_path / "run", "--resume")
    assert code == 2
    assert "begun with other values of loss.l1, seed" in errors


def test_a_truncated_checkpoint_is_passed_by_and_named(tiny, tmp_path):
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder", run={"checkpoint_minutes": 1e-6})
    assert finish(recipe, tmp_path / "run")[0] == 0
    *_, older, newest = list_checkpoints(tmp_path / "run" / "checkpoints")
    file = newest / "autoencoder.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    longer = tiny.write(tmp_path / "longer.yaml", "autoencoder", budget={"max_steps": 6})
    code, output, _ = finish(longer, tmp_path / "run", "--resume")
    assert code == 0
    assert f"passed by a damaged checkpoint: {file}" in output
    assert f"going on from step {older.name.removeprefix('step-')}" in output


def test_a_picture_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(tiny, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(6):
        Image.new("RGB", (40, 40), (40 * k, 90, 200)).save(pictures / f"{k}.png")
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "autoencoder",
        budget={"max_steps": 1_000_000},
        run={"checkpoint_minutes": 1 / 600},
    )
    data = {"kind": "folder", "path": str(pictures), "resolution": 32, "cache_limit_mib": 0}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"data": data}))
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for_checkpoint(run, process)
    (pictures / "3.png").rename(tmp_path / "away.png")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "3.png" in errors
    checkpoint, damaged = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and damaged == []
    (tmp_path / "away.png").rename(pictures / "3.png")
    process = start(recipe, run, "--resume")
    wait_for_checkpoint(run, process, newer_than=checkpoint.step)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert f"going on from step {checkpoint.step:,} " in output
