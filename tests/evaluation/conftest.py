"""Folders of small pictures, and a protocol that needs no weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import IdentityFirstStage, IdentityFirstStageConfig
from mezzotint.models.unet import UNet, UNetConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which it may fill and damage."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def _write_pictures(folder: Path, count: int, *, side: int = 16, seed: int = 0) -> Path:
    """Write pictures of coloured blocks, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        blocks = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
        blocks.save(folder / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="session")
def write_pictures() -> Callable[..., Path]:
    """Writes pictures into a folder."""
    return _write_pictures


@pytest.fixture(scope="session")
def protocol() -> EvaluationProtocol:
    """All metrics that go without class logits, on the random network."""
    return EvaluationProtocol(
        name="tiny",
        metrics=("kid", "fid", "precision", "recall", "density", "coverage", "nearest_training"),
        network="random",
        resize="bicubic-antialias",
        samples=64,
        fewer=True,
        kid_subsets=None,
        resamples=4,
        batch_size=8,
    )


@pytest.fixture(scope="session")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model of three classes, on 16 x 16 pixels."""
    torch.manual_seed(0)
    unet = UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        attention_levels=(False, True),
        cross_attention_dim=8,
        num_attention_heads=2,
        norm_num_groups=4,
    )
    names = ("boot", "hat", "shirt")
    composed = LatentDiffusion(
        IdentityFirstStage(IdentityFirstStageConfig()),
        UNet(unet),
        ClassConditioner(ClassConditionerConfig(width=8, class_names=names)),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (16, 16),
    )
    folder = tmp_path_factory.mktemp("models") / "clothes"
    save_model(composed, folder)
    return folder


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two splits and three classes of 6, 3 and 3 pictures."""
    folder = tmp_path_factory.mktemp("data") / "clothes"
    for seed, (name, count) in enumerate((("boot", 6), ("hat", 3), ("shirt", 3))):
        _write_pictures(folder / "train" / name, count, seed=seed)
        _write_pictures(folder / "test" / name, 2, seed=seed + 10)
    return folder
