"""YAML files of the original code: what the published ones say, and what is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezzotint.checkpoints.compvis_config import (
    CompvisConfig,
    parse_compvis_config,
    read_compvis_config,
)
from mezzotint.errors import CheckpointError

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
ENCODERS = "ldm.modules.encoders.modules"


def first_stage(kind: str, levels: list[int], **params: Any) -> dict[str, Any]:
    shape = {"double_z": kind == "AutoencoderKL", "z_channels": params["embed_dim"]}
    shape |= {"resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": levels}
    shape |= {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    return {
        "target": f"ldm.models.autoencoder.{kind}",
        "params": {
            "monitor": "val/rec_loss",
            "ddconfig": shape | params.pop("ddconfig", {}),
            "lossconfig": {"target": "torch.nn.Identity"},
            **params,
        },
    }


def model(unet: dict[str, Any], target: str = "LatentDiffusion", **params: Any) -> dict[str, Any]:
    shared = {"num_res_blocks": 2, "image_size": 32}
    return {
        "model": {
            "base_learning_rate": 1e-4,
            "target": f"ldm.models.diffusion.ddpm.{target}",
            "params": {
                **{"num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000},
                "unet_config": {"target": UNET, "params": shared | unet},
                **params,
            },
        },
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1}},
        "lightning": {"trainer": {"benchmark": True}},
    }


KL = first_stage("AutoencoderKL", [1, 2, 4, 4], embed_dim=4)
VQ = first_stage("VQModelInterface", [1, 2, 4], embed_dim=3, n_embed=8192)
STABLE = {
    **{"linear_start": 0.00085, "linear_end": 0.012, "image_size": 64, "channels": 4},
    **{"scale_factor": 0.18215, "use_ema": False, "first_stage_config": KL},
}
ATTENDING = {
    **{"in_channels": 4, "out_channels": 4, "model_channels": 320},
    **{"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "transformer_depth": 1},
    **{"use_spatial_transformer": True, "use_checkpoint": True, "legacy": False},
}
PAPER = {"linear_start": 0.0015, "first_stage_config": VQ, "image_size": 64, "channels": 3}
THREE = {"out_channels": 3, "num_res_blocks": 2}

# what the published files say, in the words of the original code
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd1": model(
        {**ATTENDING, "num_heads": 8, "context_dim": 768},
        **STABLE,
        conditioning_key="crossattn",
        cond_stage_config={"target": f"{ENCODERS}.FrozenCLIPEmbedder"},
    ),
    "sd2-inpainting": model(
        {
            **ATTENDING,
            **{"in_channels": 9, "num_head_channels": 64, "use_linear_in_transformer": True},
            "context_dim": 1024,
        },
        "LatentInpaintDiffusion",
        **STABLE,
        parameterization="v",
        conditioning_key="hybrid",
        finetune_keys=None,
        cond_stage_config={
            "target": f"{ENCODERS}.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
    ),
    "churches": model(
        {
            **{"in_channels": 4, "out_channels": 4, "model_channels": 192, "num_heads": 8},
            **{"attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4]},
            **{"use_scale_shift_norm": True, "resblock_updown": True},
        },
        **{"linear_start": 0.0015, "linear_end": 0.0155, "image_size": 32, "channels": 4},
        **{"concat_mode": False, "scale_by_std": True, "cond_stage_key": "image"},
        loss_type="l1",
        first_stage_config=KL,
        cond_stage_config="__is_unconditional__",
    ),
    "layout": model(
        {
            **THREE,
            **{"in_channels": 3, "model_channels": 128, "attention_resolutions": [8, 4, 2]},
            **{"channel_mult": [1, 2, 3, 4], "num_head_channels": 32, "transformer_depth": 3},
            **{"use_spatial_transformer": True, "context_dim": 512},
        },
        **PAPER,
        linear_end=0.0205,
        conditioning_key="crossattn",
        cond_stage_config={
            "target": f"{ENCODERS}.BERTEmbedder",
            "params": {
                **{"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92},
                "use_tokenizer": False,
            },
        },
    ),
    "inpainting": model(
        {
            **THREE,
            **{"in_channels": 7, "model_channels": 256, "attention_resolutions": [8, 4, 2]},
            **{"channel_mult": [1, 2, 3, 4], "num_heads": 8, "resblock_updown": True},
        },
        **PAPER
        | {
            "first_stage_config": first_stage(
                "VQModelInterface",
                [1, 2, 4],
                embed_dim=3,
                n_embed=8192,
                ddconfig={"attn_type": "none"},
            )
        },
        linear_end=0.0205,
        concat_mode=True,
        cond_stage_key="masked_image",
        cond_stage_config="__is_first_stage__",
    ),
    "semantic": model(
        {
            **THREE,
            **{"in_channels": 6, "model_channels": 128, "attention_resolutions": [32, 16, 8]},
            **{"channel_mult": [1, 4, 8], "num_heads": 8},
        },
        **PAPER,
        linear_end=0.0205,
        cond_stage_config={
            "target": f"{ENCODERS}.SpatialRescaler",
            "params": {"n_stages": 2, "in_channels": 182, "out_channels": 3},
        },
    ),
}


def parsed(name: str) -> CompvisConfig:
    return parse_compvis_config(PUBLISHED[name], Path("a.yaml"))


def test_stable_diffusion() -> None:
    config = parsed("sd1")
    assert (config.main, config.spatial, config.latent_size) == ("clip", None, 64)
    assert config.unet == {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_levels": [True, True, True, False],
        "cross_attention_dim": 768,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "resblock_updown": False,
        "dropout": 0.0,
        "num_attention_heads": 8,
        "attention_head_dim": None,
    }
    assert config.schedule == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    assert config.scale_factor == 0.18215
    assert config.first_stage["block_out_channels"] == [128, 256, 512, 512]
    assert config.first_stage["attention_levels"] is None and config.first_stage["mid_attention"]


def test_the_others() -> None:
    config = parsed("sd2-inpainting")
    assert (config.main, config.spatial) == ("open_clip", "inpainting")
    assert config.schedule["prediction_type"] == "v_prediction"
    assert config.unet["attention_head_dim"] == 64 and config.unet["use_linear_projection"]
    config = parsed("churches")
    assert (config.main, config.spatial, config.scale_factor) == (None, None, None)
    assert config.unet["attention_levels"] == [True, True, True, True, False]
    assert config.unet["resnet_time_scale_shift"] == "scale_shift"
    config = parsed("layout")
    assert (config.main, config.first_stage["codebook_size"]) == ("layout", 8192)
    assert config.main_fields == {
        "width": 512,
        "layers": 16,
        "vocab_size": 8192,
        "max_length": 92,
    }
    config = parsed("inpainting")
    assert (config.main, config.spatial) == (None, "inpainting")
    assert not config.first_stage["mid_attention"]
    config = parsed("semantic")
    assert config.spatial == "semantic_map" and config.spatial_fields["classes"] == 182
    assert config.unet["attention_levels"] == [False, False, False]


def changed(key: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(PUBLISHED["sd1"])
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        target = target[parent]
    target[last] = value
    return data


P = "model.params"
U = f"{P}.unet_config"
F = f"{P}.first_stage_config"
C = f"{P}.cond_stage_config"
WRONG = [
    # a target is looked up, whatever it names
    (f"{U}.target", "os.system", f"{U}.target: unknown 'os.system'; Choose from: {UNET}"),
    (f"{C}.target", f"{ENCODERS}.FrozenClipEmbedder", f"did you mean '{ENCODERS}.FrozenCLIPEmb"),
    ("model.target", "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "model.target: unknown"),
    (f"{F}.target", 3, f"{F}.target: expected str, got 3"),
    (f"{P}.linear_stop", 0.1, f"unknown key '{P}.linear_stop'; did you mean 'linear_start'?"),
    (f"{U}.params.num_head", 8, f"unknown key '{U}.params.num_head'; did you mean 'num_heads'?"),
    (f"{U}.params.num_heads", "8", f"{U}.params.num_heads: expected int, got '8'"),
    (f"{U}.params.num_head_channels", 64, "num_heads: expected either this or num_head_channels"),
    (f"{U}.params.model_channels", None, f"{U}.params.model_channels: required, but missing"),
    (f"{U}.params.channel_mult", [2, 4], "channel_mult: expected 1 as the first, got 2"),
    (f"{U}.params.channel_mult", "1 2", "channel_mult: expected list or tuple, got '1 2'"),
    (f"{U}.params.n_embed", 100, "n_embed: expected None, got 100"),
    (f"{F}.params.embed_dim", 8, "embed_dim: expected z_channels, 4, got 8"),
    (f"{F}.params.ddconfig.attn_type", "linear", "attn_type: unknown 'linear'"),
    (f"{F}.params.ddconfig.double_z", False, "double_z: expected True, got False"),
    (f"{P}.parameterization", "eps2", f"{P}.parameterization: unknown 'eps2'; did you mean 'eps'?"),
    (f"{P}.conditioning_key", "adm", f"{P}.conditioning_key: expected 'crossattn'"),
    (f"{P}.scale_by_std", 1, f"{P}.scale_by_std: expected bool, got 1"),
    (f"{P}.given_betas", [0.1], "given_betas: expected None, got [0.1]"),
    (f"{C}", "__is_the_first_stage__", "did you mean '__is_first_stage__'"),
    (f"{C}.params", {"layer": "pooled"}, "layer: expected 'last', got 'pooled'"),
    ("model", [1], "model: expected dict, got [1]"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[key for key, *_ in WRONG])
def test_what_is_not_known_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_compvis_config(changed(key, value), Path("a.yaml"))
    assert str(caught.value).startswith("a.yaml: ") and message in str(caught.value)


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    data = changed(f"{P}.linear_stop", 0.1)
    data["model"]["params"]["timesteps"] = 0
    data["model"]["extra"] = 1
    with pytest.raises(CheckpointError) as caught:
        parse_compvis_config(data, Path("a.yaml"))
    assert str(caught.value).count("\n  ") == 3


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]"
    for old, new in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "expected keys and values, got list"),
        (b"model: {", "not valid YAML"),
        (b"model: !!python/object/apply:os.system ['true']", "line 1: not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: " + b"[" * 5000, "line 1: refused: nested more than 64 deep"),
        (b"# " + b"x" * (1 << 20), "has more than 1,048,576 bytes"),
        (BOMB.encode() + b"\nmodel: *o", "refused: more than 131,072 values"),
        (
            b"a: &a " + b"[" * 40 + b"]" * 40 + b"\nb: " + b"[" * 40 + b"*a" + b"]" * 40,
            "line 2: refused: nested more than 64 deep",
        ),
        (b"a: &a [*a]", "line 1: refused: the alias *a stands for no lines above it"),
        (b"model: {<<: {a: 1}}", "line 1: refused: << merges other lines"),
        (b"{}", "required, but missing"),
    ],
    ids=["list", "broken", "object", "bytes", "deep", "large", "bomb"]
    + ["deep by aliases", "itself", "merge", "empty"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_compvis_config(path)
    assert message in str(caught.value) and len(str(caught.value)) < 4000


def test_a_missing_file_and_a_published_one(tmp_path: Path) -> None:
    path = tmp_path / "v1.yaml"
    with pytest.raises(CheckpointError, match=r"v1\.yaml: no such file"):
        read_compvis_config(path)
    path.write_text(yaml.safe_dump(PUBLISHED["sd1"]))
    found = read_compvis_config(path)
    assert found == parse_compvis_config(PUBLISHED["sd1"], path)
