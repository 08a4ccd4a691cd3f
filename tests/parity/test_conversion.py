"""From layout to layout and back: equal tensors, and folders that diffusers takes as its own."""

import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.latent_diffusion_uncond import (
    pipeline_latent_diffusion_uncond as unconditional_module,
)
from reference_pipelines import KINDS, bytes_of, stable_diffusion
from torch import Tensor
from typer.testing import CliRunner

from mezzotint.checkpoints.convert import convert
from mezzotint.checkpoints.load import load_any
from mezzotint.cli.main import app
from mezzotint.errors import CheckpointError
from mezzotint.generation.pipeline import load
from mezzotint.rng import SampleNoise
from mezzotint.storage.tensors import open_tensors

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in KINDS}
    for kind, folder in found.items():
        stable_diffusion(kind, folder)
    return found


def opened(folder: Path, caplog: pytest.LogCaptureFixture, allowed: str = "safety checker") -> Any:
    """A folder as diffusers opens it; whatever else it says of its contents fails the test."""
    caplog.clear()
    diffusers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    finally:
        diffusers.utils.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")]
    said += [str(w.message) for w in caught if "diffusers" in w.filename]
    assert [message for message in said if allowed not in message] == []
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in PARTS:
        for path in sorted((folder / part).glob("*.safetensors")):
            found |= {f"{part}.{n}": t for n, t in open_tensors(path).read().items()}
    # one version of transformers writes this prefix and the next does not; both read either
    return {
        name.replace("text_encoder.text_model.", "text_encoder."): t for name, t in found.items()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_a_single_file_and_back(
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    suffix: str,
) -> None:
    source, file, back = folders[kind], tmp_path / f"model{suffix}", tmp_path / "back"
    # heads of another width than CLIP's stand in the YAML, which other software does not need; and
    # what the scheduler says of sampling stands nowhere
    for told in convert(source, file, "compvis"):
        assert "other software does not read" in told or told.startswith("sampler "), told
    again = tmp_path / f"again{'.ckpt' if suffix == '.safetensors' else '.safetensors'}"
    convert(file, again, "compvis")
    convert(again, back, "diffusers")
    assert_equal(tensors_of(back), tensors_of(source))
    one, other = open_tensors(file).read(), open_tensors(again).read()
    assert_equal(other, one)

    pipeline = opened(back, caplog)
    assert type(pipeline).__name__ == type(opened(source, caplog)).__name__
    assert pipeline.scheduler.config.prediction_type == (
        "v_prediction" if kind == "sd2-v" else "epsilon"
    )


def test_a_converted_folder_draws_the_same_in_diffusers(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(folders["sd1"], tmp_path / "model.safetensors", "compvis")
    convert(tmp_path / "model.safetensors", tmp_path / "back", "diffusers")
    pipeline = opened(tmp_path / "back", caplog)
    noise = SampleNoise([3]).normal((4, 8, 8))
    with torch.no_grad():
        found = pipeline(
            "a red apple", num_inference_steps=10, latents=noise, output_type="np"
        ).images[0]
    # nothing but the prompt is said: sampler, spacing and guidance are the folder's own
    drawn = load(tmp_path / "back", precision="float32", device="cpu").generate(
        "a red apple", seed=3, steps=10, guidance_scale=7.5
    )
    difference = abs(bytes_of(found) - _bytes(drawn[0].image))
    assert difference.max() <= 2


def _bytes(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_precision(folders: dict[str, Path], tmp_path: Path, precision: str) -> None:
    dtype = getattr(torch, precision)
    expected = {n: t.to(dtype) for n, t in tensors_of(folders["sd1"]).items()}
    convert(folders["sd1"], tmp_path / "folder", "diffusers", dtype=dtype)
    assert_equal(tensors_of(tmp_path / "folder"), expected)
    convert(folders["sd1"], tmp_path / "file.safetensors", "compvis", dtype=dtype)
    convert(tmp_path / "file.safetensors", tmp_path / "back", "diffusers")
    assert_equal(tensors_of(tmp_path / "back"), expected)


def test_averaged_weights_are_chosen(folders: dict[str, Path], tmp_path: Path) -> None:
    """A file as Lightning leaves it: the average beside the weights, and an optimizer."""
    convert(folders["sd1"], tmp_path / "plain.ckpt", "compvis")
    state = open_tensors(tmp_path / "plain.ckpt").read()
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    average |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    moments = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {
        "epoch": 1,
        "global_step": 9,
        "optimizer_states": [moments],
        "lr_schedulers": [],
        "state_dict": state | average,
    }
    torch.save(whole, tmp_path / "full.ckpt")
    (tmp_path / "full.yaml").write_bytes((tmp_path / "plain.yaml").read_bytes())
    plain = tensors_of(folders["sd1"])
    for weights, added in (("raw", 0), ("ema", 1), ("auto", 1)):
        convert(tmp_path / "full.ckpt", tmp_path / weights, "diffusers", weights=weights)
        found = tensors_of(tmp_path / weights)
        assert_equal(found, {n: t + added if n.startswith("unet") else t for n, t in plain.items()})
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        convert(tmp_path / "plain.ckpt", tmp_path / "none", "diffusers", weights="ema")


def test_an_unconditional_model_of_ours_draws_the_same_in_diffusers(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.diffusion(
        conditioning={"kind": "none"},
        unet__cross_attention_dim=None,
        unet__norm_num_groups=8,
        schedule={"prediction_type": "epsilon"},
    )
    run = tiny.train(recipe, tmp_path / "run")
    result = CliRunner().invoke(
        app, ["convert", str(run), str(tmp_path / "ldm"), "--to", "diffusers"]
    )
    assert result.exit_code == 0, result.output
    # the pipeline's signature names a VQ model, and what it does goes for a KL one as well
    pipeline = opened(tmp_path / "ldm", caplog, allowed="Expected types for vqvae")
    assert isinstance(pipeline, diffusers.LDMPipeline)
    side = pipeline.unet.config.sample_size
    noise = SampleNoise([3]).normal((pipeline.unet.config.in_channels, side, side))
    monkeypatch.setattr(unconditional_module, "randn_tensor", lambda *_, **__: noise)
    reference = bytes_of(pipeline(num_inference_steps=10, output_type="np").images[0])
    for model in (run, tmp_path / "ldm"):
        drawn = load(model, precision="float32", device="cpu").generate(seed=3, steps=10)
        assert abs(_bytes(drawn[0].image) - reference).max() <= 2


def test_components_of_a_text_model_of_ours_load_alone(text_run: Path) -> None:
    model = load_any(text_run).model
    unet = diffusers.UNet2DConditionModel.from_pretrained(text_run / "model" / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(text_run / "model" / "vae")
    for theirs, ours in ((unet, model.unet), (vae, model.first_stage)):
        state = ours.state_dict()
        assert all(torch.equal(state[name], t) for name, t in theirs.state_dict().items())


def test_nothing_is_overwritten_unless_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="is there already"):
        convert(folders["sd1"], file, "compvis")
    assert file.read_bytes() == b"precious"
    convert(folders["sd1"], file, "compvis", overwrite=True)
    with pytest.raises(CheckpointError, match=r"named \*\.safetensors or \*\.ckpt"):
        convert(file, tmp_path / "model", "compvis")
    with pytest.raises(CheckpointError, match="a diffusers model is a folder"):
        convert(file, tmp_path / "other.safetensors", "diffusers")
