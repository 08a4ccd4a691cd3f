"""Files that have nothing of the UNet but its averages."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import NAMES, build

from mezzotint.checkpoints.averages import average_of, with_averages_alone
from mezzotint.checkpoints.compvis import unet_map
from mezzotint.checkpoints.inspect import inspect_model
from mezzotint.checkpoints.single_file import load_single_file, save_single_file
from mezzotint.errors import CheckpointError
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.tensors import open_tensors

UNET = "model.diffusion_model."


def averages_alone(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a file of a family without the UNet's own weights; returns those."""
    save_single_file(build(name), path)
    path.with_suffix(".yaml").unlink()
    state = open_tensors(path).read()
    own = {key: state.pop(key) for key in [*state] if key.startswith(UNET)}
    averages = {average_of(key): tensor for key, tensor in own.items()}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    torch.save({"state_dict": state | averages | counts, "global_step": 7}, path)
    return own


@pytest.mark.parametrize("name", NAMES)
def test_the_dots_are_put_back(tmp_path: Path, name: str) -> None:
    own = averages_alone(tmp_path / "a.ckpt", name)
    tensors, alone = with_averages_alone(open_tensors(tmp_path / "a.ckpt"))
    assert alone and {key for key in tensors if key.startswith(UNET)} == own.keys()


def test_the_dots_of_a_network_as_deep_as_the_published_ones(tmp_path: Path) -> None:
    widths = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 3}
    told = {"cross_attention_dim": 16, "transformer_layers_per_block": 12, "vector_dim": 8}
    with torch.device("meta"):
        network = UNet(UNetConfig.from_dict({**widths, **told, "norm_num_groups": 16}))
    names = [UNET + rule.theirs for rule in unet_map(network).rules]
    assert any("input_blocks.15." in name for name in names)
    assert any("transformer_blocks.11." in name for name in names)
    path = tmp_path / "a.pt"
    torch.save({average_of(name): torch.zeros(1) for name in names}, path)
    tensors, alone = with_averages_alone(open_tensors(path))
    assert alone and list(tensors) == names


def test_a_file_of_averages_alone_is_loaded_by_them(tmp_path: Path) -> None:
    path = tmp_path / "ema.ckpt"
    averages_alone(path, "sd1")
    expected = build("sd1").unet.state_dict()
    for choice in ("auto", "ema"):
        loaded = load_single_file(path, dtype=None, weights=choice)
        found = loaded.model.unet.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert "averaged weights of the UNet alone, and they were taken" in loaded.notes[-1]
    with pytest.raises(CheckpointError, match="alone .* none of its own; say --weights ema, or au"):
        load_single_file(path, dtype=None, weights="raw")
    told = inspect_model(path)
    assert told.averages_alone and told.averaged and told.family == "sd1"
    assert (told.problems, told.missing, told.unexpected) == ((), (), ())


def test_averages_that_are_not_all_there(tmp_path: Path) -> None:
    path = tmp_path / "ema.ckpt"
    averages_alone(path, "sd1")
    state = open_tensors(path).read()
    del state[average_of(f"{UNET}out.2.bias")]
    torch.save(state, path)
    assert inspect_model(path).missing == (f"{UNET}out.2.bias",)
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.diffusion_model.out.2.bias"):
        load_single_file(path, dtype=None)


@pytest.mark.parametrize("damage", ["missing", "shape", "integers"])
def test_averages_that_do_not_fit_are_passed_by_unless_asked_for(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "a.ckpt"
    model = build("ldm-unconditional")
    save_single_file(model, path)
    state = open_tensors(path).read()
    own = {key: tensor for key, tensor in state.items() if key.startswith(UNET)}
    averages = {average_of(key): tensor + 1.0 for key, tensor in own.items()}
    first = next(iter(averages))
    if damage == "missing":
        del averages[first]
    else:
        averages[first] = torch.zeros(3) if damage == "shape" else averages[first].int()
    torch.save(state | averages, path)
    loaded = load_single_file(path, dtype=None)
    expected = model.unet.state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in loaded.model.unet.state_dict().items())
    assert any("own weights were taken, as not all averages are there" in n for n in loaded.notes)
    with pytest.raises(CheckpointError, match=r"1 of \d+ averaged weights are missing or do not"):
        load_single_file(path, dtype=None, weights="ema")
    assert inspect_model(path).problems == ()


@pytest.mark.parametrize(
    ("marked", "words"),
    [
        (torch.ones(3), r"its tensor scale_factor is \(3,\), expected one number"),
        (None, "scale_factor is -1.0, expected 1e-09 to 1e"),
    ],
)
def test_scales_that_cannot_be_are_told_before_loading(
    tmp_path: Path, marked: torch.Tensor | None, words: str
) -> None:
    path = tmp_path / "a.ckpt"
    save_single_file(build("ldm-unconditional"), path)
    state = open_tensors(path).read()
    if marked is not None:
        torch.save(state | {"scale_factor": marked}, path)
    else:
        told = path.with_suffix(".yaml")
        data = yaml.safe_load(told.read_text())
        data["model"]["params"]["scale_factor"] = -1.0
        told.write_text(yaml.safe_dump(data))
        torch.save({k: v for k, v in state.items() if k != "scale_factor"}, path)
    (problem,) = inspect_model(path).problems
    assert re.search(words, problem)
    with pytest.raises(CheckpointError, match=words):
        load_single_file(path, dtype=None)
