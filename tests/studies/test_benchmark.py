"""How fast a model draws, and where its time goes."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import CONDITIONERS, kl, model

from mezzotint.checkpoints.decoders import LoadedDecoder
from mezzotint.device import select_precision
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.small_decoder import SmallDecoder, SmallDecoderConfig
from mezzotint.studies.benchmark import (
    Benchmark,
    example_fields,
    random_pipeline,
    run_benchmark,
)
from mezzotint.studies.speed import count_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(text_run: Path) -> Benchmark:
    told: list[str] = []
    pipeline = load(text_run, device="cpu", precision="float32")
    found = run_benchmark(pipeline, steps=3, calls=1, tell=told.append)
    assert told[-1] == "a picture of 3 steps"
    hooks = [m._forward_hooks for m in pipeline.model.modules()]
    assert not any(hooks)  # what watched is gone
    return found


def test_a_step_a_decoding_and_a_picture(measured: Benchmark) -> None:
    step, decoding, picture = measured.timings
    assert step.what == "UNet step, latents 2 x 4 x 8 x 8"  # with its condition and without
    assert decoding.what == "decoding, 1 x 32 x 32"
    assert picture.what == "picture, 32 x 32, 3 steps"
    for each in (step, decoding):
        assert each.flops is not None and each.share is not None
        expected = each.flops / (each.seconds * measured.peaks["float32"])
        assert each.share == pytest.approx(expected)


def test_the_parts_are_the_whole(measured: Benchmark) -> None:
    calls = {part.name: part.calls for part in measured.parts}
    assert calls == {"condition": 2, "unet": 3, "decoder": 1, "rest": 1}
    assert all(part.seconds > 0 for part in measured.parts)
    whole = sum(part.seconds for part in measured.parts)
    assert whole == pytest.approx(measured.timings[-1].seconds)


def test_it_is_written_and_read(measured: Benchmark) -> None:
    assert Benchmark.from_dict(measured.to_dict()) == measured
    assert measured.machine.precision == "float32" and measured.engine == "torch"
    assert "float32" in measured.peaks


# no request says both a class and a map
@pytest.mark.parametrize("condition", sorted(CONDITIONERS.keys() - {"class-map"}))
def test_every_model_can_be_asked(condition: str) -> None:
    execution = select_precision("float32", CPU)
    first_stage = kl(3 if condition == "map" else 2)  # a map is made four times smaller
    pipeline = Pipeline(model(CONDITIONERS[condition](), first_stage), execution, condition)
    (drawn,) = pipeline.generate(**example_fields(pipeline), steps=1)
    assert drawn.image.size == (16, 16)


def test_a_small_decoder_is_measured_in_place_of_the_models_own() -> None:
    small = SmallDecoder(SmallDecoderConfig(latent_channels=3, width=8, blocks=(1, 1))).eval()
    pipeline = Pipeline(
        model(CONDITIONERS["classes"](), kl()),
        select_precision("float32", CPU),
        "small",
        decoder=LoadedDecoder(small, Path("small"), "0" * 64),
    )
    found = run_benchmark(pipeline, steps=1, calls=1)
    _, decoding, _ = found.timings
    assert decoding.flops == count_flops(
        lambda: SmallDecoder(small.config), torch.zeros(1, 3, 8, 8)
    )
    assert {part.name: part.calls for part in found.parts}["decoder"] == 1


def test_a_random_model_is_loaded_as_any_other() -> None:
    with random_pipeline(quick=True, device="cpu", precision="float32") as pipeline:
        assert pipeline.name == "random weights, tiny"
        (drawn,) = pipeline.generate(**example_fields(pipeline), steps=1)
        assert drawn.image.size == (64, 64)
