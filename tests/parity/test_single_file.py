"""Single files against the programs that write and read them: the original networks, diffusers.

Weights are moved, never computed with, so that everything is equal to the bit.
"""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from reference_pipelines import stable_diffusion, text_model
from tiny_models import build
from torch import nn

from mezzotint.checkpoints.compvis_config import read_compvis_config
from mezzotint.checkpoints.compvis_shapes import guess_unet
from mezzotint.checkpoints.compvis_text import conditioner_map, guess_conditioner
from mezzotint.checkpoints.folder import load_component
from mezzotint.checkpoints.single_file import load_single_file, save_single_file
from mezzotint.checkpoints.sketch import split
from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
)
from mezzotint.conditioning.vocabularies import clip_tokenizer
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL
from mezzotint.models.unet import UNet
from mezzotint.storage.tensors import open_tensors

KINDS = ("sd1", "sd2", "sd2-v", "sd1-inpainting")


def text_encoder(theirs: Any) -> ClipConditioner:
    """Ours with the weights of theirs, whatever the version calls them."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
        *("num_attention_heads", "max_position_embeddings", "projection_dim", "pad_token_id"),
    )
    fields = {name: getattr(theirs.config, name) for name in names}
    ours = ClipConditioner(ClipConditionerConfig.from_dict(fields), clip_tokenizer())
    state = {n.removeprefix("text_model."): t for n, t in theirs.state_dict().items()}
    ours.load_state_dict({f"text_model.{name}": tensor for name, tensor in state.items()})
    return ours


def model_of(pipeline: Any, kind: str, folder: Path) -> LatentDiffusion:
    unet, vae = load_component(folder / "unet"), load_component(folder / "vae")
    assert isinstance(unet, UNet) and isinstance(vae, AutoencoderKL)
    conditioner: Conditioner = text_encoder(pipeline.text_encoder)
    if "inpainting" in kind:
        spatial = InpaintingConditioner(InpaintingConditionerConfig())
        conditioner = HybridConditioner(conditioner, spatial)
    prediction = "v_prediction" if kind == "sd2-v" else "epsilon"
    schedule = ScheduleConfig(prediction_type=prediction, steps_offset=1, set_alpha_to_one=False)
    scale = LatentNormalization.from_scale_factor(0.18215)
    return LatentDiffusion(vae, unet, conditioner, schedule, scale, (64, 64))


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of diffusers, its folder, and the single file that we make of it."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind) / "folder"
    pipeline = stable_diffusion(kind, folder)
    path = folder.with_name("model.safetensors")
    told = save_single_file(model_of(pipeline, kind, folder), path)
    return kind, pipeline, folder, path, told


def test_diffusers_reads_what_we_write(written: Any) -> None:
    kind, pipeline, folder, path, _ = written
    name = "StableDiffusionInpaintPipeline" if "inpainting" in kind else "StableDiffusionPipeline"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers itself, on what it will rename
        theirs = getattr(diffusers, name).from_single_file(
            str(path), config=str(folder), local_files_only=True, safety_checker=None
        )
    for part in ("unet", "vae", "text_encoder"):
        found, expected = (getattr(p, part).state_dict() for p in (theirs, pipeline))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_we_read_it_back_as_it_was(written: Any) -> None:
    kind, pipeline, folder, path, told = written
    loaded = load_single_file(path, dtype=None)
    assert loaded.model.weights_hash() == model_of(pipeline, kind, folder).weights_hash()
    # no shape tells how many heads the text encoder has, and no published one has so narrow ones
    assert len(told) == 1 and "main.num_attention_heads" in told[0]
    assert read_compvis_config(path.with_suffix(".yaml")).own["main"]["num_attention_heads"] == 4


def test_open_clip_is_split_as_diffusers_splits_it() -> None:
    theirs = text_model("sd2")
    ours = text_encoder(theirs)
    mapping = conditioner_map("open_clip", ours.config)
    stored = mapping.to_compvis(ours.state_dict())
    given = {f"cond_stage_model.{name}": tensor for name, tensor in stored.items()}
    converted = convert_open_clip_checkpoint(theirs, given)
    expected = ours.state_dict()
    short = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    assert {f"text_model.{name}" for name in short} == expected.keys()
    assert all(torch.equal(tensor, expected[f"text_model.{n}"]) for n, tensor in short.items())
    assert mapping.from_compvis(stored).keys() == expected.keys()


ORIGINAL_UNETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformers": (
        {
            "num_heads": 4,
            "use_spatial_transformer": True,
            "context_dim": [24, 24],
            "transformer_depth": 2,
        },
        {"cross_attention_dim": 24, "transformer_layers_per_block": 2},
    ),
    "linear transformers": (
        {
            **{"num_head_channels": 16, "use_spatial_transformer": True, "context_dim": 24},
            "use_linear_in_transformer": True,
        },
        {"cross_attention_dim": 24, "use_linear_projection": True},
    ),
    "plain": ({"num_heads": 2}, {}),
    "labels": ({"num_heads": 2, "num_classes": 7}, {"num_class_embeds": 7}),
    "resampling blocks": (
        {"num_heads": 2, "resblock_updown": True, "use_scale_shift_norm": True},
        {"resblock_updown": True, "resnet_time_scale_shift": "scale_shift"},
    ),
}


@pytest.mark.parametrize("name", ORIGINAL_UNETS)
@pytest.mark.parametrize(("layers", "at"), [(1, (2, 4)), (2, (1,)), (3, ())])
def test_the_shapes_of_the_original_unet_tell_what_it_is(
    name: str, layers: int, at: tuple[int, ...]
) -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    options, expected = ORIGINAL_UNETS[name]
    with torch.device("meta"):
        theirs = UNetModel(
            image_size=16,
            in_channels=5,
            model_channels=32,
            out_channels=3,
            num_res_blocks=layers,
            attention_resolutions=at,
            channel_mult=(1, 2, 3),
            **options,
        )
    found = guess_unet({name: tuple(t.shape) for name, t in theirs.state_dict().items()})
    plain = {
        "in_channels": 5,
        "out_channels": 3,
        "block_out_channels": [32, 64, 96],
        "layers_per_block": layers,
        "attention_levels": [level in at for level in (1, 2, 4)],
        "resnet_time_scale_shift": "default",
        "resblock_updown": False,
        "cross_attention_dim": None,
    }
    if "cross_attention_dim" in expected:
        plain |= {"transformer_layers_per_block": 1, "use_linear_projection": False}
    assert found == plain | expected


def test_averages_are_named_as_the_original_names_them(tmp_path: Path) -> None:
    from ldm.modules.ema import LitEma

    model = build("ldm-unconditional")
    path = tmp_path / "model.ckpt"
    save_single_file(model, path)
    state = open_tensors(path).read()
    # the original wraps its UNet once, and averages what is in there
    wrapper = nn.Module()
    for name, tensor in state.items():
        if name.startswith("model."):
            *parents, leaf = name.removeprefix("model.").split(".")
            holder = wrapper
            for parent in parents:
                if not hasattr(holder, parent):
                    holder.add_module(parent, nn.Module())
                holder = getattr(holder, parent)
            holder.register_parameter(leaf, nn.Parameter(tensor + 1))
    average = {f"model_ema.{name}": tensor for name, tensor in LitEma(wrapper).state_dict().items()}
    torch.save({"state_dict": state | average}, path)
    raw = load_single_file(path, dtype=None, weights="raw").model.unet.state_dict()
    averaged = load_single_file(path, dtype=None, weights="ema").model.unet.state_dict()
    assert all(torch.equal(averaged[name], tensor + 1) for name, tensor in raw.items())
    assert all(torch.equal(tensor, model.unet.state_dict()[name]) for name, tensor in raw.items())


def test_shapes_of_the_text_encoders_of_full_size() -> None:
    """What a file tells of ViT-L/14, and of ViT-H/14 whole and without its last layer."""
    published = {
        "clip": ClipConditionerConfig(),
        "open_clip": ClipConditionerConfig(
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
            **{"num_attention_heads": 16, "hidden_act": "gelu", "pad_token_id": 0},
            output_layer=2,
        ),
    }
    short = published["open_clip"].model_copy(update={"num_hidden_layers": 23, "output_layer": 1})
    for kind, config in (*published.items(), ("open_clip", short)):
        rules = conditioner_map(kind, config).rules
        shapes = {f"cond_stage_model.{r.theirs}": tuple(r.theirs_shape) for r in rules}
        fields = guess_conditioner(kind, split(shapes)["conditioner"], 4)
        assert ClipConditionerConfig.from_dict(fields) == config
