"""Models are written as pipelines of diffusers, and read back as they were."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import CONDITIONERS, bert, clip, edit, inpainting, kl, model

from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import read_model
from mezzotint.checkpoints.pipelines import load_pipeline, save_pipeline
from mezzotint.conditioning.base import Conditioner, ConditionInputs, Unconditional
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    LowResConditioner,
    LowResConditionerConfig,
)
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentNormalization
from mezzotint.models.autoencoder import (
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_every_condition_is_kept(tmp_path: Path, kind: str) -> None:
    ours = model(CONDITIONERS[kind](), kl(4 if kind == "bert" else 2), scale=1.0)
    lost = save_pipeline(ours, tmp_path)
    public = {"clip", "bert", "low-res", "clip-inpainting", "nothing"}
    assert ("_diffusers_version" in (tmp_path / "model_index.json").read_text()) == (kind in public)
    assert len(lost) == (kind not in public)
    again = load_any(tmp_path).model
    assert again.weights_hash() == ours.weights_hash()
    assert again.conditioner.settings() == ours.conditioner.settings()
    assert type(again.conditioner) is type(ours.conditioner)
    for (name, before), after in zip(
        ours.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(before, after), name


@pytest.mark.parametrize(
    ("conditioner", "options", "reason"),
    [
        (clip, {"first_stage": "vq"}, "StableDiffusionPipeline has no place for an VQModel"),
        (clip, {"resblock_updown": True}, "wants a UNet that UNet2DConditionModel can be"),
        (clip, {"vector_dim": 4}, "tells the UNet no class and no vector"),
        (lambda: bert(max_length=20), {"first_stage": "f8"}, "reads 77 tokens, not 20"),
        (bert, {}, "draws latents of f = 8, not 2"),
        (Unconditional, {"size": (16, 32)}, "LDMPipeline draws squares, not 32x16"),
        (Unconditional, {"first_stage": "pixels"}, "no place for an IdentityFirstStage"),
        (Unconditional, {"cross_attention_dim": 8}, "wants a UNet that UNet2DModel can be"),
        (CONDITIONERS["low-res"], {"scale": 0.5}, "does not scale latents, by 0.5"),
        (
            lambda: LowResConditioner(LowResConditionerConfig(channels=1)),
            {},
            "wants as many channels of the small picture",
        ),
        (CONDITIONERS["inpainting"], {}, "there is no pipeline for its condition"),
        (
            lambda: HybridConditioner(clip(), inpainting(signed_mask=True)),
            {},
            "there is no pipeline for its condition",
        ),
    ],
)
def test_what_diffusers_cannot_draw_becomes_our_own_folder(
    tmp_path: Path, conditioner: Callable[[], Conditioner], options: dict[str, Any], reason: str
) -> None:
    vq = VQModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    stages: dict[str, Any] = {
        "vq": lambda: VQModel(vq),
        "f8": lambda: kl(4),
        "pixels": lambda: IdentityFirstStage(IdentityFirstStageConfig()),
    }
    given = {**options}
    if "first_stage" in given:
        given["first_stage"] = stages[given["first_stage"]]()
    ours = model(conditioner(), **given)
    defaults = SamplingDefaults(sampler="euler", spacing="karras", guidance_scale=4.0)
    [sentence] = save_pipeline(ours, tmp_path, defaults=defaults)
    assert sentence.startswith("written as Mezzotint's own folder, which diffusers cannot draw")
    assert reason in sentence
    again = read_model(tmp_path)
    assert again.model.weights_hash() == ours.weights_hash()
    assert again.model.image_size == ours.image_size
    assert again.defaults == defaults


def test_our_own_folder_in_half_precision(tmp_path: Path) -> None:
    ours = model(CONDITIONERS["class-map"]())
    save_pipeline(ours, tmp_path, dtype=torch.float16)
    kept = load_any(tmp_path, dtype=None).model
    assert {t.dtype for t in kept.parameters()} == {torch.float16}
    # a picture is drawn again from the same weights whatever it is drawn in
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_any(tmp_path, dtype=dtype).model
        assert {t.dtype for t in whole.parameters()} == {torch.float32}


def test_layers_that_no_picture_depends_on_are_left_out(tmp_path: Path) -> None:
    ours = model(clip(num_hidden_layers=4, output_layer=2, pad_token_id=0, hidden_act="gelu"))
    left_out, filled_up = save_pipeline(ours, tmp_path)
    assert "the last 1 of its 4 layers are left out" in left_out
    assert "texts are filled up with '!', which is a token of its own" in filled_up
    again = load_pipeline(tmp_path).model.conditioner
    assert isinstance(again, ClipConditioner)
    assert (again.config.num_hidden_layers, again.config.output_layer) == (3, 1)
    inputs = ConditionInputs(count=2, captions=["a red apple", ""])
    before, after = ours.conditioner(inputs).crossattn, again(inputs).crossattn
    assert before is not None and after is not None
    assert torch.allclose(before, after, atol=1e-5)  # float32: tensors lie at other addresses


@pytest.mark.parametrize("kind", ["clip", "clip-inpainting", "nothing"])
def test_students_say_how_they_are_sampled(tmp_path: Path, kind: str) -> None:
    conditioner = CONDITIONERS[kind]()
    ours = model(conditioner, guidance_embed_dim=8 if conditioner.wants else None)
    defaults = SamplingDefaults(sampler="lcm", guidance_scale=3.0, steps=2)
    told = save_pipeline(ours, tmp_path, defaults=defaults)
    assert told == [
        f"{what}: only Mezzotint reads it" for what in ("guidance_scale 3.0", "steps 2")
    ]
    again = load_any(tmp_path)
    assert again.defaults == defaults
    index = json.loads((tmp_path / "model_index.json").read_text())
    theirs = getattr(diffusers, index["_class_name"])
    left = theirs.extract_init_dict(index)[1]
    assert "_sampling" in index and not left, "diffusers would warn of it"
    edit(tmp_path / "model_index.json", _sampling={"stride": 2})
    with pytest.raises(CheckpointError, match="model_index.json: _sampling: .*'stride'"):
        load_any(tmp_path)
    [problem] = inspect_model(tmp_path).problems
    assert "'stride'" in problem


def test_a_student_that_its_pipeline_would_not_tell_the_guidance(tmp_path: Path) -> None:
    """diffusers' class would draw as if nothing guided it, twice."""
    ours = model(bert(max_length=77), kl(4), size=(64, 64), guidance_embed_dim=8)
    [sentence] = save_pipeline(ours, tmp_path)
    assert "LDMTextToImagePipeline tells the UNet no scale of guidance" in sentence


def test_a_consistency_model(tmp_path: Path) -> None:
    ours = model(clip(), guidance_embed_dim=8)
    save_pipeline(ours, tmp_path, defaults=SamplingDefaults(sampler="lcm"))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    again = load_pipeline(tmp_path)
    assert again.defaults == SamplingDefaults(sampler="lcm", guidance_scale=8.5, steps=4)
    assert again.model.unet.config.guidance_embed_dim == 8
    # whatever its scheduler: the network was distilled for this one
    edit(tmp_path / "scheduler" / "scheduler_config.json", skip_prk_steps=False)
    edit(tmp_path / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    assert load_pipeline(tmp_path).defaults.sampler == "lcm"


def test_statistics_per_channel_are_folded(tmp_path: Path) -> None:
    ours = model(Unconditional())
    mean, std = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.5])
    ours.normalization = LatentNormalization(mean, std)
    save_pipeline(ours, tmp_path)
    again = load_pipeline(tmp_path).model
    assert again.normalization.scale_factor == 1.0
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    # float32, a few hundred products a value
    assert torch.allclose(again.encode(pictures), ours.encode(pictures), atol=1e-5)


@pytest.mark.parametrize("scale", [0.18215, 0.13025, 1.0, 1 / 3, 0.22765929])
def test_the_scale_is_written_as_it_was_said(tmp_path: Path, scale: float) -> None:
    save_pipeline(model(Unconditional(), scale=scale), tmp_path)
    written = json.loads((tmp_path / "vqvae" / "config.json").read_text())["scaling_factor"]
    assert len(str(written)) <= max(len(str(scale)), 11)
    assert written == pytest.approx(scale, rel=1e-7)
