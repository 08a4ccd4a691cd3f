"""Every condition that a base model may have is fine-tuned on, and what is written acts on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import CONDITIONERS, kl, model
from torch import nn

from mezzotint.checkpoints.adapters import AdapterSet
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.lora import read_lora
from mezzotint.checkpoints.model import save_model

SCENES: dict[str, Any] = {
    "kind": "scenes",
    "resolution": 64,
    "count": 4,
    "concepts": ["red-apple", "banana", "frog"],
    "max_objects": 2,
    "style": "noto",
}
DEGRADATION = {"factor": 2}


@pytest.mark.parametrize("kind", ["bert", "layout", "map", "low-res", "inpainting", "nothing"])
def test_a_lora_and_all_weights(tiny, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    untrained = model(CONDITIONERS[kind](), kl(3 if kind == "map" else 2), size=(64, 64))
    for parameter in untrained.unet.parameters():
        if not parameter.any():  # an untrained UNet says nothing, and so learns nothing
            nn.init.normal_(parameter, std=0.1)
    save_model(untrained, tmp_path / "base")
    changes: dict[str, Any] = {"data": SCENES, "degradation": DEGRADATION}
    changes |= {"budget": {"max_steps": 2}, "batch_size": 2}
    run = tiny.train(tiny.finetune(tmp_path / "base", **changes), tmp_path / "lora")
    adapter = read_lora(run / "model")
    assert all(layer.up.abs().max() > 0 for layer in adapter.layers)
    base = load_any(tmp_path / "base").model
    AdapterSet(base).apply(adapter)
    components = ["unet"] if not list(base.conditioner.parameters()) else ["unet", "conditioner"]
    changes |= {"method": "full", "components": components, "latent_variants": 0}
    run = tiny.train(tiny.finetune(tmp_path / "base", **changes), tmp_path / "full")
    trained = load_any(run).model
    for name in ("unet", "conditioner"):
        before, after = (getattr(m, name).state_dict() for m in (untrained, trained))
        moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert bool(moved) == (name in components), name
    for key, tensor in trained.first_stage.state_dict().items():
        assert torch.equal(tensor, untrained.first_stage.state_dict()[key]), key
