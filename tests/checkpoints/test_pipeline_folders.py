"""What folders of diffusers say in other ways, and what they leave unsaid."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import edit, model

from mezzotint.checkpoints.pipelines import load_pipeline, save_pipeline
from mezzotint.conditioning.base import Unconditional
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.errors import CheckpointError
from mezzotint.models.autoencoder import (
    VQModel,
    VQModelConfig,
)


def test_what_is_not_used_is_noted(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", safety_checker=checker)
    [note] = load_pipeline(folder).notes
    assert note == "safety_checker: named in model_index.json, but not used by Mezzotint"


def test_an_inpainting_pipeline_may_have_an_ordinary_network(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipelineLegacy")
    assert isinstance(load_pipeline(folder).model.conditioner, ClipConditioner)


def test_scales_that_are_not_said(copied: Callable[[str], Path]) -> None:
    folder = copied("nothing")
    edit(folder / "vqvae" / "config.json", scaling_factor=None)
    loaded = load_pipeline(folder)
    assert loaded.model.normalization.scale_factor == pytest.approx(0.18215, rel=1e-6)
    assert loaded.notes == ()
    vq = VQModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    save_pipeline(model(Unconditional(), VQModel(vq)), folder)
    edit(folder / "vqvae" / "config.json", scaling_factor=None)
    loaded = load_pipeline(folder)
    assert loaded.model.normalization.scale_factor == 1.0
    assert "says no scaling_factor; taken for 1" in loaded.notes[0]


def test_sizes(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    config = folder / "unet" / "config.json"
    edit(config, sample_size=[8, 12])
    assert load_pipeline(folder).model.image_size == (16, 24)
    edit(config, sample_size=32, _diffusers_version="0.6.0")
    assert load_pipeline(folder).model.image_size == (128, 128)
    edit(config, _diffusers_version="0.9.0.dev0")
    assert load_pipeline(folder).model.image_size == (64, 64)
    edit(config, sample_size=None)
    with pytest.raises(CheckpointError, match="sample_size is None; expected the side"):
        load_pipeline(folder)


def test_the_hash_is_that_of_everything_that_was_read(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    loaded = load_pipeline(folder)
    names = {str(path.relative_to(folder)) for path in loaded.files}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == there
    before = loaded.content_hash()
    folder = folder.rename(folder.with_name("moved"))
    assert load_pipeline(folder).content_hash() == before
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=2)
    assert load_pipeline(folder).content_hash() != before
