"""``--verify-resume`` proves what it says, and finds a run that is not resumed exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mezzotint.errors import ConfigError, TrainingError
from mezzotint.training.checkpoint import Checkpoint
from mezzotint.training.verify import _compare, verify_resume

MEZZOTINT = str(Path(sys.executable).with_name("mezzotint"))


def test_the_command_trains_in_three_processes_and_counts_what_is_equal(tiny, tmp_path):
    recipe = tiny.write(
        tmp_path / "vq.yaml",
        "autoencoder",
        model={
            "kind": "vq",
            "codebook_size": 24,
            "block_out_channels": [16, 16, 16],
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        loss={"perceptual": 0.0, "adversarial": {"discriminator": {"channels": 8, "layers": 2}}},
        accumulate=2,
        batch_size=8,  # an epoch of 48 images ends after three of the ten steps, and again
        ema_decay=0.9,
    )
    done = subprocess.run(
        [MEZZOTINT, "train", str(recipe), "--verify-resume"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "5 + 5 steps equal 5, a stop and 5: " in done.stdout
    assert done.stdout.rstrip().endswith("numbers, bit for bit")


def test_a_condition_that_is_concatenated(tiny, tmp_path):
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "diffusion",
        data={"kind": "scenes", "resolution": 64, "count": 8},
        conditioning={"kind": "inpainting"},
        unet__in_channels=9,
        unet__cross_attention_dim=None,
        latent_variants=0,
    )
    same = verify_resume(recipe, before=2, after=2, device="cpu")
    assert same.tensors > 100 and same.numbers > 50_000


def test_what_differs_is_named(tmp_path, monkeypatch):
    whole = {"weights": {"a": torch.zeros(2), "b": torch.ones(2)}, "ema": {"a": torch.zeros(2)}}
    other = {"weights": {"a": torch.tensor([0.0, 1e-9]), "b": torch.ones(2)}, "ema": {}}
    one = Checkpoint(4, whole, {"seconds": 1.0, "inputs": 1}, tmp_path)
    _compare(one, Checkpoint(4, whole, {"seconds": 2.0, "inputs": 1}, tmp_path))
    with pytest.raises(TrainingError, match=r"ran through: ema\.a, weights\.a, inputs differ"):
        _compare(one, Checkpoint(4, other, {"seconds": 1.0, "inputs": 2}, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        verify_resume("emoji-demo")
