"""Folders that cannot be drawn with are refused, with the file and the reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import CONDITIONERS, clip, edit, model, unet

from mezzotint.checkpoints.folder import save_component
from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.pipelines import load_pipeline
from mezzotint.conditioning.base import Unconditional
from mezzotint.errors import CheckpointError

Damage = Callable[[Path], None]


def index(**keys: Any) -> Damage:
    return lambda folder: edit(folder / "model_index.json", **keys)


def config(part: str, **keys: Any) -> Damage:
    return lambda folder: edit(folder / part / "config.json", **keys)


REFUSED: dict[str, tuple[str, Damage, str]] = {
    "pipeline": (
        "clip",
        index(_class_name="StableDiffusionXLPipeline"),
        "model_index.json: unknown pipeline 'StableDiffusionXLPipeline'; did you mean 'Stable",
    ),
    "component": ("clip", index(unet=[None, None]), r"unet is \[None, None\]; expected \[lib"),
    "encoder": (
        "clip",
        index(text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is 'T5EncoderModel'; expected CLIPTextModel or CLIPTextModelWithProj",
    ),
    "network": (
        "clip",
        index(unet=["diffusers", "UNet3DConditionModel"]),
        "model_index.json: unet is 'UNet3DConditionModel'; expected UNet2DConditionModel or",
    ),
    "class": (
        "clip",
        config("unet", _class_name="UNet3DConditionModel"),
        "unet/config.json: unknown _class_name 'UNet3DConditionModel'; did you mean 'UNet2DCond",
    ),
    "no-encoder": ("clip", index(text_encoder=None), "text_encoder is None; expected"),
    "scheduler": (
        "clip",
        index(scheduler=["diffusers", "DDIMInverseScheduler"]),
        "scheduler_config.json: unknown scheduler 'DDIMInverseScheduler'; did you mean 'DDIMSch",
    ),
    "activation": ("clip", config("text_encoder", hidden_act="relu"), "hidden_act: .*'relu'"),
    "shape": (
        "clip",
        config("text_encoder", intermediate_size=48),
        "does not fit its ClipConditioner: wrong shape",
    ),
    "layers": (
        "clip",
        config("text_encoder", num_hidden_layers=3),
        r"does not fit its ClipConditioner: missing \(16\)",
    ),
    "vocabulary": (
        "clip",
        config("text_encoder", vocab_size=50),
        r"bos_token_id: expected less than vocab_size, 50, got 56",
    ),
    "bert": ("bert", config("bert", activation_function="relu"), "activation_function is 'relu'"),
    "words": ("bert", config("bert", vocab_size=7), "tokenizer: vocab_size is 7, but the tokeniz"),
    "part": ("nothing", lambda folder: shutil.rmtree(folder / "vqvae"), "vqvae: no such folder"),
    "weights": (
        "nothing",
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "no such file; there is no file of weights",
    ),
    "truncated": (
        "clip",
        lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 64),
        "model.safetensors: damaged",
    ),
    "tokenizer": (
        "clip",
        lambda folder: (folder / "tokenizer" / "merges.txt").unlink(),
        "merges.txt: no such file; a tokenizer needs it",
    ),
    "index": (
        "nothing",
        lambda folder: (folder / "model_index.json").write_text("[]"),
        "model_index.json: expected a JSON object, got list",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(copied: Callable[[str], Path], name: str) -> None:
    kind, damage, message = REFUSED[name]
    folder = copied(kind)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as failed:
        load_pipeline(folder)
    assert str(failed.value).startswith(str(folder))
    if name != "index":
        assert str(failed.value) in inspect_model(folder).problems
        return
    with pytest.raises(CheckpointError, match=message):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("kind", "channels", "message"),
    [
        ("clip", 8, "in_channels is 8; expected 3 or 7, as latents have 3"),
        ("nothing", 6, "in_channels is 6; expected 3, as latents have 3"),
        ("low-res", 4, "in_channels is 4; expected 6, as latents have 3"),
    ],
)
def test_channels_that_nothing_is_known_for(
    copied: Callable[[str], Path], kind: str, channels: int, message: str
) -> None:
    folder = copied(kind)
    other = model(CONDITIONERS[kind](), in_channels=channels)
    other.conditioner = Unconditional()
    save_component(other.unet, folder / "unet", {"sample_size": 8})
    with pytest.raises(CheckpointError, match=message) as failed:
        load_pipeline(folder)
    assert inspect_model(folder).problems == (str(failed.value),)


def test_a_text_encoder_of_another_width_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    save_component(unet(clip(), cross_attention_dim=24), folder / "unet", {"sample_size": 8})
    message = "cross_attention_dim is 24, but the conditioner's tokens are 16 wide"
    with pytest.raises(CheckpointError, match=message) as failed:
        load_pipeline(folder)
    assert inspect_model(folder).problems == (str(failed.value),)
