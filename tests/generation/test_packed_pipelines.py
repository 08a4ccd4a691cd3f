"""Pipelines that `load` packs draw and save what plain ones do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from two_classes import write_two_classes

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.model import save_model
from mezzotint.device import bf16_instructions, packs_weights, select_device, select_precision
from mezzotint.engines.select import QuantizationKind
from mezzotint.generation.guides import Guide
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.autoencoder import AutoencoderKLConfig
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.nn.packed import PackedConv2d, PackedLinear, PackedUpsample, WinogradConv2d

UNET = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    attention_levels=(False, True),
    cross_attention_dim=48,
    num_attention_heads=2,
    norm_num_groups=8,
)
FIRST_STAGE = AutoencoderKLConfig(
    block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8
)
KINDS = (PackedConv2d, PackedLinear, PackedUpsample)
EXECUTION = select_precision("float32", select_device("cpu"))

pytestmark = pytest.mark.skipif(not packs_weights(EXECUTION)[0], reason="torch has no oneDNN here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_classes(tmp_path_factory.mktemp("models") / "two", UNET, FIRST_STAGE)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Pipeline:
    return load(folder, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Pipeline:
    return Pipeline(load_any(folder).model, EXECUTION, str(folder))


def packed_layers(pipeline: Pipeline) -> set[type]:
    return {type(layer) for layer in pipeline.model.modules()} & set(KINDS)


def drawn(pipeline: Pipeline, **more: Any) -> np.ndarray:
    request: dict[str, Any] = {"class_label": "tool", "steps": 3, "seed": 1, "guidance_scale": 2.0}
    images = pipeline.generate(**request | more)
    return np.stack([np.asarray(image.image) for image in images]).astype(int)


def test_load_packs_for_the_processor_and_pipelines_of_others_are_left_alone(
    packed: Pipeline, plain: Pipeline
) -> None:
    assert packed_layers(packed) == set(KINDS)
    assert packed_layers(plain) == set()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_images": 3, "width": 24, "height": 40},
        {"tiling": True},
        {"tiled_decoding": True},
        {"token_merging": 0.5},
        {"guide": Guide(kind="colour", colour="#ff8800")},
    ],
    ids=["plain", "other size", "tiling", "tiled decoding", "token merging", "guide"],
)
def test_the_same_picture(packed: Pipeline, plain: Pipeline, more: dict[str, Any]) -> None:
    one, other = drawn(packed, **more), drawn(plain, **more)
    assert one.std() > 5  # there is something to see
    assert abs(one - other).max() <= 1
    assert packed_layers(packed) == set(KINDS)  # nothing has unpacked them
    if more.get("tiling"):
        assert abs(one - drawn(plain)).max() > 5


@pytest.mark.skipif(not bf16_instructions(), reason="this processor does not compute in bfloat16")
def test_bfloat16_of_wider_weights_is_autocast_s(folder: Path) -> None:
    packed = load(folder, device="cpu", precision="bfloat16")
    assert packed_layers(packed) == set(KINDS)
    plain = Pipeline(load_any(folder).model, packed.execution, str(folder))
    # some units of rounding in 8 bits, through three steps
    assert abs(drawn(packed) - drawn(plain)).mean() < 1
    assert packed.model_hash == plain.model_hash


def test_a_lora_acts_on_packed_layers(packed: Pipeline, plain: Pipeline, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
        "down_blocks_0_resnets_0_conv1": (32, 32, 3, 3),
        "up_blocks_0_upsamplers_0_conv": (32, 32, 3, 3),
    }
    tensors = {
        f"lora_unet_{name}.lora_{side}.weight": torch.randn(shape, generator=generator) / 4
        for name, (out, into, *kernel) in shapes.items()
        for side, shape in (("down", (2, into, *kernel)), ("up", (out, 2, *[1 for _ in kernel])))
    }
    save_file(tensors, path := tmp_path / "ink.safetensors")
    adapters = [{"name": str(path), "weight": 0.5}]
    one, other = drawn(packed, adapters=adapters), drawn(plain, adapters=adapters)
    assert abs(one - other).max() <= 1
    assert abs(one - drawn(packed)).max() > 5
    assert packed_layers(packed) == set(KINDS)


def test_what_is_saved_is_what_was_read(packed: Pipeline, folder: Path, tmp_path: Path) -> None:
    save_model(packed.model, tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        read, again = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert list(read) == list(again)
        assert all(torch.equal(read[name], again[name]) for name in read)
    assert packed_layers(packed) == set(KINDS)
    assert packed.model.weights_hash() == load_any(folder).model.weights_hash()


def test_training_a_loaded_model_trains_all_of_it(folder: Path) -> None:
    model = load(folder, device="cpu", precision="float32").model
    model.train()
    assert [n for n, _ in model.unet.named_parameters()] == [
        n for n, _ in UNet(UNET).named_parameters()
    ]
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


@torch.no_grad()
def test_in_float32_fine_levels_of_a_unet_run_by_winograd_s_algorithm(tmp_path: Path) -> None:
    shape = UNetConfig(
        block_out_channels=(256, 256),
        layers_per_block=1,
        attention_levels=(False, False),
        cross_attention_dim=48,
        num_attention_heads=2,
    )
    folder = write_two_classes(tmp_path / "wide", shape, FIRST_STAGE, side=64)
    unet = load(folder, device="cpu", precision="float32").model.unet
    fine, coarse = (
        {type(layer) for blocks in level for layer in blocks.modules()} & {*KINDS, WinogradConv2d}
        for level in ((unet.down_blocks[0], unet.up_blocks[1]), (unet.down_blocks[1],))
    )
    assert WinogradConv2d in fine
    assert PackedConv2d in coarse and WinogradConv2d not in coarse
    x, t = torch.randn(1, 4, 32, 32), torch.tensor([500])
    context = torch.randn(1, 1, 48)
    right = load_any(folder).model.unet.eval()(x, t, context=context)
    assert (unet(x, t, context=context) - right).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.skipif(not bf16_instructions(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("quantization", ["none", "int8"])
@torch.no_grad()
def test_outside_of_drawing_a_model_answers_in_the_precision_of_its_weights(
    folder: Path, quantization: QuantizationKind
) -> None:
    """As a plain one does; packed layers beside plain ones once mixed two precisions."""
    pipeline = load(folder, device="cpu", precision="bfloat16", quantization=quantization)
    right = load_any(folder).model.eval()
    model, images = pipeline.model, torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(model.encode(images), right.encode(images), atol=1e-5)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 1, 48)
    ours, theirs = (m.unet(x, t, context=context) for m in (model, right))
    assert ours.dtype is torch.float32
    assert (ours - theirs).abs().max() < (1e-5 if quantization == "none" else 0.05)
    assert torch.allclose(model.decode(x), right.decode(x), atol=1e-4)
    with pipeline.running():
        assert model.unet(x, t, context=context).dtype is torch.bfloat16
