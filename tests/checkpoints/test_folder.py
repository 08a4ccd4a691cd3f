import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from mezzotint.checkpoints.folder import (
    CONFIG,
    WEIGHTS,
    load_component,
    load_state_strictly,
    read_component_config,
    save_component,
    write_atomically,
)
from mezzotint.config import Config
from mezzotint.errors import CheckpointError
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig

SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "cross_attention_dim": 16,
    "num_attention_heads": 4,
    "norm_num_groups": 16,
}
PLAIN = {"cross_attention_dim": None}
UNETS: dict[str, dict[str, Any]] = {
    "text": {"sample_size": 16, "dropout": 0.1},
    "heads-by-width": {"num_attention_heads": None, "attention_head_dim": 16},
    "linear-deep": {"use_linear_projection": True, "transformer_layers_per_block": 2},
    "class-and-text": {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift"},
    "vector": {"vector_dim": 12},
    "guidance": {"guidance_embed_dim": 8},
    "plain": PLAIN | {"num_attention_heads": None, "attention_head_dim": 8, "in_channels": 3},
    "plain-one-head": PLAIN | {"num_attention_heads": 1, "num_class_embeds": 5},
    "plain-resnets": PLAIN
    | {"num_attention_heads": 1, "resblock_updown": True, "downsample_padding": 0},
    "plain-times": PLAIN
    | {"num_attention_heads": 1, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
}
FIRST_STAGES: dict[str, Config] = {
    "kl": AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1),
    "kl-attention": AutoencoderKLConfig(
        block_out_channels=(32, 64),
        attention_levels=(False, True),
        mid_attention=False,
        latent_channels=6,
        dropout=0.2,
    ),
    "vq": VQModelConfig(
        block_out_channels=(32, 64),
        codebook_size=32,
        embedding_dim=5,
        latent_channels=4,
        commitment_weight=0.5,
    ),
}


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Fill every weight: residual branches that start at zero would hide what they hold."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * noise)


def unet(name: str) -> UNet:
    built = UNet(UNetConfig.from_dict({**SMALL_UNET, **UNETS[name]})).eval()
    randomize(built)
    return built


def first_stage(name: str) -> AutoencoderKL | VQModel:
    config = FIRST_STAGES[name]
    built = AutoencoderKL(config) if isinstance(config, AutoencoderKLConfig) else VQModel(config)
    randomize(built)
    return built.eval()


def unet_inputs(config: UNetConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(2, config.in_channels, 16, 16, generator=generator),
        "timestep": torch.tensor([7, 700]),
    }
    if config.cross_attention_dim is not None:
        inputs["context"] = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    if config.num_class_embeds is not None:
        inputs["vector"] = torch.tensor([1, 4])
    if config.vector_dim is not None:
        inputs["vector"] = torch.randn(2, config.vector_dim, generator=generator)
    return inputs


def theirs_of(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    names = {
        "x": "sample",
        "context": "encoder_hidden_states",
        "vector": "class_labels",
    }
    return module(**{names.get(k, k): v for k, v in inputs.items()}).sample


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) <= 1e-4


NOTHING = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unets_go_to_diffusers_and_back(name: str, tmp_path: Path) -> None:
    ours = unet(name)
    save_component(ours, tmp_path / "ours")
    kind = getattr(diffusers, read_component_config(tmp_path / "ours")["_class_name"])
    theirs, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {k: list(v) for k, v in info.items()} == NOTHING
    inputs = unet_inputs(ours.config)
    expected = ours(**inputs)
    assert_same(theirs_of(theirs, inputs), expected)

    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_component(tmp_path / folder)
        assert isinstance(again, UNet)
        assert again.config == ours.config
        assert torch.equal(again(**inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_go_to_diffusers_and_back(name: str, tmp_path: Path) -> None:
    ours = first_stage(name)
    save_component(ours, tmp_path / "ours", extra={"scaling_factor": 0.3})
    config = read_component_config(tmp_path / "ours")
    kind = getattr(diffusers, config["_class_name"])
    theirs, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {k: list(v) for k, v in info.items()} == NOTHING
    assert theirs.config.scaling_factor == 0.3
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if isinstance(ours, AutoencoderKL):
        z = ours.encode(x).mean
        assert_same(theirs.encode(x).latent_dist.mean, z)
    else:
        z = ours.encode(x)
        assert_same(theirs.encode(x).latents, z)
    assert_same(theirs.decode(z).sample, ours.decode(z))

    theirs.save_pretrained(tmp_path / "theirs")
    assert read_component_config(tmp_path / "theirs")["scaling_factor"] == 0.3
    for folder in ("ours", "theirs"):
        again = load_component(tmp_path / folder)
        assert torch.equal(again.decode(z), ours.decode(z))
        if folder == "ours":  # diffusers' file doesn't hold what only training needs
            assert again.config == ours.config


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            diffusers.UNet2DConditionModel,
            # the shape of Stable Diffusion 2, whose heads differ in number
            {
                "block_out_channels": (32, 64, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "attention_head_dim": (2, 4, 4),
                "cross_attention_dim": 16,
                "use_linear_projection": True,
                "layers_per_block": 1,
                "upcast_attention": True,
            },
        ),
        (
            diffusers.UNet2DModel,
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "downsample_type": "resnet",
                "upsample_type": "resnet",
                "layers_per_block": 1,
                "attention_head_dim": None,
            },
        ),
    ],
)
def test_folders_that_diffusers_made(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = kind(**options).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_component(tmp_path)
    assert isinstance(ours, UNet)
    inputs = unet_inputs(ours.config)
    assert_same(ours(**inputs), theirs_of(theirs, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 4, "resblock_updown": True},
        PLAIN | {"vector_dim": 3},
        PLAIN | {"attention_levels": (True, True)},
    ],
)
@torch.no_grad()
def test_what_diffusers_cannot_express_is_kept_as_ours(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ours = UNet(UNetConfig.from_dict({**SMALL_UNET, **options})).eval()
    save_component(ours, tmp_path, extra={"sample_size": [16, 24]})
    assert read_component_config(tmp_path)["_class_name"] == "UNet"
    again = load_component(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again.state_dict()["conv_in.weight"], ours.conv_in.weight)


def test_no_first_stage_is_a_folder_too(tmp_path: Path) -> None:
    save_component(IdentityFirstStage(IdentityFirstStageConfig()), tmp_path, {"scaling_factor": 2})
    again = load_component(tmp_path)
    assert isinstance(again, IdentityFirstStage)
    assert again.config == IdentityFirstStageConfig()


def test_attention_weights_of_old_folders(tmp_path: Path) -> None:
    """Stable Diffusion 1's autoencoder was published with other names for its projections."""
    ours = first_stage("kl")
    expected = ours.state_dict()
    save_component(ours, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in expected.items():
        for new, past in old.items():
            name = name.replace(f".{new}.", f".{past}.")
        renamed[name] = value.contiguous()
    assert "encoder.mid_block.attentions.0.query.weight" in renamed
    from safetensors.torch import save_file

    save_file(renamed, tmp_path / WEIGHTS)
    found = load_component(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_type_in_memory_is_chosen_by_the_reader(tmp_path: Path) -> None:
    save_component(unet("text").half(), tmp_path)
    assert load_component(tmp_path).conv_in.weight.dtype == torch.float32
    assert load_component(tmp_path, torch.bfloat16).conv_in.weight.dtype == torch.bfloat16


def test_a_loaded_module_owns_its_weights(tmp_path: Path) -> None:
    ours = first_stage("vq")
    save_component(ours, tmp_path)
    loaded = load_component(tmp_path).train()
    loaded.decode(loaded.encode(torch.zeros(1, 3, 8, 8)))
    assert int(loaded.quantize.usage.sum()) == 16
    with torch.no_grad():
        for parameter in loaded.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    again = load_component(tmp_path)
    assert torch.equal(again.decoder.conv_in.weight, ours.decoder.conv_in.weight)


def edit(folder: Path, **changes: Any) -> None:
    data = read_component_config(folder) | changes
    (folder / CONFIG).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionalModel"}, "did you mean 'UNet2DConditionModel'"),
        ({"encoder_hid_dim": 7}, "encoder_hid_dim is 7, expected None or False"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu' or 'swish'"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"cross_attention_dim": [16, 32]}, "cross_attention_dim is .*one value for all levels"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"attention_head_dim": [4, 4, 4]}, "one number for each of block_out_channels"),
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "is 'KDownBlock2D', expected only"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not mirror"),
        ({"time_embedding_type": "fourier", "dual_cross_attention": True}, "fourier.*dual_cross"),
        ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide"),
        ({"in_channels": "four"}, "in_channels"),
    ],
)
def test_configurations_that_cannot_be_built(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_component(unet("text"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_component(tmp_path)
    assert str(tmp_path / CONFIG) in str(error.value)


def test_neutral_and_private_keys_are_passed_over(tmp_path: Path) -> None:
    save_component(unet("text"), tmp_path)
    edit(
        tmp_path, _diffusers_version="0.6.0", only_cross_attention=[False, False], new_in_2030=None
    )
    load_component(tmp_path)
    edit(tmp_path, attention_head_dim=[3, 4])  # the first level has no attention
    load_component(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    tensors = {"weight": torch.zeros(3, 5), "gain": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        load_state_strictly(module, tensors, tmp_path / "file")
    assert str(error.value) == (
        f"{tmp_path / 'file'}: does not fit its Linear: missing (1): bias; unexpected (1): gain;"
        " wrong shape (1): weight (3, 5) where (3, 2) was expected"
    )


def test_long_lists_are_cut(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): .* and \d+ more$"):
        load_state_strictly(unet("text"), {}, tmp_path)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_a_truncated_file_of_weights(size: int, tmp_path: Path) -> None:
    save_component(unet("text"), tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: damaged"):
        load_component(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{CONFIG}: no such file"):
        load_component(tmp_path / "nowhere")
    save_component(unet("text"), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no such file; there is other.safetensors"):
        load_component(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_component(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        load_component(tmp_path)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let writing fail part of the way, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    ours = unet("text")
    save_component(ours, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    randomize(ours)
    with no_file_larger_than(len(before) // 2):
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: cannot be written"):
            save_component(ours, tmp_path)
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_atomically(tmp_path / CONFIG, before)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    load_component(tmp_path)
