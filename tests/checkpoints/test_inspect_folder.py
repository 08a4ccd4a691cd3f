"""What `inspect` says of folders is what loading them says, and all of it at once."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from tiny_pipelines import CONDITIONERS, edit

from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.errors import CheckpointError

Folders = Callable[[str], Path]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_a_whole_folder_has_no_problem(
    saved: Folders, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = saved(kind)
    monkeypatch.setitem(sys.modules, "transformers", None)  # it takes seconds to import
    found = inspect_model(folder)
    assert (found.problems, found.missing, found.unexpected, found.notes) == ((), (), (), ())
    assert found.prediction == "epsilon" and found.image_size == (16, 16)
    files = folder.rglob("*.safetensors")
    parameters = sum(t.numel() for path in files for t in load_file(path).values())
    assert sum(part.parameters for part in found.parts) == parameters


def change(path: Path, without: str, stray: str, reshaped: str) -> None:
    """Take one tensor away, add one, and lengthen one."""
    state = load_file(path)
    del state[without]
    longer = torch.zeros(len(state[reshaped]) + 1)
    save_file(state | {stray: torch.ones(2), reshaped: longer}, path)


@pytest.mark.parametrize("kind", ["clip", "class-map"])
def test_tensors_are_held_against_the_network(copied: Folders, kind: str) -> None:
    folder = copied(kind)
    change(folder / UNET, "conv_in.weight", "stray.weight", "conv_out.bias")
    found = inspect_model(folder)
    assert found.missing == ("unet/conv_in.weight",)
    assert found.unexpected == ("unet/stray.weight",)
    (problem,) = found.problems
    assert "wrong shape (1): conv_out.bias (4,) where (3,) was expected" in problem
    with pytest.raises(CheckpointError) as failed:
        load_any(folder)
    assert str(failed.value) == problem


def test_text_encoders_are_held_against_theirs(copied: Folders) -> None:
    folder = copied("clip")
    last = "text_model.final_layer_norm.bias"
    change(
        folder / "text_encoder" / "model.safetensors",
        last,
        "text_model.extra",
        last[:-4] + "weight",
    )
    found = inspect_model(folder)
    assert found.missing == (f"text_encoder/{last}",)
    assert found.unexpected == ("text_encoder/text_model.extra",)
    # what every version of transformers leaves out is neither
    path = copied("bert") / "bert" / "model.safetensors"
    change(path, "model.layer_norm.bias", "extra", "model.layer_norm.weight")
    found = inspect_model(path.parent.parent)
    assert found.missing == ("bert/model.layer_norm.bias",) and found.unexpected == ("bert/extra",)


def test_everything_is_told_at_once(copied: Folders) -> None:
    folder = copied("clip")
    shutil.rmtree(folder / "vae")
    (folder / "tokenizer" / "merges.txt").unlink()
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="Karras")
    edit(folder / "model_index.json", scheduler=["diffusers", "KarrasScheduler"])
    change(folder / UNET, "conv_in.weight", "stray", "conv_out.bias")
    found = inspect_model(folder)
    assert found.prediction is None and len(found.problems) == 4
    for words in ("vae: no such folder, though", "unknown scheduler", "merges.txt: no such", UNET):
        assert any(words in problem for problem in found.problems), words


def test_what_is_not_used_may_be_absent(copied: Folders) -> None:
    folder = copied("clip")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", safety_checker=checker)
    found = inspect_model(folder)
    assert found.problems == ()
    assert found.notes == (
        "safety_checker: named in model_index.json, but not used; safety_checker is not even there",
    )
    load_any(folder)


def test_a_pipeline_that_is_not_known(copied: Folders) -> None:
    folder = copied("clip")
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    edit(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"])
    change(folder / UNET, "conv_in.weight", "stray", "conv_out.bias")
    unknown, network, absent = sorted(inspect_model(folder).problems, key=lambda p: "image" in p)
    assert "unknown pipeline 'StableDiffusionXLPipeline'" in unknown
    assert "does not fit its UNet" in network and "image_encoder: no such folder" in absent


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: edit(folder / "model_index.json", format_version=99),
            "format_version is 99",
        ),
        (lambda folder: edit(folder / "model_index.json", image_size=None), "image_size is None"),
        (
            lambda folder: edit(folder / "model_index.json", sampling={"speed": 1}),
            "sampling: .*'speed'",
        ),
        (
            lambda folder: shutil.rmtree(folder / "conditioner" / "spatial"),
            "spatial/config.json: no",
        ),
        (
            lambda folder: edit(folder / "conditioner" / "main" / "config.json", width=24),
            "does not fit its ClassConditioner: wrong shape",
        ),
        (
            lambda folder: edit(folder / "conditioner" / "main" / "config.json", class_names=[]),
            "main/config.json: class_names is empty",
        ),
        (
            lambda folder: edit(folder / "vae" / "config.json", scaling_factor="x"),
            "vae/config.json: .*scaling_factor",
        ),
        (
            lambda folder: shutil.copytree(folder / "vae", folder / "unet", dirs_exist_ok=True),
            "unet: holds a AutoencoderKL, not a UNet",
        ),
    ],
)
def test_our_own_folders(copied: Folders, damage: Callable[[Path], object], words: str) -> None:
    folder = copied("class-map")
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as failed:
        load_any(folder)
    assert str(failed.value) in inspect_model(folder).problems


def test_a_run_and_what_is_no_model(copied: Folders, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    copied("nothing").rename(tmp_path / "run" / "model")
    assert inspect_model(tmp_path / "run").path == tmp_path / "run" / "model"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(
        CheckpointError, match="lora: this is an adapter and no model; give it with"
    ):
        inspect_model(tmp_path / "lora")


def test_statistics_of_other_latents_are_told_as_when_loading(copied: Folders) -> None:
    folder = copied("clip")
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 5, latents_std=[1.0] * 5)
    (problem,) = inspect_model(folder).problems
    assert "the statistics of latents have 5 channels" in problem
    with pytest.raises(CheckpointError, match="the statistics of latents have 5 channels"):
        load_any(folder)
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 5, latents_std=[1e-300] * 5)
    (problem,) = inspect_model(folder).problems
    assert "latents_std" in problem and "each 1e-09 to 1e+09" in problem


def test_files_of_weights_that_are_not_read_are_left_out(copied: Folders) -> None:
    folder = copied("clip")
    more = ["unet/diffusion_pytorch_model.non_ema.safetensors", "unet_ema/model.bin"]
    for name in more:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / UNET, folder / name)
    left_out = load_any(folder).left_out
    assert set(more) <= set(left_out) and UNET not in left_out


def test_tokens_of_another_width_than_the_network_s_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("ldm-class")
    width = model.conditioner.config.width
    config = ClassConditionerConfig(width=width + 8, class_names=("a", "b"))
    model.conditioner = ClassConditioner(config)
    save_model(model, tmp_path / "a")
    (problem,) = inspect_model(tmp_path / "a").problems
    assert f"the conditioner's tokens are {width + 8} wide" in problem
    with pytest.raises(CheckpointError, match=f"tokens are {width + 8} wide"):
        load_any(tmp_path / "a")
