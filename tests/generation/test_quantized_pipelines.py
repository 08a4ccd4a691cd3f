"""Pipelines in int8 draw nearly what plain ones do, say so, and are replayed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from two_classes import write_two_classes

from mezzotint.checkpoints.model import save_model
from mezzotint.device import quantizes_weights, select_device, select_precision
from mezzotint.errors import ConfigError
from mezzotint.evaluation.drawing import Drawing, DrawnPictures
from mezzotint.generation.generate import GeneratedImage
from mezzotint.generation.guides import Guide
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.models.autoencoder import AutoencoderKLConfig
from mezzotint.models.unet import UNetConfig
from mezzotint.nn.packed import is_packed
from mezzotint.nn.quantized import Quantized

UNET = UNetConfig(
    block_out_channels=(128, 128),
    layers_per_block=1,
    attention_levels=(False, True),
    cross_attention_dim=48,
    num_attention_heads=2,
    norm_num_groups=8,
)
FIRST_STAGE = AutoencoderKLConfig(
    block_out_channels=(32, 128), layers_per_block=1, norm_num_groups=8
)
EXECUTION = select_precision("float32", select_device("cpu"))

pytestmark = pytest.mark.skipif(
    not quantizes_weights(EXECUTION)[0], reason="torch has no oneDNN here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_classes(tmp_path_factory.mktemp("models") / "two", UNET, FIRST_STAGE)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Pipeline:
    return load(folder, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def rounded(folder: Path) -> Pipeline:
    return load(folder, device="cpu", precision="float32", quantization="int8")


def drawn(pipeline: Pipeline, **more: Any) -> list[GeneratedImage]:
    request: dict[str, Any] = {"class_label": "tool", "steps": 3, "seed": 1, "guidance_scale": 2.0}
    return pipeline.generate(**request | more)


def pixels(images: list[GeneratedImage]) -> np.ndarray:
    return np.stack([np.asarray(image.image) for image in images]).astype(int)


def quantized(network: nn.Module) -> set[str]:
    return {name for name, layer in network.named_modules() if isinstance(layer, Quantized)}


def held(network: nn.Module) -> int:
    """The bytes of all that a network's layers hold."""
    tensors = [
        value
        for layer in network.modules()
        for value in (*vars(layer).values(), *layer.parameters(recurse=False))
        if isinstance(value, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_large_layers_of_the_unet_are_rounded(rounded: Pipeline, plain: Pipeline) -> None:
    convolutions = {
        name
        for name, layer in rounded.model.unet.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }
    # halving uses an input at a quarter of its taps
    assert quantized(rounded.model.unet) == {
        name for name in convolutions - {"conv_in", "conv_out"} if "downsamplers" not in name
    }
    assert quantized(rounded.model.first_stage) == set()
    assert is_packed(rounded.model.first_stage)
    assert quantized(plain.model) == set()
    assert (rounded.quantization, plain.quantization) == ("int8", "none")


def test_they_take_a_quarter_of_float32_s_memory(rounded: Pipeline, plain: Pipeline) -> None:
    names = quantized(rounded.model.unet)
    small, large = (
        sum(held(p.model.unet.get_submodule(name)) for name in names) for p in (rounded, plain)
    )
    # beside a weight's byte a channel has a scale and a bias, of 4 each
    assert 0.25 < small / large < 0.26


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_images": 3, "width": 24, "height": 40},
        {"tiling": True},
        {"feature_reuse": {"interval": 2}},
        {"token_merging": 0.5},
        {"guide": Guide(kind="colour", colour="#ff8800")},
    ],
    ids=["plain", "other size", "tiling", "feature reuse", "token merging", "guide"],
)
def test_pictures_are_near_the_plain_ones(
    rounded: Pipeline, plain: Pipeline, more: dict[str, Any]
) -> None:
    one, other = pixels(drawn(rounded, **more)), pixels(drawn(plain, **more))
    assert other.std() > 5  # there is something to see
    # a layer's 1 % is added to what its residual connection passes on, and steps add them up
    assert 0 < abs(one - other).mean() < 0.1 * other.std()
    assert quantized(rounded.model.unet)  # still


def test_a_lora_acts_on_rounded_layers(rounded: Pipeline, plain: Pipeline, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 128, 3, 3, generator=generator) / 4,
        f"{name}.lora_up.weight": torch.randn(128, 2, 1, 1, generator=generator) / 4,
    }
    save_file(tensors, path := tmp_path / "ink.safetensors")
    adapters = [{"name": str(path), "weight": 0.5}]
    one, other = (pixels(drawn(p, adapters=adapters)) for p in (rounded, plain))
    change = abs(other - pixels(drawn(plain))).mean()
    assert abs(one - other).mean() < 0.2 * change
    assert quantized(rounded.model.unet)


def test_the_picture_says_so_and_is_drawn_again(
    rounded: Pipeline, plain: Pipeline, tmp_path: Path
) -> None:
    image = drawn(rounded, num_images=2)[1]
    write_image(image.image, image.request, path := tmp_path / "int8.png")
    resolved = read_request(path).resolved
    assert resolved is not None and resolved.quantization == "int8"
    assert resolved.model_hash == plain.model_hash  # the model is the same
    again = replay(path)
    assert np.array_equal(np.asarray(again.image), np.asarray(image.image))
    assert again.request == image.request
    by_plain = drawn(plain, num_images=2)[1]
    assert by_plain.request.resolved is not None
    assert by_plain.request.resolved.quantization is None
    other = replay(path, quantization="none")
    assert np.array_equal(np.asarray(other.image), np.asarray(by_plain.image))
    assert other.request == by_plain.request
    write_image(by_plain.image, by_plain.request, path)
    assert replay(path, quantization="int8").request == image.request


def test_what_is_measured_says_so(folder: Path, rounded: Pipeline) -> None:
    drawing, names = Drawing(steps=1), ["tool"]
    settings: dict[str, Any] = {"device": "cpu", "precision": "float32"}
    for model, quantization in ((rounded, "none"), (str(folder), "int8")):
        pictures = DrawnPictures(
            model, drawing, names, None, 1, **settings, quantization=quantization
        )
        assert pictures.drawn_with.quantization == "int8"
        assert quantized(pictures.pipeline.model.unet)
    assert (
        DrawnPictures(str(folder), drawing, names, None, 1, **settings).drawn_with.quantization
        == "none"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization 'int4': did you mean 'int8'?"),
        (
            {"quantization": "int8", "offload": "components"},
            "quantization 'int8' and offload 'components' exclude each other",
        ),
    ],
)
def test_what_excludes_it_is_said_before_a_model_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none", device="cpu", precision="float32", **options)
    assert message in str(caught.value)


def test_without_instructions_a_note_says_that_no_time_is_gained(
    folder: Path, plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.device.int8_instructions", lambda: ())
    monkeypatch.setattr("mezzotint.generation.pipeline.int8_instructions", lambda: ())
    monkeypatch.setattr("mezzotint.engines.select.int8_instructions", lambda: ())
    pipeline = load(folder, device="cpu", precision="float32", quantization="int8")
    assert pipeline.notes[-1].startswith("weights in int8: less memory and more time")
    one, other = pixels(drawn(pipeline)), pixels(drawn(plain))
    assert abs(one - other).mean() < 0.1 * other.std()


def test_what_is_saved_is_the_rounded_model(rounded: Pipeline, tmp_path: Path) -> None:
    save_model(rounded.model, tmp_path / "again")
    again = load(tmp_path / "again", device="cpu", precision="float32", quantization="int8")
    assert np.array_equal(pixels(drawn(again)), pixels(drawn(rounded)))
    assert quantized(rounded.model.unet)
