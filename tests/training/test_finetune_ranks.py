"""Going on from a model: two processes do what one does, and a run is resumed exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mezzotint.config import to_yaml
from mezzotint.training import verify

SCRIPT = Path(__file__).with_name("ranks_script.py")
BINARIES = Path(sys.executable).parent
LORA = {
    "components": ["unet", "conditioner"],
    "lora": {"rank": 2},
    "prior": {"prompt": "a cat", "count": 3, "steps": 2},
    "accumulate": 2,
}
EXACT = {
    "precision": "float64",
    "run": {"log_steps": 1},
    "ema_decay": 0.9,
    "budget": {"max_steps": 5},
}


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_train_what_one_does(tiny, text_run, clip_base, tmp_path):
    token = {"word": "<ink>", "initial": "ab"}
    recipes = {
        "lora": tiny.finetune(text_run, **LORA, **EXACT),
        "word": tiny.finetune(clip_base, method="textual_inversion", token=token, **EXACT),
        "decoder": tiny.decoder(accumulate=2, **EXACT),
        "student": tiny.distill(text_run, accumulate=2, **EXACT),
        "texts": tiny.finetune(clip_base, caption_templates=["a cat", "a dog"], **EXACT),
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(recipe))
    done = subprocess.run(
        [
            BINARIES / "torchrun",
            "--nproc-per-node",
            "2",
            "--standalone",
            SCRIPT,
            tmp_path,
            *recipes,
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, recipe in recipes.items():
        alone = losses(tiny.train(recipe, tmp_path / name))
        assert losses(tmp_path / "runs" / name) == pytest.approx(alone, rel=1e-9)
        assert len(set(alone)) == 5
    for run in (tmp_path / "texts", tmp_path / "runs" / "texts"):
        told = (run / "log.txt").read_text()
        assert "3 captions encoded, 0 found in the cache" in told, told


def test_verify_resume_knows_what_goes_on_from_a_model(tiny, text_run, tmp_path, monkeypatch):
    """Three trainings, here in one process, whose imports alone would take most of a minute."""

    def in_this_process(recipe, run, device, **options):
        told = verify._train(recipe, run, device, torch.get_num_threads(), options)
        assert told is None, told

    monkeypatch.setattr(verify, "_in_new_process", in_this_process)
    changes = LORA | {"lora": {"rank": 2, "dropout": 0.1}, "ema_decay": 0.9}
    (tmp_path / "lora.yaml").write_text(to_yaml(tiny.finetune(text_run, **changes)))
    (tmp_path / "student.yaml").write_text(to_yaml(tiny.distill(text_run)))
    try:
        for name in ("lora", "student"):
            same = verify.verify_resume(tmp_path / f"{name}.yaml", before=2, after=2, device="cpu")
            assert same.tensors > 100 and same.numbers > 10_000
    finally:
        torch.use_deterministic_algorithms(False)
