"""Pictures by OpenVINO are torch's, whatever their size; networks are converted once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mezzotint.conditioning.base import Conditioning, Unconditional
from mezzotint.device import Execution, select_device, select_precision
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.engines import openvino_files
from mezzotint.engines.openvino import OpenVinoEngine
from mezzotint.engines.select import TorchEngine, select_engine
from mezzotint.errors import CheckpointError, ConfigError, MissingExtraError, RequestError
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.protocol import PROTOCOLS
from mezzotint.generation.generate import GeneratedImage, generate_each
from mezzotint.generation.guides import Guide
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.generation.request import AdapterUse, FeatureReuse
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import VQModel, VQModelConfig
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.nn.packed import is_packed

try:
    openvino_files.import_openvino()
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this file's converted networks are kept, so that each is converted once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(folder))
        yield folder / "engines" / f"openvino-{openvino_files.version()}"


@pytest.fixture(scope="module")
def by_torch(text_run: Path) -> Pipeline:
    return load(text_run, precision="float32")


@pytest.fixture(scope="module")
def by_openvino(text_run: Path) -> Pipeline:
    """Whose networks are converted already."""
    pipeline = load(text_run, precision="float32", engine="openvino")
    pipeline.generate("x", steps=1)
    return pipeline


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is converted fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("a network was converted")

    monkeypatch.setattr("mezzotint.engines.openvino.convert", refuse)


def pixels(drawn: list[GeneratedImage]) -> np.ndarray:
    return np.stack([np.asarray(item.image) for item in drawn]).astype(int)


def execution(precision: str = "float32") -> Execution:
    return select_precision(precision, select_device("cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_images": 3},
        {"num_images": 1, "batch_size": 1},
        {"width": 48, "height": 24, "sampler": "euler_ancestral"},
        {"width": 36, "height": 28, "guidance_scale": 1.0},  # latents of odd sizes at every level
        {"negative_prompt": "a very long caption about a blue car beside a house"},
        {"width": 320, "height": 16, "tiled_decoding": True, "tiled_sampling": True},
        {"high_res": {"scale": 1.5, "upscaler": "lanczos"}},
    ],
    ids=str,
)
def test_float32_pictures_are_those_of_torch(
    by_torch: Pipeline, by_openvino: Pipeline, fields: dict[str, Any]
) -> None:
    request = {"prompt": "a red apple", "steps": 3, "seed": 5} | fields
    expected, drawn = by_torch.generate(**request), by_openvino.generate(**request)
    # the two sum in another order: a value that stands between two bytes may fall to either
    assert abs(pixels(drawn) - pixels(expected)).max() <= 1
    ran_by = drawn[0].request.resolved
    assert ran_by is not None and expected[0].request.resolved is not None
    assert (ran_by.engine, ran_by.engine_version) == ("openvino", openvino_files.version())
    assert ran_by.model_hash == expected[0].request.resolved.model_hash


def test_torch_runs_none_of_it(
    by_openvino: Pipeline, monkeypatch: pytest.MonkeyPatch, no_conversion: None
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("torch ran it")

    monkeypatch.setattr(UNet, "trunk", fail)
    monkeypatch.setattr("mezzotint.models.encoder_decoder.Decoder.forward", fail)
    by_openvino.generate("a red apple", steps=1)


def test_packed_networks_are_converted_as_the_plain_ones(text_run: Path) -> None:
    pipeline = load(text_run, precision="float32")
    pipeline.engine = OpenVinoEngine(execution())
    assert is_packed(pipeline.model.unet)
    asked: dict[str, Any] = {"prompt": "a red apple", "steps": 2}
    ours = pixels(pipeline.generate(**asked))
    assert is_packed(pipeline.model.unet)
    pipeline.engine = TorchEngine()
    assert abs(ours - pixels(pipeline.generate(**asked))).max() <= 1


def test_captions_of_several_lengths_in_one_batch(
    by_torch: Pipeline, by_openvino: Pipeline
) -> None:
    prompts = ["a red apple", "", "a very long caption about a blue car and a house"]
    found: list[np.ndarray] = []
    for pipeline in (by_torch, by_openvino):
        requests = [pipeline.request(prompt=p, seed=k, steps=2) for k, p in enumerate(prompts)]
        found.append(pixels(generate_each(pipeline, requests)))
    assert abs(found[0] - found[1]).max() <= 1


def test_bfloat16_is_as_near_to_float32_as_that_of_torch(text_run: Path) -> None:
    request: dict[str, Any] = {"prompt": "a red apple", "steps": 3, "num_images": 4}
    exact = pixels(load(text_run, precision="float32").generate(**request))
    errors = [
        abs(pixels(load(text_run, precision="bfloat16", engine=name).generate(**request)) - exact)
        for name in ("torch", "openvino")
    ]
    # both round each layer to 8 bits, though not the same ones of them: of one size, not equal
    assert errors[1].mean() <= 2 * errors[0].mean() + 0.5


def vq_of_classes(dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """All that the trained models here lack: labels, concatenation, codes, another shape."""
    torch.manual_seed(0)
    first_stage = VQModel(
        VQModelConfig(block_out_channels=(32, 64), layers_per_block=1, codebook_size=32)
    )
    unet = UNet(
        UNetConfig(
            in_channels=5,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_levels=(False, True),
            cross_attention_dim=None,
            num_class_embeds=4,
            num_attention_heads=2,
            resblock_updown=True,
            resnet_time_scale_shift="scale_shift",
            downsample_padding=0,
        )
    )
    for parameter in unet.conv_out.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = LatentDiffusion(
        first_stage,
        unet,
        Unconditional(),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (32, 32),
    )
    return model.to(dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_concatenation_and_codes(dtype: torch.dtype) -> None:
    model, exact = vq_of_classes(dtype), vq_of_classes()
    exact.load_state_dict(model.state_dict())  # what weights in bfloat16 say, in float32
    names, engine = list(model.state_dict()), OpenVinoEngine(execution())
    for batch, height, width in ((2, 16, 16), (1, 10, 14)):
        x, concat = torch.randn(batch, 3, height, width), torch.randn(batch, 2, height, width)
        cond = Conditioning(concat=concat, vector=torch.arange(batch))
        times = torch.full((batch,), 500.0)
        expected = exact.predict(x, times, cond), exact.decode(x)
        with engine.running(model), torch.autocast("cpu", torch.bfloat16, dtype != torch.float32):
            found = model.predict(x, times, cond), model.decode(x)
            with pytest.raises(RequestError, match="needs a vector"):
                model.predict(x, times, Conditioning(concat=concat))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype is torch.float32
            error = (ours - theirs).abs().max() / theirs.abs().max()
            # in bfloat16 torch embeds the times and applies the first layer of the decoder
            assert error < (1e-4 if dtype is torch.float32 else 0.05)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.unet) | vars(model.first_stage.decoder)


def test_the_second_time_nothing_is_converted(
    text_run: Path, by_openvino: Pipeline, no_conversion: None
) -> None:
    first = by_openvino.generate("a rocket", steps=2)
    again = load(text_run, precision="float32", engine="openvino").generate("a rocket", steps=2)
    assert again[0].image.tobytes() == first[0].image.tobytes()
    assert again[0].request == first[0].request


def test_edited_weights_are_another_network(
    text_run: Path, by_openvino: Pipeline, cache: Path
) -> None:
    kept = set(cache.iterdir())
    edited = [load(text_run, precision="float32", engine=e) for e in ("torch", "openvino")]
    before = edited[1].generate("a rocket", steps=2)
    assert set(cache.iterdir()) == kept
    for pipeline in edited:
        with torch.no_grad():
            pipeline.model.unet.conv_out.weight.neg_()
    expected, drawn = (pixels(p.generate("a rocket", steps=2)) for p in edited)
    assert abs(drawn - expected).max() <= 1
    assert abs(drawn - pixels(before)).max() > 1
    assert len(set(cache.iterdir()) - kept) == 1  # the decoder is the same


def _shorten(entry: Path) -> None:
    weights = (entry / "network.bin").read_bytes()
    (entry / "network.bin").write_bytes(weights[: len(weights) // 2])


def _alter(entry: Path) -> None:
    weights = bytearray((entry / "network.bin").read_bytes())
    weights[len(weights) // 2] ^= 255
    (entry / "network.bin").write_bytes(weights)


DAMAGES = {
    "shorter": _shorten,
    "altered": _alter,
    "no weights": lambda entry: (entry / "network.bin").unlink(),
    "no sums": lambda entry: (entry / "sums.json").unlink(),
    "no JSON": lambda entry: (entry / "sums.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage: str, cache: Path) -> None:
    network, made = nn.Conv2d(3, 3, 3), 0

    def make() -> Any:
        nonlocal made
        made += 1
        return openvino_files.convert(network, [torch.zeros(1, 3, 8, 8)])

    path = openvino_files.keep(["a layer", damage], make, half=False)
    assert path.parent.parent == cache
    content = path.with_name("network.bin").read_bytes()
    DAMAGES[damage](path.parent)
    for _ in range(2):
        assert openvino_files.keep(["a layer", damage], make, half=False) == path
        assert path.with_name("network.bin").read_bytes() == content
    assert made == 2
    assert not [entry for entry in cache.iterdir() if entry.name.startswith(".")]


def test_what_another_process_makes_meanwhile_is_taken(cache: Path) -> None:
    network = nn.Conv2d(3, 3, 1)

    def make() -> Any:
        return openvino_files.convert(network, [torch.zeros(1, 3, 8, 8)])

    def make_late() -> Any:
        path = openvino_files.keep(["both"], make, half=True)
        seen.append(path.stat().st_ino)
        for name, age in (("new", 0.0), ("old", 7200.0)):  # by others, of which one was killed
            (left := path.parent.with_name(f".{path.parent.name}.{name}")).mkdir()
            os.utime(left, (time.time() - age,) * 2)
        return make()

    seen: list[int] = []
    path = openvino_files.keep(["both"], make_late, half=True)
    assert [path.stat().st_ino] == seen
    (left,) = (entry for entry in cache.iterdir() if entry.name.startswith("."))
    assert left.name.endswith(".new")
    left.rmdir()


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "file"))

    def make() -> Any:
        return openvino_files.convert(nn.Conv2d(3, 3, 1), [torch.zeros(1, 3, 8, 8)])

    with pytest.raises(CheckpointError, match="cannot be written: .*; MEZZOTINT_CACHE can name"):
        openvino_files.keep(["x"], make, half=True)


@pytest.mark.parametrize("index", [0, 2])
def test_replay_is_bit_for_bit_and_another_engine_is_near(
    text_run: Path, tmp_path: Path, no_conversion: None, by_openvino: Pipeline, index: int
) -> None:
    drawn = by_openvino.generate("a rocket", num_images=3, batch_size=2, seed=11, steps=3)
    write_image(drawn[index].image, drawn[index].request, path := tmp_path / "picture.png")
    again = replay(path)
    assert again.image.tobytes() == drawn[index].image.tobytes()
    assert again.request == drawn[index].request == read_request(path)
    other = replay(path, engine="torch")
    assert abs(pixels([other]) - pixels([drawn[index]])).max() <= 1
    resolved = other.request.resolved
    assert resolved is not None and (resolved.engine, resolved.engine_version) == ("torch", None)


def test_a_card_says_what_drew(text_run: Path, no_conversion: None) -> None:
    protocol = PROTOCOLS["small"].model_copy(
        update={"network": "random", "metrics": ("kid",), "fewer": True, "kid_subsets": None}
    )
    card = evaluate(
        text_run,
        "emoji:validation",
        protocol,
        samples=4,
        steps=1,
        precision="float32",
        engine="openvino",
    )
    assert card.drawn_with is not None and card.drawn_with.engine == "openvino"


def test_what_it_lacks_is_refused_by_name(by_openvino: Pipeline, tmp_path: Path) -> None:
    why = r"guides: the engine 'openvino' computes no gradients.*--engine torch"
    with pytest.raises(RequestError, match=why):
        by_openvino.generate("x", guide=Guide(kind="colour", colour="#ff0000"))
    with pytest.raises(RequestError, match="token_merging: the engine 'openvino' runs a network"):
        by_openvino.generate("x", token_merging=0.5)
    with pytest.raises(RequestError, match="feature_reuse: the engine 'openvino' runs a network"):
        by_openvino.generate("x", feature_reuse=FeatureReuse(interval=2))
    with pytest.raises(RequestError, match="tiling: the engine 'openvino' pads with zeros only"):
        by_openvino.generate("x", tiling=True)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    lora = tmp_path / "ink.safetensors"
    save_file({f"{layer}.{name}.weight": value for name, value in factors.items()}, lora)
    with pytest.raises(RequestError, match="'openvino' runs the UNet .* without a LoRA"):
        by_openvino.generate("x", steps=1, adapters=[AdapterUse(name=str(lora))])
    by_openvino.generate("x", steps=1)  # nothing is left of it
    with (
        by_openvino.running(),
        pytest.raises(RequestError, match="'openvino' computes no gradients"),
    ):
        by_openvino.model.decode(torch.zeros(1, 4, 8, 8, requires_grad=True))


def test_where_it_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, text_run: Path) -> None:
    cuda = Execution(device=torch.device("cuda"), precision=torch.float32, reasons=())
    with pytest.raises(ConfigError, match="runs on the processor, not on cuda"):
        select_engine("openvino", cuda)
    half = Execution(device=torch.device("cpu"), precision=torch.float16, reasons=())
    with pytest.raises(ConfigError, match="float32 or bfloat16, not in float16"):
        select_engine("openvino", half)
    with pytest.raises(ConfigError, match="engine 'opnvino': did you mean 'openvino'"):
        load(text_run, engine="opnvino")


def test_importing_it_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    code = "import sys; from mezzotint.engines.openvino_files import import_openvino as i; i();"
    code += "assert 'openvino.tools.ovc' in sys.modules;"
    code += "sys.exit(any('telemetry' in name.partition('.')[0] for name in sys.modules))"
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())
