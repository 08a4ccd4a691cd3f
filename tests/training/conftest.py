"""What several tests of training share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import clip, kl, model
from torch import nn

from mezzotint.checkpoints.pipelines import save_pipeline

QUICK = {
    "name": "quick",
    "metrics": ["kid"],
    "network": "random",
    "resize": "bicubic-antialias",
    "samples": 6,
    "kid_subsets": None,
    "batch_size": 8,
}


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of ``run`` that measure six pictures every other step, and more as it is told."""

    def settings(**changes: Any) -> dict[str, Any]:
        protocol = tmp_path / "quick.yaml"
        protocol.write_text(json.dumps(QUICK))
        config = {"every_steps": 2, "protocol": str(protocol), "samples": 6, **changes}
        return {"evaluation": config}

    return settings


@pytest.fixture(scope="session")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers' with a CLIP text encoder; it predicts the noise."""
    folder = tmp_path_factory.mktemp("clip") / "base"
    torch.manual_seed(0)
    untrained = model(clip(), kl(), size=(32, 32))
    for parameter in untrained.unet.parameters():
        if not parameter.any():  # an untrained UNet says nothing, and so learns nothing
            nn.init.normal_(parameter, std=0.1)
    save_pipeline(untrained, folder)
    return folder
