"""Weights that stand on the CPU until they are used; here the device is the CPU too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mezzotint.checkpoints.load import load_any
from mezzotint.device import select_device, select_precision
from mezzotint.engines.offload import Offload, select_offload
from mezzotint.errors import ConfigError, RequestError
from mezzotint.generation.pipeline import Pipeline, load

KINDS = ("components", "sequential")
COMMON: dict[str, Any] = {"prompt": "a red apple", "steps": 2, "seed": 3, "num_images": 2}


def unpacked(run: Path, precision: str) -> Pipeline:
    """A pipeline whose weights all stand on the device, as they are: packing moves roundings."""
    execution = select_precision(precision, select_device("cpu"))
    return Pipeline(load_any(run, dtype=execution.precision).model, execution, str(run))


@pytest.fixture(scope="module")
def plain(text_run: Path) -> Pipeline:
    return unpacked(text_run, "float32")


@pytest.fixture(scope="module", params=KINDS)
def offloaded(text_run: Path, request: pytest.FixtureRequest) -> Pipeline:
    return load(text_run, "cpu", "float32", offload=request.param)


def drawn(pipeline: Pipeline, **fields: Any) -> list[bytes]:
    return [image.image.tobytes() for image in pipeline.generate(**COMMON | fields)]


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 48, "height": 24, "tiled_decoding": True},
        {"negative_prompt": "blue", "feature_reuse": {"interval": 2}, "token_merging": 0.5},
        {"high_res": {"scale": 1.5, "upscaler": "lanczos"}, "num_images": 1},
        {"image": Image.new("RGB", (32, 32), "red"), "mask": Image.new("L", (32, 32), 255)},
    ],
    ids=["plain", "tiled", "approximated", "twice", "inpainting"],
)
def test_pictures_are_the_same(
    plain: Pipeline, offloaded: Pipeline, fields: dict[str, Any]
) -> None:
    before = places(offloaded.model)
    assert drawn(offloaded, **fields) == drawn(plain, **fields)
    assert places(offloaded.model) == before
    assert offloaded.offload is not None and offloaded.offload.resident == 0


def test_autocast_keeps_no_weights(text_run: Path) -> None:
    pipeline = load(text_run, "cpu", "bfloat16", offload="sequential")
    keeps: list[bool] = []
    layer = pipeline.model.unet.conv_in
    layer.register_forward_pre_hook(lambda *_: keeps.append(torch.is_autocast_cache_enabled()))
    assert drawn(pipeline) == drawn(unpacked(text_run, "bfloat16"))
    assert keeps == [False] * COMMON["steps"] and torch.is_autocast_cache_enabled()


def test_no_more_is_on_the_device_than_its_kind_says(offloaded: Pipeline) -> None:
    offload, model = offloaded.offload, offloaded.model
    assert offload is not None
    drawn(offloaded)
    whole = size(model)
    parts = [size(part) for part in (model.conditioner, model.unet, model.first_stage)]
    if offload.kind == "components":
        assert offload.most == max(parts) < whole
    else:
        assert offload.most < whole / 4
        assert offload.most >= max(p.nbytes for p in model.unet.parameters())


def test_layers_compute_with_copies_that_go_away(offloaded: Pipeline) -> None:
    model = offloaded.model
    layer = model.unet.conv_in
    at_rest, seen = layer.weight.data_ptr(), list[int]()

    def look(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        seen.append(module.weight.data_ptr())

    handle = layer.register_forward_pre_hook(look)
    try:
        drawn(offloaded)
    finally:
        handle.remove()
    assert len(seen) == COMMON["steps"] and at_rest not in seen


def test_after_an_error_all_is_as_before(offloaded: Pipeline) -> None:
    before = places(offloaded.model)
    offload, unet = offloaded.offload, offloaded.model.unet
    assert offload is not None

    def fail(*_: object) -> None:
        raise KeyError("in the middle of the network")

    handle = unet.mid_block.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyError):
            drawn(offloaded)
    finally:
        handle.remove()
    assert places(offloaded.model) == before and offload.resident == 0
    hooks = [m for m in offloaded.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []
    assert len(drawn(offloaded)) == 2


def test_what_is_no_weight_stands_on_the_device(text_run: Path) -> None:
    model = load(text_run, "cpu", "float32").model
    device = torch.device("meta")  # any that is not the CPU
    Offload("sequential", device).place(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert model.normalization.std.is_meta


def test_guides_are_refused(offloaded: Pipeline) -> None:
    with pytest.raises(RequestError, match="guides: are led by gradients"):
        drawn(offloaded, guide=lambda images: images.square().mean((1, 2, 3)))


def test_what_there_is_not_is_refused(text_run: Path) -> None:
    with pytest.raises(ConfigError, match="offload 'sequental': did you mean 'sequential'?"):
        select_offload("sequental", torch.device("cpu"), "torch")
    with pytest.raises(ConfigError, match="is for the engine torch"):
        select_offload("components", torch.device("cpu"), "openvino")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_too(text_run: Path, kind: Any) -> None:
    execution = select_precision("float32", select_device("cuda"))
    whole = load(text_run, str(execution.device), "float32")
    offloaded = load(text_run, str(execution.device), "float32", offload=kind)
    assert drawn(offloaded) == drawn(whole)
    assert {p.device.type for p in offloaded.model.parameters()} == {"cpu"}
