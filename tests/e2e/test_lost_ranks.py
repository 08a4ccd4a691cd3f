"""One of several processes dies: the others say so at once, and all go on from the last state."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from mezzotint.training.checkpoint import list_checkpoints, newest_checkpoint

MEZZOTINT = Path(sys.executable).with_name("mezzotint")
TORCHRUN = Path(sys.executable).with_name("torchrun")
PATIENCE = 60  # seconds, within which the others must have ended


def start(recipe: Path, run: Path, port: int, *options: str) -> list[subprocess.Popen]:
    """Start two ranks as a cluster's script would, without torchrun, which would end the other."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [str(MEZZOTINT), "train", str(recipe), "--output", str(run), *options]
    return [
        subprocess.Popen(
            command,
            env={**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_rank_is_killed(tiny, tmp_path, free_port):
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "autoencoder",
        budget={"max_steps": 1_000_000},
        run={"checkpoint_minutes": 1 / 600},
    )
    run = tmp_path / "run"
    first, second = start(recipe, run, free_port)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(run / "checkpoints")) < 2:
        assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
        time.sleep(0.05)
    second.kill()
    begun = time.monotonic()
    _, errors = first.communicate(timeout=PATIENCE)
    assert time.monotonic() - begun < PATIENCE
    assert first.returncode == 2 and "Traceback" not in errors, errors
    assert "another process of the run has ended" in errors and "--resume" in errors
    second.communicate()
    checkpoint, damaged = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and damaged == []
    # a restart, by torchrun now, goes on, and a signal to one of them stops both
    longer = yaml.safe_load(recipe.read_text())
    longer["budget"] = {"max_steps": checkpoint.step + 3}
    recipe.write_text(yaml.safe_dump(longer))
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", MEZZOTINT, "train", recipe]
    done = subprocess.run(
        [*map(str, command), "--output", str(run), "--resume"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"going on from step {checkpoint.step:,} " in done.stdout
    last, _ = newest_checkpoint(run / "checkpoints")
    assert last is not None and last.step == checkpoint.step + 3


def test_a_signal_to_one_rank_stops_all_of_them(tiny, tmp_path, free_port):
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder", budget={"max_steps": 1_000_000})
    run = tmp_path / "run"
    ranks = start(recipe, run, free_port)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and all(r.poll() is None for r in ranks)
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    said = [r.communicate(timeout=PATIENCE) for r in ranks]
    assert [r.returncode for r in ranks] == [130, 130], said
    assert "stopped by a signal to another process" in said[0][0]
    checkpoint, damaged = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and damaged == []
