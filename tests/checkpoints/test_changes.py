"""A model is kept as what it changes of another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.unet import UNet
from mezzotint.training.first_stage import stored_first_stage

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


def sum_of(folder: Path) -> str:
    """Of changes that were written otherwise: then what they are must be looked at."""
    return changes.content_hash(changes.change_files(folder))


def sign(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["base"]["changes"] = sum_of(folder)
    (folder / "model_index.json").write_text(json.dumps(index))


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


def test_it_is_no_less_exact_where_no_precision_is_asked_for(
    other: LatentDiffusion, base: Path
) -> None:
    folder = keep(other, base)
    exact = load_any(folder, dtype=torch.float32).model.state_dict()
    for name, weight in load_any(folder).model.state_dict().items():
        assert torch.equal(weight.float(), exact[name]), name


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

    right = index["base"]
    assert right["shares"] == "conditioner/main"
    for entry in ("base", right | {"model": "/base"}, right | {"shares": "vae"}, {"model": "x"}):
        assert "expected the path of a model from here, its sha256" in told(entry)
    assert "expected the path" in told(right | {"model": "x" * 300})
    gone = told(right | {"model": "../gone"})
    assert "gone, which is not there, and the package has none" in gone
    (base.parent / "empty").mkdir()
    assert "empty, which is not there" in told(right | {"model": "../empty"})
    for other_model in ("../base", "../emoji"):
        assert "of another model than" in told(right | {"model": other_model, "sha256": "0"})
    assert "is kept as changes of another model itself" in told(right | {"model": "."})
    (folder / "model_index.json").write_text(json.dumps(index))
    new = folder / "unet" / changes.NEW
    kept = new.read_bytes()
    new.write_bytes(kept[:-4])
    with pytest.raises(CheckpointError, match=changes.NEW):
        load_any(folder)
    new.write_bytes(kept)
    save_file({}, new)
    with pytest.raises(CheckpointError, match=f"{changes.LORA} is not what was written with this"):
        load_any(folder)
    assert inspect_model(folder).problems
    new.write_bytes(kept)
    strange = load_file(new)
    strange["conv_1.weight"] = strange.pop("conv_in.weight")
    save_file(strange, new)
    assert "conv_1.weight" in told(right | {"changes": sum_of(folder)})
    new.write_bytes(kept)
    (folder / "model_index.json").write_text(json.dumps(index))
    spatial = folder / "conditioner" / "spatial" / "config.json"
    config = spatial.read_text()
    spatial.write_text('{"_class_name": "LowResConditioner", "kind": "low_res"}')
    with pytest.raises(CheckpointError, match="in_channels is 9, but latents with what is"):
        load_any(folder)
    assert any("in_channels is 9, but" in problem for problem in inspect_model(folder).problems)
    spatial.write_text(config)
    shutil.move(folder / changes.LORA, folder / "elsewhere")
    with pytest.raises(CheckpointError, match=changes.LORA):
        load_any(folder)
    assert inspect_model(folder).problems


def test_a_change_of_what_the_base_has_not_is_refused(other: LatentDiffusion, base: Path) -> None:
    folder = keep(other, base)
    factors = load_file(folder / changes.LORA)
    name = "unet.mid_block.resnets.0.conv1"
    moved = {k.replace(name, "unet.nowhere"): v for k, v in factors.items()}
    save_file(moved, folder / changes.LORA)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"unet\.nowhere: the base has no such layer"):
        load_any(folder)
    wider = {
        k: torch.cat([v, v]) if k == f"{name}.lora_B.weight" else v for k, v in factors.items()
    }
    save_file(wider, folder / changes.LORA)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"changes \(64, 32, 3, 3\), not \(32, 32, 3, 3\)"):
        load_any(folder)
    assert inspect_model(folder).problems


def test_only_what_is_the_same_is_shared(other: LatentDiffusion, base: Path) -> None:
    with torch.no_grad():
        next(other.conditioner.parameters()).add_(1.0)
    folder = keep(other, base)
    assert (folder / "conditioner" / "main" / "model.safetensors").is_file()
    read = read_model(folder).model.conditioner.state_dict()
    for name, weight in other.conditioner.state_dict().items():
        assert torch.equal(read[name], weight.half().float()), name
    with torch.no_grad():
        next(other.first_stage.parameters()).add_(1.0)
    with pytest.raises(CheckpointError, match="has another first stage"):
        keep(other, base)


def test_what_conditions_otherwise_is_kept(other: LatentDiffusion, base: Path) -> None:
    """A conditioner that has no part in common with the base's is the model's own."""
    config = other.unet.config.model_copy(update={"cross_attention_dim": None})
    alone = with_unet(other, UNet(config), InpaintingConditioner(InpaintingConditionerConfig()))
    read = read_model(keep(alone, base)).model
    assert type(read.conditioner) is InpaintingConditioner
    assert read.unet.state_dict().keys() == alone.unet.state_dict().keys()


def test_what_lay_there_before_is_not_read(other: LatentDiffusion, base: Path) -> None:
    older = with_unet(other, other.unet, other.conditioner)
    save_model(older, base.with_name("changes"))
    stale = base.with_name("changes") / "conditioner" / "main" / "model.safetensors"
    stale.write_bytes(b"nothing that can be read")
    read = read_model(keep(other, base)).model.conditioner.state_dict()
    for name, weight in other.conditioner.state_dict().items():
        assert torch.equal(read[name], weight), name


def test_a_conditioner_that_is_gone_is_missed(other: LatentDiffusion, base: Path) -> None:
    folder = keep(other, base)
    shutil.rmtree(folder / "conditioner")
    with pytest.raises(CheckpointError, match="conditioner"):
        load_any(folder)
    assert inspect_model(folder).problems
    index = json.loads((folder / "model_index.json").read_text())
    index["base"]["shares"] = "conditioner"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a TextConditioner, but model_index.json names"):
        load_any(folder)
    assert "is a TextConditioner, but" in inspect_model(folder).problems[0]


def test_it_is_found_through_a_link_and_beside_others_of_the_name(
    other: LatentDiffusion, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(other, base)
    (base.parent / "deep" / "er").mkdir(parents=True)
    (base.parent / "deep" / "er" / "link").symlink_to(folder)
    load_any(base.parent / "deep" / "er" / "link")
    shipped = base.with_name("shipped")
    base.rename(shipped)
    save_model(other, base)
    monkeypatch.setattr(changes, "find_shipped", lambda name: shipped if name == "base" else None)
    load_any(folder)


def test_pickled_weights_of_a_base_count(other: LatentDiffusion, base: Path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    folder = keep(other, base)
    load_any(folder)
    torch.save({k: v * 0 for k, v in state.items()}, weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="of another model than"):
        load_any(folder)


def test_what_cannot_be_kept_is_refused_or_kept_whole(
    other: LatentDiffusion, base: Path, tmp_path: Path
) -> None:
    folder = keep(other, base)
    with pytest.raises(CheckpointError, match="is kept as changes of another model itself"):
        save_as_changes(other, folder, tmp_path / "further", rank=RANK)
    with pytest.raises(ConfigError, match="rank: expected at least 1, got 0"):
        save_as_changes(other, base, tmp_path / "none", rank=0)
    save_as_changes(other, base, tmp_path / "all", rank=1000, dtype=torch.float16)
    assert not changes.open_tensors(tmp_path / "all" / changes.LORA)
    fewer = UNet(other.unet.config.model_copy(update={"attention_levels": (False, False)}))
    read = read_model(keep(with_unet(other, fewer, other.conditioner), base)).model
    assert read.unet.state_dict().keys() == fewer.state_dict().keys()
    with torch.no_grad():
        other.unet.get_parameter("conv_norm_out.bias")[0] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        save_as_changes(other, base, tmp_path / "half", rank=RANK, dtype=torch.float16)
    assert not list((tmp_path / "half").rglob("*.safetensors"))


def test_its_first_stage_is_the_bases(tiny, other: LatentDiffusion, base: Path) -> None:
    """A recipe may name it where it wants a first stage."""
    recipe = tiny.diffusion(first_stage={"kind": "trained", "path": str(keep(other, base))})
    found = stored_first_stage(recipe, base)
    assert found is not None
    for name, weight in found[0].state_dict().items():
        assert torch.equal(weight, other.first_stage.state_dict()[name]), name
