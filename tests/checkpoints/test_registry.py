from pathlib import Path

import pytest

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.registry import INDEX, resolve_model
from mezzotint.errors import CheckpointError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_folders_runs_and_files_are_found(tmp_path: Path) -> None:
    touch(tmp_path / "folder" / INDEX, tmp_path / "run" / "model" / INDEX)
    touch(tmp_path / "v1-5.safetensors", tmp_path / "v1-5.ckpt")
    assert resolve_model(tmp_path / "folder") == tmp_path / "folder"
    assert resolve_model(str(tmp_path / "run")) == tmp_path / "run" / "model"
    assert resolve_model(tmp_path / "v1-5.safetensors") == tmp_path / "v1-5.safetensors"
    assert resolve_model(tmp_path / "v1-5.ckpt") == tmp_path / "v1-5.ckpt"


def test_what_is_there_instead_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "run" / "checkpoints" / "step-1" / "state.json")
    touch(tmp_path / "one" / "v1-5.safetensors", tmp_path / "one" / "readme.md")
    touch(tmp_path / "two" / "a.ckpt", tmp_path / "two" / "b.safetensors")
    touch(tmp_path / "model" / INDEX, tmp_path / "model" / "unet" / "config.json")
    touch(tmp_path / "alone" / "config.json", tmp_path / "empty" / "readme.md")
    for name, message in {
        "run": "this run is not finished; go on with mezzotint train",
        "one": f"no {INDEX} here, but one file; name the file itself: .*one/v1-5.safetensors",
        "two": "several files; name one of them: a.ckpt, b.safetensors",
        "model/unet": "this is one component of a model; the model is .*/model$",
        "alone": "this is one component of a model$",
        "empty": f"no model here: expected {INDEX}",
        f"model/{INDEX}": "this is a model's index; name its folder, .*/model$",
        "one/readme.md": r"no model; expected a folder .* or a file named \*.safetensors or",
    }.items():
        with pytest.raises(CheckpointError, match=message) as failed:
            resolve_model(tmp_path / name)
        assert str(failed.value).startswith(f"{tmp_path / name}: ")


def test_the_nearest_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "apples" / INDEX, tmp_path / "pears.safetensors", tmp_path / "readme.md")
    with pytest.raises(CheckpointError, match="no such model folder; did you mean 'apples'"):
        resolve_model(tmp_path / "aples")
    with pytest.raises(CheckpointError, match="no such file; did you mean 'pears.safetensors'"):
        resolve_model(tmp_path / "pear.safetensors")
    with pytest.raises(CheckpointError, match="no such model folder$"):
        resolve_model(tmp_path / "nowhere" / "at all")


def test_folders_take_no_options_of_files(tmp_path: Path) -> None:
    touch(tmp_path / INDEX)
    message = "a folder says itself what it is; family, weights is for single files"
    with pytest.raises(CheckpointError, match=message):
        load_any(tmp_path, family="sd1", weights="raw")
    with pytest.raises(CheckpointError, match=f"{INDEX}: unknown pipeline 'None'"):
        load_any(tmp_path)
