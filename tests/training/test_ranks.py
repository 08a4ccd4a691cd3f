"""Several processes train what one trains: started by torchrun, which sets what clusters set."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from shard_files import sample, write_tar

from mezzotint.checkpoints.model import load_model
from mezzotint.errors import ConfigError
from mezzotint.training.checkpoint import list_checkpoints, newest_checkpoint
from mezzotint.training.ranks import Ranks, positions_of
from mezzotint.training.run import train

SCRIPT = Path(__file__).with_name("ranks_script.py")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
QUIET = Console(quiet=True)
STEPS = 50
EXACT: dict[str, Any] = {
    "precision": "float64",
    "budget": {"max_steps": STEPS},
    "run": {"log_steps": 1, "checkpoint_minutes": 60.0},
}
SHARDED = {"budget": {"max_steps": 12}, "run": {**EXACT["run"], "sharding": True}}
DIVERGING = {
    "batch_size": 8,
    "data__resolution": 16,
    "optimizer": {"learning_rate": 0.1},
    "budget": {"max_steps": 12},
}
ADVERSARIAL = {
    "perceptual": 0.0,
    "adversarial": {
        "start_step": 20,
        "pretrain_steps": 10,
        "discriminator": {"channels": 8, "layers": 2},
    },
}
VQ = {
    "kind": "vq",
    "latent_channels": 4,
    "codebook_size": 24,
    "block_out_channels": [16, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_attention": False,
}


def recipes(tiny, folder: Path) -> list[str]:
    """Write the recipes; returns their names."""
    written = {
        # 48 pictures in steps of 8: an epoch ends, and codes are re-seeded, all six steps
        "vq": tiny.autoencoder(model=VQ, loss=ADVERSARIAL, accumulate=2, ema_decay=0.9, **EXACT),
        "kl": tiny.autoencoder(normalization="channel", loss=ADVERSARIAL, **EXACT),
        "class": tiny.diffusion(conditioning={"kind": "class", "width": 32}, **EXACT),
        "sharded": tiny.diffusion(accumulate=2, **(EXACT | SHARDED)),
        "diverging": tiny.autoencoder(**(EXACT | DIVERGING)),
    }
    for name, recipe in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return list(written)


def stream_recipe(tiny, shards: Path) -> dict[str, Any]:
    """A recipe of two shards, in which seven of sixteen pictures have no text."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        for k in range(16):
            members |= sample(f"{k:04d}", k)
            if k < 7:
                del members[f"{k:04d}.txt"]
        write_tar(shards / f"{shard:05d}.tar", members)
    data = {"kind": "webdataset", "urls": str(shards), "resolution": 32, "max_broken": 0.9}
    recipe = tiny.diffusion(
        data={**data, "shuffle_buffer": 64}, latent_variants=0, budget={"max_steps": 2}
    )
    return recipe.to_dict()


def torchrun(folder: Path, *lines: str, expect: int = 0) -> str:
    """Let two ranks train; returns what they said."""
    done = subprocess.run(
        [TORCHRUN, "--nproc-per-node", "2", "--standalone", SCRIPT, str(folder), *lines],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Runs of one process, and those of two, of the same recipes."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    names = recipes(tiny, one)
    recipes(tiny, two)
    for name in names:
        train(one / f"{name}.yaml", output=one / "runs" / name, console=QUIET)
    (two / "stream.yaml").write_text(yaml.safe_dump(stream_recipe(tiny, two / "shards")))
    said = torchrun(two, *names, "stream")
    (two / "said.txt").write_text(said)
    return one / "runs", two / "runs"


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["vq", "kl", "class", "sharded"])
def test_two_processes_lose_what_one_does(both, name):
    one, two = (log_of(folder / name) for folder in both)
    assert len(one) == len(two) == (12 if name == "sharded" else STEPS)
    # a mean of logarithms depends on parts
    left_out = {"seconds", "images_per_second", "peak_share", "psnr"}
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() ^ theirs.keys() <= {"images_per_second", "peak_share"}
        for key in mine.keys() - left_out:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), (mine["step"], key)
    if name == "vq":
        assert "code_usage" in {key for row in one for key in row}
    if name in ("vq", "kl"):
        assert one[-1]["adaptive_weight"] > 0 and "adaptive_weight" not in one[10]


def test_no_thread_that_talks_last_outlives_the_training(both):
    """It would abort the process, did it let go of a tensor while the interpreter ends."""
    said = (both[1].parent / "said.txt").read_text()
    left = re.findall(r"left at the end: (.*)", said)
    # torch's cache of sharded tensors keeps the group that trains, which is idle by then
    assert len(left) == 2 and all(names.count("gloo_tcp_loop") <= 1 for names in left)


def test_two_processes_go_back_as_one_does(both):
    one, two = (log_of(folder / "diverging") for folder in both)
    for rows in (one, two):
        assert [row["warning"] for row in rows if "warning" in row] == ["learning rate", "rollback"]
    assert one[-1]["step"] == two[-1]["step"] == 12
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["vq", "kl", "class", "sharded"])
def test_two_processes_end_where_one_does(both, name):
    one, two = (newest_checkpoint(folder / name / "checkpoints")[0] for folder in both)
    assert one is not None and two is not None
    assert one.tensors.keys() == two.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[group].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, two.tensors[group][key], rtol=1e-5, atol=1e-7)


def test_what_each_rank_skips_is_told(both):
    """A rank reads a shard of its own, and the first alone writes."""
    told = (both[1] / "stream" / "log.txt").read_text()
    own, other = (
        re.findall(rf":\d\d {who}skipped (\S+): no text", told) for who in ("", "rank 1 ")
    )
    assert len(own) in (7, 14) and len(other) == 5
    assert {name.partition("/")[0] for name in (*own, *other)} == {"00000.tar", "00001.tar"}
    more = re.search(r"rank 1 skipped (\d+) more", told)
    assert more is not None and int(more[1]) in (2, 9)


def test_the_statistics_of_latents_are_those_of_all(both):
    first, second = (json.loads((f / "vq/model/vae/config.json").read_text()) for f in both)
    assert first["scaling_factor"] == pytest.approx(second["scaling_factor"], rel=1e-6)


def test_sharded_weights_are_exported_whole(both):
    one, two = (load_model(folder / "sharded" / "model") for folder in both)
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[key], rtol=1e-5, atol=1e-6)
    shares = list(list_checkpoints(both[1] / "sharded" / "checkpoints")[-1].glob("*.safetensors"))
    assert len(shares) == 2
    assert (both[1] / "sharded" / "samples" / "step-0000012.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["class", "sharded"])
def test_two_processes_go_on_as_one(both, tiny, tmp_path, name):
    """And what was sharded as whole."""
    steps = log_of(both[0] / name)[-1]["step"] + 4
    runs: list[Path] = []
    for folder in both:
        run = tmp_path / folder.parent.name
        shutil.copytree(folder / name, run)
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["budget"]["max_steps"] = steps
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(recipe))
        train(tmp_path / "more.yaml", output=run, resume=True, console=QUIET)
        runs.append(run)
    one, two = (log_of(run) for run in runs)
    assert one[-1]["step"] == two[-1]["step"] == steps
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-5)


def test_a_batch_is_shared_evenly_or_not_at_all(tiny, tmp_path, monkeypatch):
    parts = [positions_of(3, 6, 2, Ranks(rank, 3)) for rank in range(3)]
    assert sorted(sum(parts, [])) == positions_of(3, 6, 2, Ranks()) == list(range(36, 48))
    assert parts[1] == [38, 39, 44, 45]  # of each part, so that parts are the same as well
    recipes(tiny, tmp_path)
    recipe = yaml.safe_load((tmp_path / "class.yaml").read_text())
    (tmp_path / "class.yaml").write_text(yaml.safe_dump(recipe | {"batch_size": 5}))
    said = torchrun(tmp_path, "class", expect=1)
    assert "not divisible by 2 processes; the nearest is 4 or 6" in said
    with pytest.raises(ConfigError, match="first stages are small"):
        tiny.autoencoder(run={"sharding": True})
