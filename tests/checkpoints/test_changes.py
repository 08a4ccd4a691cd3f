"""A model is kept as what it changes of another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.checkpoints import changes
from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import read_model, save_as_changes, save_model
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
)
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.unet import UNet

RANK = 2


def with_unet(model: LatentDiffusion, unet: UNet, conditioner: Any = None) -> LatentDiffusion:
    return LatentDiffusion(
        model.first_stage,
        unet,
        conditioner or model.conditioner,
        model.schedule_config,
        model.normalization,
        model.image_size,
    ).eval()


@pytest.fixture
def base(text_run: Path, tmp_path: Path) -> Path:
    """A model in float16, as shipped ones are."""
    save_model(load_any(text_run).model, tmp_path / "base", dtype=torch.float16)
    return tmp_path / "base"


@pytest.fixture
def other(base: Path) -> LatentDiffusion:
    """It inpaints; its UNet is the base's but for low-rank changes and its first layer."""
    old = load_any(base).model
    unet = UNet(old.unet.config.model_copy(update={"in_channels": 9}))
    torch.manual_seed(0)
    state = dict(old.unet.state_dict())
    state["conv_in.weight"] = torch.randn(len(state["conv_in.weight"]), 9, 3, 3)
    for name, weight in old.unet.state_dict().items():
        if weight.ndim > 1 and not name.startswith("conv_in"):
            up, down = torch.randn(len(weight), RANK), torch.randn(RANK, weight[0].numel())
            state[name] = weight + 0.02 * (up @ down).view_as(weight)
    unet.load_state_dict(state)
    spatial = InpaintingConditioner(InpaintingConditionerConfig())
    return with_unet(old, unet, HybridConditioner(old.conditioner, spatial))


def keep(other: LatentDiffusion, base: Path, **told: Any) -> Path:
    folder = base.with_name("changes")
    save_as_changes(other, base, folder, rank=RANK, dtype=torch.float16, **told)
    return folder


def test_it_is_read_as_it_was_and_takes_less_space(other: LatentDiffusion, base: Path) -> None:
    folder = keep(other, base, defaults=SamplingDefaults(steps=7))
    read = read_model(folder)
    assert read.defaults.steps == 7
    wanted = other.state_dict()
    for name, weight in read.model.state_dict().items():
        # B and A are in float16: a thousandth of a change of about 0.03
        assert (weight - wanted[name]).abs().max() < 2e-3, name
    weights = [p for p in folder.rglob("*.safetensors")]
    assert {p.name for p in weights} == {changes.LORA, changes.NEW}
    whole = base.with_name("whole")
    save_model(read.model, whole, dtype=torch.float16)
    sizes = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (folder, whole)]
    assert sizes[0] < 0.35 * sizes[1]


def test_what_is_unchanged_is_not_written_and_exact(other: LatentDiffusion, base: Path) -> None:
    old = load_any(base).model
    unet = UNet(old.unet.config)
    unet.load_state_dict(old.unet.state_dict())
    folder = keep(with_unet(old, unet), base)
    assert all(not changes.open_tensors(p) for p in folder.rglob("*.safetensors"))
    for name, weight in read_model(folder).model.state_dict().items():
        assert torch.equal(weight, old.state_dict()[name]), name


def test_a_layer_that_changed_by_more_is_kept_whole(other: LatentDiffusion, base: Path) -> None:
    name = "mid_block.resnets.0.conv1"
    with torch.no_grad():
        other.unet.get_parameter(f"{name}.weight").add_(0.1 * torch.randn(32, 32, 3, 3))
        other.unet.get_parameter("conv_norm_out.bias").add_(0.5)
    folder = keep(other, base)
    new = changes.open_tensors(folder / "unet" / changes.NEW)
    assert set(new) == {
        *(f"{part}.{leaf}" for part in (name, "conv_norm_out") for leaf in ("weight", "bias")),
        "conv_in.weight",
        "conv_in.bias",
    }
    read = read_model(folder).model.unet.state_dict()
    for key in new:
        assert torch.equal(read[key], other.unet.state_dict()[key].half().float()), key


def test_inspection_tells_what_is_stored_and_whose_the_rest_is(
    other: LatentDiffusion, base: Path
) -> None:
    folder = keep(other, base)
    found = inspect_model(folder, hashed=True)
    assert not (found.problems or found.missing or found.unexpected)
    assert found.image_size == other.image_size
    assert found.notes == (f"what is not here is of the model {base}, of which this is a change",)
    stored = {part.name: part for part in found.parts}
    assert set(stored["unet"].files) == {changes.LORA, changes.NEW}
    assert stored["conditioner"].tensors == 0
    lora = folder / changes.LORA
    lora.write_bytes(lora.read_bytes()[:-1] + b"\x07")
    assert inspect_model(folder, hashed=True).sha256 != found.sha256


def test_changes_of_another_base_are_refused(other: LatentDiffusion, base: Path) -> None:
    folder = keep(other, base)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="changes of another model than"):
        load_any(folder)
    assert "changes of another model than" in inspect_model(folder).problems[0]


def test_what_is_wrong_is_named(other: LatentDiffusion, base: Path) -> None:
    folder = keep(other, base)
    index = json.loads((folder / "model_index.json").read_text())

    def told(entry: Any) -> str:
        (folder / "model_index.json").write_text(json.dumps(index | {"base": entry}))
        with pytest.raises(CheckpointError) as caught:
            load_any(folder)
        assert inspect_model(folder).problems
        return str(caught.value)

    assert "expected the path of a model from here, and its sha256" in told("base")
    assert "expected the path of a model" in told({"model": "/base", "sha256": "0"})
    assert "gone, which is not there, and the package has none" in told(
        {"model": "../gone", "sha256": "0"}
    )
    assert "changes of another model than" in told({"model": "../base", "sha256": "0"})
    assert "changes of another model than" in told({"model": "../emoji", "sha256": "0"})
    (folder / "model_index.json").write_text(json.dumps(index))
    new = folder / "unet" / changes.NEW
    kept = new.read_bytes()
    new.write_bytes(kept[:-4])
    with pytest.raises(CheckpointError, match=changes.NEW):
        load_any(folder)
    new.write_bytes(kept)
    shutil.move(folder / changes.LORA, folder / "elsewhere")
    with pytest.raises(CheckpointError, match=changes.LORA):
        load_any(folder)
    assert inspect_model(folder).problems


def test_a_change_of_what_the_base_has_not_is_refused(other: LatentDiffusion, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = keep(other, base)
    factors = load_file(folder / changes.LORA)
    name = "unet.mid_block.resnets.0.conv1"
    moved = {k.replace(name, "unet.nowhere"): v for k, v in factors.items()}
    save_file(moved, folder / changes.LORA)
    with pytest.raises(CheckpointError, match=r"unet\.nowhere: the base has no such layer"):
        load_any(folder)
    wider = {
        k: torch.cat([v, v]) if k == f"{name}.lora_B.weight" else v for k, v in factors.items()
    }
    save_file(wider, folder / changes.LORA)
    with pytest.raises(CheckpointError, match=r"changes \(64, 32, 3, 3\), not \(32, 32, 3, 3\)"):
        load_any(folder)
    assert inspect_model(folder).problems


def test_only_what_is_the_same_is_shared(other: LatentDiffusion, base: Path) -> None:
    with torch.no_grad():
        next(other.first_stage.parameters()).add_(1.0)
    with pytest.raises(CheckpointError, match="has another first stage"):
        keep(other, base)
