"""Single files of every family: what is written is read back equal, and what is there is used."""

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import NAMES, build, kl, liven, unet, vq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mezzotint.checkpoints.compvis import first_stage_map, unet_map
from mezzotint.checkpoints.single_file import load_single_file, save_single_file
from mezzotint.conditioning.base import Unconditional
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.safetensors_file import write_safetensors
from mezzotint.storage.tensors import open_tensors


@pytest.fixture(scope="module")
def models() -> Mapping[str, LatentDiffusion]:
    return {name: build(name) for name in NAMES}


def is_same(found: LatentDiffusion, expected: LatentDiffusion) -> bool:
    """Whether weights, types, settings, schedule and size are equal."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    equal = all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())
    settings = found.weights_hash() == expected.weights_hash()
    return equal and settings and found.image_size == expected.image_size


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_with_its_yaml_and_without(
    models: Mapping[str, LatentDiffusion], tmp_path: Path, name: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    assert save_single_file(models[name], path) == []
    loaded = load_single_file(path, dtype=None)
    assert is_same(loaded.model, models[name]) and not loaded.notes
    assert not loaded.model.training
    if suffix == ".ckpt":
        return
    path.with_suffix(".yaml").unlink()
    alone = load_single_file(path, dtype=None)
    assert is_same(alone.model, models[name])
    assert loaded.files == alone.files == (path,)  # the YAML says nothing new
    family = name.removesuffix("-kl")
    assert alone.notes[0].startswith(f"read as {family} (") and len(alone.notes) == 2
    assert alone.defaults.sampler == "ddim"


def test_precision(models: Mapping[str, LatentDiffusion], tmp_path: Path) -> None:
    model = models["ldm-unconditional"]
    path = tmp_path / "half.safetensors"
    save_single_file(model, path, dtype=torch.float16)
    assert {info.dtype for info in open_tensors(path).values()} == {torch.float16}
    kept = load_single_file(path, dtype=None).model.unet.state_dict()
    wide = load_single_file(path, dtype=torch.float32).model.unet.state_dict()
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(kept[name], tensor.half())
        assert torch.equal(wide[name], tensor.half().float())


def odd() -> LatentDiffusion:
    """What no file of the original code can say: groups, schedule, size, names."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (16, 40), "norm_num_groups": 8}
    stage = AutoencoderKLConfig(
        **{"block_out_channels": (16, 24), "norm_num_groups": 8, "latent_channels": 6},
        **{"attention_levels": (True, False), "mid_attention": False},
    )
    network = UNetConfig.from_dict(
        {
            **widths,
            **{"in_channels": 6, "out_channels": 6, "attention_levels": (False, True)},
            **{"cross_attention_dim": 12, "num_attention_heads": 2, "downsample_padding": 0},
            **{"norm_eps": 1e-6, "flip_sin_to_cos": False, "sample_size": None},
        }
    )
    names = ClassConditionerConfig(width=12, class_names=("cat", "dog"))
    schedule = ScheduleConfig(
        **{"beta_schedule": "cosine", "num_train_timesteps": 500},
        **{"prediction_type": "v_prediction", "zero_terminal_snr": True},
    )
    model = LatentDiffusion(
        AutoencoderKL(stage),
        UNet(network),
        ClassConditioner(names),
        schedule,
        LatentNormalization.from_scale_factor(0.7310585786),
        (24, 40),
    )
    liven(model)
    return model.eval()


def test_what_the_layout_cannot_say_stands_in_the_yaml(tmp_path: Path) -> None:
    model, path = odd(), tmp_path / "odd.safetensors"
    (told,) = save_single_file(model, path)
    assert told.startswith("odd.yaml says under 'mezzotint' what other software does not read: ")
    for name in ("unet.norm_num_groups", "unet.norm_eps", "main.class_names", "image_size"):
        assert name in told
    loaded = load_single_file(path, dtype=None)
    assert is_same(loaded.model, model)
    assert loaded.files == (path, path.with_suffix(".yaml"))  # both decide what is drawn
    elsewhere = path.with_suffix(".yaml").rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(CheckpointError, match="norm_num_groups 32 does not divide the 16 channels"):
        load_single_file(path, dtype=None)
    assert is_same(load_single_file(path, dtype=None, config=elsewhere).model, model)
    data = yaml.safe_load(elsewhere.read_text())
    data["mezzotint"]["unet"]["norm_groups"] = 3
    elsewhere.write_text(yaml.safe_dump(data))
    with pytest.raises(CheckpointError, match="unknown key 'norm_groups'; did you mean"):
        load_single_file(path, dtype=None, config=elsewhere)
    data["mezzotint"] = {"unets": {}}
    elsewhere.write_text(yaml.safe_dump(data))
    with pytest.raises(
        CheckpointError, match="mezzotint: unknown key 'unets'; did you mean 'unet'"
    ):
        load_single_file(path, dtype=None, config=elsewhere)


def test_pixels_without_a_first_stage(tmp_path: Path) -> None:
    path = tmp_path / "pixels.safetensors"
    model = LatentDiffusion(
        IdentityFirstStage(IdentityFirstStageConfig()),
        unet(in_channels=3, out_channels=3, sample_size=32),
        Unconditional(),
        ScheduleConfig(steps_offset=1, set_alpha_to_one=False),
        LatentNormalization.from_scale_factor(1.0),
        (32, 32),
    )
    assert save_single_file(model, path) == []
    assert is_same(load_single_file(path, dtype=None).model, model)


def test_statistics_per_channel_are_folded(tmp_path: Path) -> None:
    model, path = build("ldm-unconditional-kl"), tmp_path / "model.safetensors"
    mean, std = torch.tensor([0.3, -1.0, 2.0, 0.0]), torch.tensor([0.5, 3.0, 1.5, 1.0])
    with torch.no_grad():
        for parameter in model.first_stage.parameters():
            parameter.mul_(0.1)
    model.normalization = LatentNormalization(mean, std)
    told = save_single_file(model, path)
    assert told == ["the latents' statistics per channel were folded into the first stage"]
    found = load_single_file(path, dtype=None).model
    assert found.normalization.scale_factor == 1.0
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        # float32: the products that were folded round otherwise, and 1e-5 is 100 units of that
        torch.testing.assert_close(found.encode(x), model.encode(x), rtol=1e-5, atol=1e-5)
    model.first_stage = vq()
    with pytest.raises(CheckpointError, match="no place for statistics per channel of a VQModel"):
        save_single_file(model, path)


def lightning(path: Path, **beside: Any) -> None:
    """Turn a file into what training leaves: averages, optimizer, callbacks, schedule."""
    state = dict(open_tensors(path).read())
    for name in [n for n in state if n.startswith("model.diffusion_model.")]:
        average = name.removeprefix("model.").replace(".", "")
        state[f"model_ema.{average}"] = state[name] * 2
    state |= {"model_ema.decay": torch.tensor(0.9999), "betas": torch.rand(1000)}
    whole = {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(4)}}, "param_groups": []}],
        "lr_schedulers": [{"last_epoch": 3}],
    }
    torch.save(whole | beside, path)


def test_a_file_of_lightning_with_averages(
    models: Mapping[str, LatentDiffusion], tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    save_single_file(models["ldm-class"], path)
    with pytest.raises(CheckpointError, match=r"no averaged weights \(model_ema\.…\)"):
        load_single_file(path, dtype=None, weights="ema")
    lightning(path)
    expected = models["ldm-class"].unet.state_dict()
    for choice, factor in (("auto", 2), ("ema", 2), ("raw", 1)):
        loaded = load_single_file(path, dtype=None, weights=choice)  # type: ignore[arg-type]
        found = loaded.model.unet.state_dict()
        assert all(torch.equal(found[name], factor * t) for name, t in expected.items()), choice
        assert "averaged weights" in loaded.notes[-1] or choice == "raw"


def test_names_that_only_some_files_have(
    models: Mapping[str, LatentDiffusion], tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    save_single_file(models["sd1"], path)
    state = open_tensors(path).read()
    short = {
        name.replace("transformer.text_model.", "transformer."): t for name, t in state.items()
    }
    short["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"state_dict": short}, path)
    assert is_same(load_single_file(path, dtype=None).model, models["sd1"])
    path.with_suffix(".yaml").unlink()
    assert is_same(load_single_file(path, dtype=None).model, models["sd1"])
    # an inpainting model is saved with its first stage as the conditioner too
    save_single_file(models["ldm-inpainting"], path)
    state = open_tensors(path).read()
    twice = {n.replace("first_stage", "cond_stage"): t for n, t in state.items()}
    torch.save({"state_dict": twice | state}, path)
    assert is_same(load_single_file(path, dtype=None).model, models["ldm-inpainting"])


def test_what_is_refused(models: Mapping[str, LatentDiffusion], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = models["ldm-unconditional"]
    with pytest.raises(
        CheckpointError, match=r"a single file is named \*\.safetensors or \*\.ckpt"
    ):
        save_single_file(model, tmp_path / "model.bin")
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    config = TextConditionerConfig(width=64, layers=1, heads=2, max_length=8, vocab_size=64)
    ours = LatentDiffusion(
        kl(),
        unet(cross_attention_dim=64),
        TextConditioner(config, tokenizer),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (64, 64),
    )
    with pytest.raises(CheckpointError, match="no place for this model's TextConditioner"):
        save_single_file(ours, path)
    assert list(tmp_path.iterdir()) == []
    save_single_file(model, path)
    beside = path.with_suffix(".yaml")
    beside.write_text(beside.read_text().replace("model_channels: 32", "model_channels: 64"))
    with pytest.raises(CheckpointError) as caught:
        load_single_file(path, dtype=None)
    assert str(caught.value).endswith(
        "cannot be loaded as ldm-unconditional (its YAML, model.yaml, says so):"
        " unet.block_out_channels is [64, 128], but its tensors have [32, 64]"
    )
    with pytest.raises(CheckpointError, match=r"other\.yaml: no such file"):
        load_single_file(path, dtype=None, config=tmp_path / "other.yaml")
    with pytest.raises(CheckpointError, match=r"missing\.ckpt: no such file"):
        load_single_file(tmp_path / "missing.ckpt", dtype=None)


MEASURE = """
import sys
from pathlib import Path
import torch
from mezzotint.checkpoints.single_file import load_single_file
def status(key):  # in bytes; the usual ru_maxrss begins with the peak of whoever started us
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
load_single_file(Path(sys.argv[1]), dtype=torch.bfloat16)  # what is imported at first use
before = status("VmRSS")
model = load_single_file(Path(sys.argv[2]), dtype=torch.bfloat16).model
peak = status("VmHWM")
weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(weights, peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory(models: Mapping[str, LatentDiffusion], tmp_path: Path) -> None:
    """Neither the file's pages nor a second copy in another precision stands in memory."""
    widths = {"block_out_channels": (128, 256, 512), "attention_levels": (False, True, True)}
    config = UNetConfig.from_dict(
        {"in_channels": 3, "out_channels": 3, "cross_attention_dim": None, **widths}
        | {"num_attention_heads": None, "attention_head_dim": 32}
    )
    with torch.device("meta"):
        maps = {
            "model.diffusion_model.": unet_map(UNet(config)),
            "first_stage_model.": first_stage_map(VQModel(VQModelConfig())),
        }
    path = tmp_path / "large.safetensors"
    entries = [
        (prefix + rule.theirs, torch.float16, tuple(rule.theirs_shape))
        for prefix, mapping in maps.items()
        for rule in mapping.rules
    ]
    write_safetensors(
        path,
        [(n, k, shape, lambda k=k, s=shape: torch.zeros(s, dtype=k)) for n, k, shape in entries],
        {},
    )
    small = tmp_path / "small.safetensors"
    save_single_file(models["ldm-unconditional"], small)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights, used = map(int, done.stdout.split())
    assert weights >= 2 * sum(math.prod(shape) for *_, shape in entries) > 150 << 20
    assert used <= 1.25 * weights
