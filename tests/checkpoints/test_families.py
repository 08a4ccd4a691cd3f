"""What a single file is recognised as from its header, and what it says that rests on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import NAMES, build
from torch import Tensor

from mezzotint.checkpoints.compvis_config import read_compvis_config
from mezzotint.checkpoints.families import FAMILIES, family_of_parts, find_family
from mezzotint.checkpoints.recognition import Recognised, recognise
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import open_tensors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A file of each family without anything that a public one would not have."""
    folder = tmp_path_factory.mktemp("files")
    found: dict[str, Path] = {}
    for name in NAMES:
        path = folder / f"{name}.ckpt"
        save_single_file(build(name), path)
        path.with_suffix(".yaml").rename(folder / f"{name}-beside.yaml")
        state = open_tensors(path).read()
        state.pop("v_pred", None)
        torch.save({"state_dict": state, "global_step": 5}, path)
        found[name] = path
    return found


def recognised(path: Path, **options: Any) -> Recognised:
    return recognise(open_tensors(path), None, **options)


def changed(path: Path, folder: Path, **options: Any) -> Path:
    """The same file with other tensors or with something beside them."""
    tensors = open_tensors(path)
    state = tensors.read() | options.pop("add", {})
    dropped = options.pop("drop", ())
    state = {name: t for name, t in state.items() if not name.startswith(tuple(dropped))}
    new = folder / "changed.ckpt"
    torch.save({"state_dict": state, **tensors.beside, **options}, new)
    return new


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_known_by_its_tensors(files: Mapping[str, Path], name: str) -> None:
    found = recognised(files[name])
    assert found.family.name == name.removesuffix("-kl")
    assert not found.problems and not found.unexpected
    assert found.prediction == ("v_prediction" if name == "sd2" else "epsilon")
    assert "channels for latents of" in found.family_reason
    assert found.parameters["unet"] > 0 and not found.has_ema


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_says_the_same(files: Mapping[str, Path], name: str) -> None:
    beside = files[name].with_name(f"{name}-beside.yaml")
    alone, told = recognised(files[name]), None
    told = recognise(open_tensors(files[name]), read_compvis_config(beside))
    for field in ("unet", "first_stage", "main", "spatial", "schedule", "image_size"):
        assert getattr(alone, field) == getattr(told, field), field
    assert told.family_reason == f"its YAML, {beside.name}, says so" == told.prediction_reason


def test_what_a_network_predicts(files: Mapping[str, Path], tmp_path: Path) -> None:
    sd1, sd2 = files["sd1"], files["sd2"]
    assert recognised(sd2).prediction_reason.startswith("a guess: ")
    assert recognised(sd2).image_size == (768, 768)
    base = recognised(changed(sd2, tmp_path, global_step=875_000))
    assert (base.prediction, base.image_size) == ("epsilon", (512, 512))
    assert "global_step, 875,000" in base.prediction_reason
    marked = recognised(changed(sd1, tmp_path, add={"v_pred": torch.zeros(0)}))
    assert (marked.prediction, marked.prediction_reason) == (
        "v_prediction",
        "it has the marker v_pred",
    )
    marked = recognised(changed(sd1, tmp_path, add={"ztsnr": torch.zeros(0)}))
    assert marked.schedule is not None and marked.schedule.zero_terminal_snr
    overruled = recognised(tmp_path / "changed.ckpt", prediction="epsilon")
    assert (
        overruled.prediction == "epsilon" and overruled.prediction_reason == "as it was asked for"
    )
    assert overruled.schedule is not None and not overruled.schedule.zero_terminal_snr
    path = tmp_path / "a.safetensors"
    told = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "640x448"}
    safetensors.torch.save_file(open_tensors(sd2).read(), path, told)
    spoken = recognised(path)
    assert (spoken.prediction, spoken.image_size) == ("epsilon", (448, 640))
    with pytest.raises(CheckpointError, match="no prediction 'v'; Choose from: epsilon"):
        recognised(sd1, prediction="v")


def test_a_family_may_be_asked_for(files: Mapping[str, Path]) -> None:
    found = recognised(files["ldm-unconditional"], family="ldm-unconditional")
    assert found.family_reason == "as it was asked for" and not found.problems
    wrong = recognised(files["ldm-unconditional"], family="ldm-class")
    assert "it has no conditioner" in wrong.problems[0]
    with pytest.raises(CheckpointError, match="no family 'sd3'; did you mean 'sd"):
        recognised(files["sd1"], family="sd3")
    with pytest.raises(CheckpointError, match="no family 'stable'"):
        find_family("stable")


def test_what_public_files_hold_beside_their_weights_is_known(
    files: Mapping[str, Path], tmp_path: Path
) -> None:
    text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    add: dict[str, Tensor] = {
        text: torch.arange(77)[None],
        "betas": torch.rand(1000),
        "sqrt_one_minus_alphas_cumprod": torch.rand(1000),
        "alphas_cumprod_prev": torch.rand(1000),
        "posterior_mean_coef2": torch.rand(1000),
        "logvar": torch.rand(1000),
        "model_ema.decay": torch.rand(()),
        "model_ema.num_updates": torch.tensor(3),
        "first_stage_model.loss.discriminator.main.0.weight": torch.rand(3, 3),
        "embedding_manager.initial": torch.rand(3),
    }
    found = recognised(changed(files["sd1"], tmp_path, add=add))
    assert found.unexpected == ("embedding_manager.initial",)
    assert not found.problems and not found.has_ema


def test_what_is_wrong_is_named(files: Mapping[str, Path], tmp_path: Path) -> None:
    unet = "model.diffusion_model."
    path = changed(
        files["sd1"],
        tmp_path,
        add={f"{unet}extra.weight": torch.rand(3), f"{unet}out.0.bias": torch.rand(7)},
        drop=[f"{unet}middle_block.2"],
    )
    found = recognised(path)
    assert len(found.missing) == 10
    assert all(name.startswith(f"{unet}middle_block.2.") for name in found.missing)
    assert found.unexpected == (f"{unet}extra.weight",)
    assert found.wrong == (f"{unet}out.0.bias (7,) where (32,) was expected",)
    with pytest.raises(CheckpointError) as caught:
        found.require_loadable()
    assert "cannot be loaded as sd1 (it has CLIP's text encoder" in str(caught.value)
    assert "missing (10): " in str(caught.value) and "and 6 more" in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "problem"),
    [
        (["first_stage_model."], "it has no first stage"),
        (["cond_stage_model."], "it has no conditioner"),
    ],
)
def test_files_without_a_part_are_recognised(
    files: Mapping[str, Path], tmp_path: Path, drop: list[str], problem: str
) -> None:
    path = changed(files["sd1"], tmp_path, drop=drop)
    if "cond_stage_model." in drop:
        # the width of its tokens is no published one
        with pytest.raises(CheckpointError, match=r"tokens of width 64, .* say --family"):
            recognised(path)
    found = recognised(path, family="sd1")
    assert found.family.name == "sd1" and len(found.problems) == 1
    assert problem in found.problems[0] and found.unet is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditioner.embedders.0.transformer.x", "is Stable Diffusion XL, which"),
        ("lora_unet_down_blocks_0.alpha", "is a LoRA file; give it with --adapter"),
        ("first_stage_model.encoder.conv_in.weight", "is a first stage without a UNet"),
        ("encoder.conv_in.weight", "is a first stage alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers folder; give the folder"),
        ("weights", "no tensor model.diffusion_model.…; the first of its 1 is 'weights'"),
        ("model.diffusion_model.x", "has 0 input and 0 output blocks for 1 levels"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({name: torch.rand(3, 3)}, path)
    with pytest.raises(CheckpointError) as caught:
        recognised(path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_heads_that_do_not_fit_are_a_problem_and_no_fault(
    files: Mapping[str, Path], tmp_path: Path
) -> None:
    found = recognised(files["sd1"], family="sd2")
    assert found.unet is None
    assert any("attention_head_dim 64 does not divide the 32 channels" in p for p in found.problems)


def test_every_family_is_told_apart() -> None:
    for family in FAMILIES.values():
        assert family_of_parts(family.main, family.spatial) is family
    assert family_of_parts("class", "inpainting") is None
