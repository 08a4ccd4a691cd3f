"""What a conversion leaves out is told, and what it cannot write is refused before it writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from tiny_pipelines import CONDITIONERS, clip, edit, model

from mezzotint.checkpoints.convert import Layout, convert
from mezzotint.checkpoints.loaded import SamplingDefaults, listed
from mezzotint.checkpoints.model import save_model
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.errors import CheckpointError
from mezzotint.storage.safetensors_file import narrowed, write_safetensors
from mezzotint.storage.tensors import open_tensors

LARGE = 70_000.0


def with_large_weight(path: Path) -> str:
    """Write a model one weight of which float16 cannot hold; returns our name of it."""
    large = build("sd1")
    with torch.no_grad():
        large.conditioner.state_dict()["text_model.final_layer_norm.weight"][3] = -LARGE
    save_single_file(large, path)
    return "conditioner.text_model.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("to", "target"),
    [("compvis", "half.safetensors"), ("compvis", "half.ckpt"), ("diffusers", "half")],
)
def test_a_weight_beyond_float16(tmp_path: Path, to: Layout, target: str) -> None:
    name = with_large_weight(tmp_path / "sd1.safetensors")
    before = sorted(tmp_path.iterdir())
    message = f"{name} holds -70,000, and float16 ends at 65,504; bfloat16 holds it"
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "sd1.safetensors", tmp_path / target, to, dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before
    convert(tmp_path / "sd1.safetensors", tmp_path / target, to, dtype=torch.bfloat16)


def test_a_weight_beyond_float16_in_our_own_folder(tmp_path: Path) -> None:
    ours = model(CONDITIONERS["classes"]())
    with torch.no_grad():
        next(ours.unet.parameters()).view(-1)[0] = LARGE
    with pytest.raises(CheckpointError, match="unet.* holds 70,000, and float16 ends at 65,504"):
        save_pipeline(ours, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_what_is_beyond_a_type() -> None:
    def half(*values: float) -> list[float]:
        return narrowed("w", torch.tensor(values), torch.float16).tolist()

    # 65,519.996 is the last float32 that is rounded to 65,504 and not to infinity
    assert half(65519.996, -65504.0, 0.0) == [65504.0, -65504.0, 0.0]
    assert half(float("inf"), float("-inf")) == [float("inf"), float("-inf")]
    assert half() == [] and str(half(float("nan"))) == "[nan]"
    for values in ((65520.0,), (float("nan"), 1.0, -1e30, 7e4), (float("inf"), 1e5)):
        with pytest.raises(CheckpointError, match="^w holds .* float16 ends at 65,504"):
            half(*values)
    with pytest.raises(CheckpointError, match="bfloat16 ends at .*; keep it as it is"):
        narrowed("w", torch.tensor([3.4e38]), torch.bfloat16)
    whole = torch.tensor([1 << 40])
    assert narrowed("w", whole, torch.int64) is whole


def test_a_file_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    entries = [("w", torch.float16, (1,), lambda: torch.tensor([LARGE]))]
    with pytest.raises(CheckpointError, match="w holds 70,000"):
        write_safetensors(tmp_path / "a.safetensors", entries, {})


EXTRAS = {
    "alphas_cumprod": torch.rand(10),
    "betas": torch.rand(10),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "cond_stage_model.model.logit_scale": torch.tensor(4.6),
    "stray.weight": torch.ones(2),
}


def test_what_a_single_file_has_besides_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "sd1.safetensors"
    save_single_file(build("sd1"), path)
    state = load_file(path) | EXTRAS | {"cond_stage_model.model.text_projection": torch.eye(4)}
    save_file(state, path, {"modelspec.title": "Ink"})
    told = convert(path, tmp_path / "folder", "diffusers")
    text = "\n".join(told)
    for name in (*EXTRAS, "cond_stage_model.model.text_projection", "modelspec.title"):
        assert text.count(name) == 1, name
    (left,) = [sentence for sentence in told if sentence.startswith("left out: ")]
    assert "stray.weight" not in left  # that is said to be unknown


def test_which_of_two_sets_of_weights_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_single_file(build("ldm-class"), path)
    state = open_tensors(path).read()
    own = [name for name in state if name.startswith("model.diffusion_model.")]
    averages = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": state[n] for n in own}
    torch.save({"state_dict": state | averages, "epoch": 3, "global_step": 0}, path)
    told = convert(path, tmp_path / "averaged", "diffusers")
    assert f"left out: model.diffusion_model.… ({len(own)}), epoch" in told
    told = convert(path, tmp_path / "raw", "diffusers", weights="raw")
    assert f"left out: model_ema.… ({len(own)}), epoch" in told


def test_what_a_folder_has_besides_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save_pipeline(model(clip()), folder)
    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"text_projection.weight": torch.eye(16)}, path)
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"])
    told = convert(folder, tmp_path / "again", "diffusers")
    assert "left out: text_encoder/text_projection.weight" in told
    assert sum("safety_checker" in sentence for sentence in told) == 1


def test_how_a_model_is_sampled_is_nothing_that_a_single_file_says(tmp_path: Path) -> None:
    defaults = SamplingDefaults(sampler="euler", spacing="karras", guidance_scale=4.0)
    save_model(build("ldm-class"), tmp_path / "folder", defaults=defaults)
    told = convert(tmp_path / "folder", tmp_path / "a.safetensors", "compvis")
    assert told == [
        "sampler euler, spacing karras, guidance_scale 4.0: a single file says none, and is read"
        " with ddim, leading, 3.0"
    ]


def test_names_are_counted_where_they_are_many() -> None:
    assert listed([]) == ""
    assert listed(["b", "a.x", "a.y"]) == "b, a.x, a.y"
    assert listed([f"a.b.{n}" for n in range(17)] + ["c"]) == "a.b.… (17), c"
