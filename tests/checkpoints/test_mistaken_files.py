"""Files that are not what their names say, or say of themselves two things."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import build

from mezzotint.checkpoints.adapter_files import load_adapter
from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import form_of, open_tensors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd1.safetensors"
    save_single_file(build("sd1"), path)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.safetensors", "a.ckpt", "a.pt", "diffusion_pytorch_model.bin.index.json"],
)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(POINTER)
    readers: list[Callable[[Path], Any]] = [open_tensors]
    readers += [load_any, inspect_model, load_adapter] if path.suffix != ".json" else [read_json]
    for read in readers:
        with pytest.raises(
            CheckpointError, match="is a pointer of git-lfs .* git lfs pull"
        ) as told:
            read(path)
        assert str(told.value).startswith(f"{path}: ")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_safetensors_by_the_name_of_a_pickle(sd1: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"renamed{suffix}"
    path.write_bytes(sd1.read_bytes())
    assert form_of(path) == "safetensors"
    assert load_any(path).model.weights_hash() == load_any(sd1).model.weights_hash()
    assert inspect_model(path).layout == (f"single file (safetensors, though it is named {suffix})")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_by_the_name_of_safetensors(sd1: Path, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "renamed.safetensors"
    state = {"state_dict": open_tensors(sd1).read()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert form_of(path) == "pickle"
    assert load_any(path).model.weights_hash() == load_any(sd1).model.weights_hash()
    assert inspect_model(path).layout == "single file (pickle, though it is named .safetensors)"


def test_every_suffix_that_is_inspected_is_loaded(sd1: Path, tmp_path: Path) -> None:
    state = open_tensors(sd1).read()
    for suffix in (".ckpt", ".pt", ".pth", ".bin"):
        path = tmp_path / f"a{suffix}"
        torch.save(state, path)
        assert inspect_model(path).problems == ()
        assert load_any(path).model.weights_hash() == load_any(sd1).model.weights_hash()
    path = tmp_path / "a.exe"
    path.write_bytes(sd1.read_bytes())
    for read in (load_any, inspect_model):
        with pytest.raises(CheckpointError, match=r"a\.exe: no model; expected a folder"):
            read(path)


LORAS = {
    "kohya": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    "peft": "base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight",
    "diffusers": "unet.down_blocks.0.attentions.0.proj_in.lora.down.weight",
    "processors": "down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight",
    "loha": "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
    "text": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.default.weight",
}


@pytest.mark.parametrize("form", LORAS)
def test_a_lora_is_no_model(tmp_path: Path, form: str) -> None:
    path = tmp_path / "ink.safetensors"
    save_file({LORAS[form]: torch.ones(2, 2), f"{LORAS[form]}.2": torch.ones(2)}, path)
    for read in (load_any, inspect_model):
        with pytest.raises(CheckpointError, match="is a LoRA file; give it with --adapter") as told:
            read(path)
        assert str(told.value).startswith(f"{path}: ")


@pytest.mark.parametrize("form", ["web-ui", "web-ui-safetensors", "diffusers", "diffusers-bin"])
def test_an_embedding_is_no_model(tmp_path: Path, form: str) -> None:
    vectors = torch.ones(2, 64)
    path = tmp_path / (
        "ink.pt" if form == "web-ui" else f"ink{'.bin' if 'bin' in form else '.safetensors'}"
    )
    if form == "web-ui":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}}, path)
    elif path.suffix == ".bin":
        torch.save({"<ink>": vectors}, path)
    else:
        save_file({"emb_params" if form.startswith("web") else "<ink>": vectors}, path)
    load_adapter(path)
    for read in (load_any, inspect_model):
        with pytest.raises(
            CheckpointError, match="is an embedding of textual inversion .* --adapt"
        ):
            read(path)


def marked(sd1: Path, path: Path, *markers: str, parameterization: str | None = "eps") -> Path:
    """A copy with markers, and with a YAML that says what is predicted."""
    state = open_tensors(sd1).read() | {name: torch.zeros(0) for name in markers}
    save_file(state, path)
    if parameterization is not None:
        data = yaml.safe_load(sd1.with_suffix(".yaml").read_text())
        data["model"]["params"]["parameterization"] = parameterization
        if not parameterization:
            del data["model"]["params"]["parameterization"]
        path.with_suffix(".yaml").write_text(yaml.safe_dump(data))
    return path


def test_yaml_and_marker_disagree(sd1: Path, tmp_path: Path) -> None:
    path = marked(sd1, tmp_path / "a.safetensors", "v_pred")
    (note,) = inspect_model(path).notes
    assert note.startswith("epsilon is followed, as its YAML, a.yaml, says so, though it has the")
    assert "marker v_pred, which means v_prediction" in note and "--prediction" in note
    loaded = load_any(path)
    assert loaded.model.schedule_config.prediction_type == "epsilon" and note in loaded.notes
    # who says what it is need not be told
    asked = load_any(path, prediction="v_prediction")
    assert asked.model.schedule_config.prediction_type == "v_prediction"
    assert not any("is followed" in told for told in asked.notes)


def test_yaml_and_markers_agree(sd1: Path, tmp_path: Path) -> None:
    path = marked(sd1, tmp_path / "a.safetensors", "v_pred", "ztsnr", parameterization="v")
    assert inspect_model(path).notes == () and load_any(path).notes == ()
    alone = marked(sd1, tmp_path / "b.safetensors", "v_pred", parameterization=None)
    assert inspect_model(alone).notes == ()
    assert inspect_model(alone).prediction == "v_prediction"


def test_a_yaml_that_says_nothing_of_it_leaves_it_to_the_markers(sd1: Path, tmp_path: Path) -> None:
    path = marked(sd1, tmp_path / "a.safetensors", "v_pred", parameterization="")
    found = inspect_model(path)
    assert (found.prediction, found.notes) == ("v_prediction", ())
    assert load_any(path).model.schedule_config.prediction_type == "v_prediction"
    plain = inspect_model(marked(sd1, tmp_path / "b.safetensors", parameterization=""))
    assert (plain.prediction, plain.notes) == ("epsilon", ())
    assert "names no parameterization" in plain.prediction_reason
