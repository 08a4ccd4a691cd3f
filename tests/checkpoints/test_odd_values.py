"""Configurations of public checkpoints with odd values: a model comes out, or one sentence."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_compvis_config import PUBLISHED
from tiny_models import build
from tiny_pipelines import CONDITIONERS, kl
from tiny_pipelines import model as of_folder

from mezzotint.checkpoints.compvis_config import parse_compvis_config, read_compvis_config
from mezzotint.checkpoints.conditioners import load_conditioner
from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.keys import Keys
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.model import load_unet
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.checkpoints.text_encoders import read_bert, read_clip
from mezzotint.errors import CheckpointError, ConfigError, MezzotintError, short
from mezzotint.latent_diffusion import LatentNormalization
from mezzotint.models.unet import UNetConfig
from mezzotint.storage.safetensors_file import write_safetensors
from mezzotint.storage.tensors import open_tensors

DEEP: dict[str, Any] = {"a": [{"b": [1]}]}
ODD = [None, True, -1, 1e400, 10**30, "x", [], [{}], DEEP]


def tell(read: Callable[[], object], source: Path) -> str:
    """What is said of a model that is refused; empty of one that is read."""
    begin = time.perf_counter()
    try:
        read()
    except MezzotintError as error:
        told = str(error)
        assert told.startswith(str(source)) and len(told) < 2500, told
    else:
        told = ""
    assert time.perf_counter() - begin < 5
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("folder") / kind
            levels = 4 if kind == "bert" else 2
            save_pipeline(of_folder(CONDITIONERS[kind](), kl(levels)), made[kind])
        return made[kind]

    return of


def said(root: Path, name: str, read: Callable[[], object] | None = None, **keys: Any) -> str:
    """What is said of a folder with other keys in one of its files."""
    path = root / name
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | keys))
    try:
        return tell(read or (lambda: load_any(root)), root)
    finally:
        path.write_text(before)


ADDED = {
    "config.json": ("num_class_embeds", "latents_mean", "text_config", "_mezzotint", "act_fn"),
    "scheduler_config.json": ("_use_default_values", "trained_betas", "use_karras_sigmas"),
}
# what reads a file, so that not the whole model is read each time
READERS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("low-res", "model_index.json", load_any),
    ("low-res", "scheduler/scheduler_config.json", load_any),
    ("low-res", "unet/config.json", lambda root: load_unet(root / "unet")),
    ("low-res", "vqvae/config.json", lambda root: load_first_stage(root / "vqvae")),
    ("clip", "unet/config.json", lambda root: load_unet(root / "unet")),
    ("clip", "text_encoder/config.json", lambda root: read_clip(*encoder(root), None)),
    ("clip", "tokenizer/special_tokens_map.json", lambda root: read_clip(*encoder(root), None)),
    ("bert", "bert/config.json", lambda root: read_bert(*encoder(root, "bert"), None)),
    (
        "bert",
        "tokenizer/tokenizer_config.json",
        lambda root: read_bert(*encoder(root, "bert"), None),
    ),
    ("map", "model_index.json", load_any),
    ("map", "conditioner/config.json", lambda root: load_conditioner(root / "conditioner")),
]


def encoder(root: Path, name: str = "text_encoder") -> tuple[Path, Path]:
    return root / name, root / "tokenizer"


@pytest.mark.parametrize(
    ("kind", "name", "read"), READERS, ids=[f"{kind}-{name}" for kind, name, _ in READERS]
)
def test_every_key_of_a_folder(
    folder: Callable[[str], Path], kind: str, name: str, read: Callable[[Path], object]
) -> None:
    root = folder(kind)
    told = [
        said(root, name, partial(read, root), **{key: value})
        for key in (*json.loads((root / name).read_text()), *ADDED.get(Path(name).name, ()))
        for value in ODD
    ]
    # what cannot name a token leaves a tokenizer its own
    assert any(told) or name.startswith("tokenizer/")
    assert tell(lambda: load_any(root), root) == ""


WRONG_IN_FOLDERS = [
    ("unet", "down_block_types", 3, "down_block_types is 3, expected a list"),
    ("unet", "down_block_types", [{}], "down_block_types is {}, expected only CrossAttn"),
    ("unet", "up_block_types", None, "up_block_types is None, expected a list"),
    ("unet", "sample_size", [{}], "sample_size is [{}], expected a side of latents"),
    ("unet", "sample_size", [8, 10**9], "sample_size is [8, 1000000000], expected a side"),
    ("unet", "in_channels", 10**30, f"in_channels is {10**30}, expected a number"),
    ("unet", "in_channels", 1 << 40, "in_channels: Input should be less than or equal to 65536"),
    ("unet", "attention_head_dim", [8, 0], "attention_head_dim is [8, 0], expected a list of num"),
    ("unet", "layers_per_block", [], "layers_per_block is [], expected one value for all levels"),
    ("unet", "_mezzotint", [1], "_mezzotint is [1], expected keys and values"),
    ("scheduler", "beta_schedule", {}, "beta_schedule is {}, expected a text"),
    ("scheduler", "timestep_spacing", "log", "unknown timestep_spacing 'log'; Choose from: lead"),
    ("scheduler", "num_train_timesteps", "x", "num_train_timesteps is 'x', expected a number"),
    ("scheduler", "_use_default_values", 5, "_use_default_values is 5, expected keys"),
    ("vae", "scaling_factor", "x", "scaling_factor is 'x', expected a number"),
    ("vae", "scaling_factor", [1], "scaling_factor is [1], expected a number"),
    ("vae", "scaling_factor", math.nan, "scaling_factor is nan, expected a number"),
    ("vae", "scaling_factor", 0, "scale_factor is 0, expected 1e-09 to 1e+09"),
    ("vae", "scaling_factor", -1.5, "scale_factor is -1.5, expected 1e-09 to 1e+09"),
    ("vae", "latents_mean", [{}], "latents_mean is [{}], expected a list of numbers"),
    ("vae", "latent_channels", 1 << 40, "latent_channels: Input should be less than or equal to"),
    ("text_encoder", "num_hidden_layers", 10**6, "num_hidden_layers: Input should be less than"),
    ("text_encoder", "text_config", [1], "text_config is [1], expected keys and values"),
]


@pytest.mark.parametrize(("part", "key", "value", "told"), WRONG_IN_FOLDERS)
def test_a_folder_is_refused_by_field(
    folder: Callable[[str], Path], part: str, key: str, value: Any, told: str
) -> None:
    name = f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    sentence = said(folder("clip"), name, **{key: value})
    assert sentence.startswith(str(folder("clip") / name)) and told in sentence
    assert "\n" not in sentence


def test_statistics_of_latents(folder: Callable[[str], Path]) -> None:
    root = folder("clip")
    name = "vae/config.json"
    assert said(root, name, latents_mean=[0, 0.5, 1], latents_std=[1, 2, 3]) == ""
    told = said(root, name, latents_mean=[0.0] * 3, latents_std=[1.0, 0.0, 2.0])
    assert "latents_std is [1.0, 0.0, 2.0], expected as many numbers as latents_mean" in told
    told = said(root, name, latents_mean=[0.0] * 2, latents_std=[1.0] * 2)
    assert "the statistics of latents have 2 channels, but the first stage has 3" in told


def test_keys_that_nothing_is_known_of_are_counted() -> None:
    keys = Keys({f"strange_{n}": n + 1 for n in range(1000)})
    keys.check_rest({})
    assert len(keys.problems) == 9 and keys.problems[-1].startswith("and 992 more keys")
    with pytest.raises(ConfigError) as caught:
        UNetConfig.from_dict({f"strange_{n}": 1 for n in range(1000)})
    assert str(caught.value).count("\n") == 21 and "and 980 more mistakes" in str(caught.value)
    assert len(short([["x" * 10**6] * 10**6])) < 500


def test_a_network_of_too_many_blocks() -> None:
    largest = {"block_out_channels": [32] * 16, "attention_levels": [True] * 16}
    with pytest.raises(ConfigError, match="make 4,128 blocks, expected at most 2,048"):
        UNetConfig.from_dict({**largest, "layers_per_block": 64})


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-12, 1e12])
def test_a_scale_factor_that_latents_cannot_have(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale_factor is .*, expected 1e-09 to 1e"):
        LatentNormalization.from_scale_factor(scale)


def keys_of(data: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*above, key))


def changed(data: dict[str, Any], value: Any, *keys: str) -> dict[str, Any]:
    found = copy.deepcopy(data)
    *parents, last = keys
    target = found
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    return found


# what only YAML can say: numbers that Python does not write out, and lists too long to go through
ODD_IN_YAML = [*ODD, 0, math.nan, {}, 16**5000, -(1 << 40), 1e300, [math.inf], [1] * 5000, {1: 2}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_yaml(name: str) -> None:
    path, refused = Path("a.yaml"), 0
    for keys in keys_of(PUBLISHED[name]):
        for value in ODD_IN_YAML:
            data = changed(PUBLISHED[name], value, *keys)
            refused += bool(tell(lambda d=data: parse_compvis_config(d, path), path))
    assert refused > 300


P, U = ("model", "params"), ("model", "params", "unet_config", "params")
D = ("model", "params", "first_stage_config", "params", "ddconfig")
WRONG_IN_YAML: list[tuple[tuple[str, ...], Any, str]] = [
    ((*U, "channel_mult"), [1, math.inf], "channel_mult: expected a list of numbers, got [1, inf]"),
    ((*D, "ch_mult"), [1, math.nan], "ch_mult: expected a list of numbers, got [1, nan]"),
    ((*D, "ch_mult"), [1, -2], "ch_mult: expected numbers above 0 up to 65,536, got [1, -2]"),
    ((*U, "channel_mult"), [1] * 65, "channel_mult: expected 64 numbers at most, got 65"),
    ((*P, "timesteps"), 16**5000, "timesteps: expected a number that is finite, got a number of"),
    ((*P, "scale_factor"), math.nan, "scale_factor: expected a number that is finite, got nan"),
    (("mezzotint",), {1: {}}, "mezzotint.1: expected the name of a part"),
]


@pytest.mark.parametrize(
    ("keys", "value", "told"), WRONG_IN_YAML, ids=[told[:30] for *_, told in WRONG_IN_YAML]
)
def test_a_yaml_is_refused_by_field(keys: tuple[str, ...], value: Any, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_compvis_config(changed(PUBLISHED["sd1"], value, *keys), Path("a.yaml"))
    assert told in str(caught.value)


def test_numbers_as_the_original_code_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    data = changed(PUBLISHED["sd1"], "START", *P, "linear_start")
    text = yaml.safe_dump(changed(data, "END", *P, "linear_end"))
    path.write_text(text.replace("START", "85e-5").replace("END", "1E-2"))
    schedule = read_compvis_config(path).schedule
    assert (schedule["beta_start"], schedule["beta_end"]) == (85e-5, 1e-2)
    path.write_text(text.replace("START", "'85e-5'").replace("END", "1"))
    with pytest.raises(CheckpointError, match=r"linear_start: expected int or float, got '85e-5'"):
        read_compvis_config(path)


def test_a_yaml_of_many_keys_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = yaml.safe_dump(PUBLISHED["sd1"]) + "mezzotint:\n"
    path.write_text(text + "".join(f"  k{n}: 1\n" for n in range(1 << 16)))
    with pytest.raises(CheckpointError, match=r"line \d+: refused: more than 131,072 values"):
        read_compvis_config(path)
    params = {f"k{n}": [1] for n in range(10_000)}
    data = changed(PUBLISHED["sd1"], PUBLISHED["sd1"]["model"]["params"] | params, *P)
    with pytest.raises(CheckpointError) as caught:
        parse_compvis_config(data, path)
    assert str(caught.value).count("unknown key '") == 8
    assert "and 9992 more unknown keys in model.params" in str(caught.value)


def test_what_forks_train_on_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(build("ldm-unconditional"), path)
    beside = path.with_suffix(".yaml")
    manager = {
        "target": "ldm.modules.embedding_manager.EmbeddingManager",
        "params": {"placeholder_strings": ["*"], "initializer_words": ["sculpture"]},
    }
    data = changed(yaml.safe_load(beside.read_text()), manager, *P, "personalization_config")
    data = changed(data, 0.0, *P, "embedding_reg_weight")
    beside.write_text(yaml.safe_dump(changed(data, "softmax-xformers", *U, "spatial_type")))
    assert load_any(path).notes == (
        "model.yaml says what Mezzotint does not know and left out:"
        " model.params.unet_config.params.spatial_type, model.params.personalization_config",
    )
    # what is nearly a known key is a known key wrongly written
    beside.write_text(yaml.safe_dump(changed(data, 8, *U, "num_headz")))
    with pytest.raises(CheckpointError, match="'num_heads'"):
        load_any(path)


def test_deviation_that_the_file_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build("ldm-unconditional-kl")  # whose scale of 0.5 lies among its tensors
    save_single_file(model, path)
    beside = path.with_suffix(".yaml")
    by_std = changed(yaml.safe_load(beside.read_text()), True, *P, "scale_by_std")
    del by_std["model"]["params"]["scale_factor"]
    beside.write_text(yaml.safe_dump(by_std))
    assert load_any(path).model.normalization.scale_factor == 0.5
    rewrite(path, without="scale_factor")
    for read in (lambda: load_any(path), lambda: require(inspect_model(path).problems)):
        with pytest.raises(CheckpointError, match="says scale_by_std, but it holds no tensor scal"):
            read()
    beside.write_text(yaml.safe_dump(changed(by_std, 0.25, *P, "scale_factor")))
    assert load_any(path).model.normalization.scale_factor == 0.25


def require(problems: tuple[str, ...]) -> None:
    """Raise what an inspection tells."""
    if problems:
        raise CheckpointError("; ".join(problems))


def rewrite(path: Path, *, without: str = "", **metadata: str) -> None:
    """Write a file again with other metadata, or without a tensor."""
    state = {name: t for name, t in open_tensors(path).read().items() if name != without}
    entries = [(n, t.dtype, tuple(t.shape), t.clone) for n, t in state.items()]
    write_safetensors(path, entries, {k.replace("_", "."): v for k, v in metadata.items()})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(build("ldm-class"), path)
    return path


CLAIMS: list[tuple[tuple[str, ...], Any, str]] = [
    ((*U, "model_channels"), 65536, "unet: block_out_channels.1: Input should be less than or eq"),
    ((*U, "model_channels"), 32768, "unet.block_out_channels is [32768, 65536], but its tensors"),
    ((*U, "num_res_blocks"), 64, "unet.layers_per_block is 64, but its tensors have 1"),
    ((*U, "transformer_depth"), 64, "unet.transformer_layers_per_block is 64, but its tensors"),
    ((*D, "ch"), 16384, "first_stage.block_out_channels is [16384, 32768, 32768], but its tensors"),
    ((*D, "z_channels"), 65536, "first_stage.latent_channels is 65536, but its tensors have 3"),
    ((*P, "image_size"), 1 << 30, "image_size is [4294967296, 4294967296], expected height and"),
    (("mezzotint", "main", "kind"), "clip", "mezzotint.main.kind is 'clip', expected 'class'"),
    (("mezzotint", "main", "kind"), [1], "mezzotint.main.kind is [1], expected 'class'"),
    (("mezzotint", "first_stage", "kind"), {}, "first_stage.kind is {}, expected 'vq'"),
    (("mezzotint", "image_size"), [64], "image_size is [64], expected height and width"),
    (("mezzotint", "image_size"), "64x64", "image_size is '64x64', expected height and width"),
]


@pytest.mark.parametrize(("keys", "value", "told"), CLAIMS)
def test_what_a_yaml_claims_is_held_against_the_tensors(
    single: Path, keys: tuple[str, ...], value: Any, told: str
) -> None:
    beside = single.with_suffix(".yaml")
    before = beside.read_text()
    beside.write_text(yaml.safe_dump(changed(yaml.safe_load(before), value, *keys)))
    built: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_module_registration_hook(
        lambda module, _, child: built.append(module)
    )
    try:
        sentence = tell(lambda: load_any(single), single.parent)
    finally:
        handle.remove()
        beside.write_text(before)
    assert told in sentence and len(built) < 1000
    assert tell(lambda: load_any(single), single) == ""


@pytest.mark.parametrize("size", ["99999x0", "0x64", "99999x99999"])
def test_metadata_of_no_size(single: Path, tmp_path: Path, size: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(single.read_bytes())
    rewrite(path, modelspec_resolution=size)
    for read in (load_any, inspect_model):
        told = tell(lambda read=read: read(path), path)
        assert told.startswith(f"{path}: by its metadata, image_size is [") and "\n" not in told
