"""Averages that were never tracked, from snapshots of some that were."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.model import load_model
from mezzotint.cli import main as cli
from mezzotint.errors import CheckpointError, ConfigError, TrainingError
from mezzotint.generation.pipeline import load
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.ema import ExponentialMovingAverage, PowerEMAConfig
from mezzotint.training.posthoc_ema import average_run, plan_average, synthesize
from mezzotint.training.power_function import Profile, expected_error, gamma_of, solve_weights
from mezzotint.training.snapshots import read_snapshots, save_if_due

UNCONDITIONAL = {"conditioning": {"kind": "none"}, "unet__cross_attention_dim": None}
POWER = {"kind": "power", "snapshot_steps": 2, "snapshot_precision": "float32"}
NEVER_TRACKED = (0.03, 0.075, 0.15, 0.2)


class Walk:
    """A network that wanders at random around weights of order 1, as a trained one does."""

    def __init__(self, folder: Path, config: PowerEMAConfig, *others: float) -> None:
        self.folder = folder / "ema"
        self.generator = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 20))
        for p in self.module.parameters():
            nn.init.normal_(p, generator=self.generator)
        self.ema = ExponentialMovingAverage(self.module, config)
        self.tracked = {
            length: ExponentialMovingAverage(self.module, PowerEMAConfig(sigma_rel=(length,)))
            for length in others
        }

    def on(self, steps: int) -> "Walk":
        for _ in range(steps):
            with torch.no_grad():
                for p in self.module.parameters():
                    p.add_(0.01 * torch.randn(p.shape, generator=self.generator))
            self.ema.update()
            for ema in self.tracked.values():
                ema.update()
            save_if_due(self.ema, self.folder)
        return self

    @torch.no_grad()
    def error(self, length: float, step: int | None = None) -> float:
        """How far from the tracked average its synthesis is, as a share of the way to the end."""
        plan = plan_average(self.folder.parent, sigma_rel=length, at_step=step)
        made = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 20))
        synthesize(plan, made)
        tracked = self.tracked[length].average
        apart = sum((p - tracked[n]).square().sum() for n, p in made.named_parameters())
        way = sum((p - tracked[n]).square().sum() for n, p in self.module.named_parameters())
        return float(apart / way) ** 0.5


TAU = (np.arange(100_000) + 0.5) / 100  # until 1000, finely


def density(profile: Profile) -> np.ndarray:
    gamma = gamma_of(profile.sigma_rel)
    inside = (gamma + 1) / profile.step * (TAU / profile.step) ** gamma
    return np.where(profile.step >= TAU, inside, 0.0)


def test_the_error_in_a_random_walk_is_an_integral():
    profiles = [Profile(700, 0.05), Profile(1000, 0.10), Profile(900, 0.25)]
    wanted, weights = Profile(950, 0.15), np.array([0.2, 0.5, 0.3])
    summed = [density(profile).cumsum() / 100 for profile in (*profiles, wanted)]
    apart = sum(w * p for w, p in zip((*weights, -1.0), summed, strict=True))
    way = summed[-1][TAU <= 950]
    expected = np.sqrt((apart**2).sum() / (way**2).sum())
    assert expected_error(profiles, wanted, weights) == pytest.approx(expected, rel=1e-3)


def test_a_tracked_profile_is_itself():
    profiles = [Profile(t, length) for t in (100, 200, 300) for length in (0.05, 0.10)]
    for k, profile in enumerate(profiles):
        weights = solve_weights(profiles, profile)
        np.testing.assert_allclose(weights, np.eye(6)[k], atol=1e-9)


def test_no_weights_that_add_up_to_one_are_nearer():
    profiles = [Profile(t, length) for t in (300, 600, 900) for length in (0.05, 0.10)]
    wanted = Profile(850, 0.2)
    weights = solve_weights(profiles, wanted)
    assert weights.sum() == pytest.approx(1.0)
    densities, goal = np.stack([density(p) for p in profiles]), density(wanted)

    def apart(weights: np.ndarray) -> float:
        return float(((weights @ densities - goal) ** 2).mean() / (goal**2).mean())

    best, rng = apart(weights), np.random.default_rng(0)
    assert 0.01 < best < 0.5
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            change = size * rng.normal(size=6)
            assert apart(weights + change - change.mean()) > best


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_averages_that_were_never_tracked_are_found_again(tmp_path, precision):
    config = PowerEMAConfig(snapshot_steps=50, snapshot_precision=precision)
    walk = Walk(tmp_path, config, *NEVER_TRACKED).on(1000)
    files = sorted((tmp_path / "ema").iterdir())
    assert len(files) == 20  # all are kept
    numbers = 2 * sum(p.numel() for p in walk.module.parameters())
    size = numbers * (2 if precision == "float16" else 4)
    assert all(size < path.stat().st_size < size + 2000 for path in files)
    for length in NEVER_TRACKED:
        error, told = walk.error(length), plan_average(tmp_path, sigma_rel=length).error
        if precision == "float32":
            # what is told is the mean of all walks; 1,640 weights walk here
            assert error == pytest.approx(told, rel=0.1) and error < 0.01
        else:
            # and rounds weights of order 1, which moved by 0.05 to 0.2 within an average
            assert error < 0.03


def test_an_average_may_end_between_snapshots(tmp_path):
    """The one after has what is missing in those before."""
    walk = Walk(tmp_path, PowerEMAConfig(snapshot_steps=20), 0.075, 0.15).on(390)
    tracked = copy.deepcopy(walk.tracked)
    walk.on(20)
    walk.tracked = tracked
    plan = plan_average(tmp_path, sigma_rel=0.15, at_step=390)
    assert [s.step for s in plan.snapshots] == list(range(20, 401, 20))
    for length in (0.075, 0.15):
        assert 0 < walk.error(length, 390) < 0.1


def test_what_stands_still_is_left_alone(tmp_path):
    """However badly a profile is met: weights that add up to 1 leave a constant what it is."""
    module = nn.Linear(3, 3)
    config = PowerEMAConfig(snapshot_steps=10, snapshot_precision="float32")
    ema = ExponentialMovingAverage(module, config)
    for _ in range(30):
        ema.update()
        save_if_due(ema, tmp_path / "ema")
    made = nn.Linear(3, 3)
    synthesize(plan_average(tmp_path, sigma_rel=0.13), made)
    torch.testing.assert_close(made.weight, module.weight, rtol=1e-6, atol=1e-7)


def test_rows_that_were_overwritten_are_not_mixed_with_what_they_were(tmp_path):
    module = nn.Embedding(4, 3)
    nn.init.ones_(module.weight)
    ema = ExponentialMovingAverage(module, PowerEMAConfig(snapshot_steps=10))
    for step in range(1, 101):
        ema.update()
        if step == 75:
            with torch.no_grad():
                module.weight[1] = 1000.0
            ema.overwrite("weight", torch.tensor([False, True, False, False]))
        save_if_due(ema, tmp_path / "ema")
    made = nn.Embedding(4, 3)
    synthesize(plan_average(tmp_path, sigma_rel=0.15), made)
    torch.testing.assert_close(made.weight, module.weight)


def test_so_short_an_average_that_rounding_counts_is_told(tmp_path):
    Walk(tmp_path, PowerEMAConfig(snapshot_steps=10)).on(400)
    notes = plan_average(tmp_path, sigma_rel=0.02).notes
    assert len(notes) == 2 and "magnifies the rounding of float16" in notes[1]
    assert len(plan_average(tmp_path, sigma_rel=0.075).notes) == 1


def test_beyond_float16_is_stored_in_float32(tmp_path):
    walk = Walk(tmp_path, PowerEMAConfig(snapshot_steps=1))
    with torch.no_grad():
        walk.module[0].weight[0, 0] = 1e6
    walk.on(1)
    stored = load_file(tmp_path / "ema" / "step-1.safetensors")
    assert stored["0/0.weight"].dtype == torch.float32 and stored["0/0.weight"].max() > 9e5
    assert stored["0/1.weight"].dtype == torch.float16


def test_what_is_no_number_is_not_stored(tmp_path):
    walk = Walk(tmp_path, PowerEMAConfig(snapshot_steps=1)).on(2)
    with torch.no_grad():
        walk.module[0].weight[0, 0] = float("nan")
    walk.on(1)
    assert [s.step for s in read_snapshots(tmp_path / "ema")] == [1, 2]


def test_a_training_taken_up_again_drops_what_lies_ahead(tmp_path):
    walk = Walk(tmp_path, PowerEMAConfig(snapshot_steps=10)).on(20)
    state = {name: tensor.clone() for name, tensor in walk.ema.state_dict().items()}
    walk.on(20)
    walk.ema.load_state_dict(state)
    assert [s.step for s in read_snapshots(walk.folder)] == [10, 20, 30, 40]
    (walk.folder / ".step-30.safetensors.1234abcd").write_bytes(b"killed while it was written")
    walk.on(10)
    assert sorted(p.name for p in walk.folder.iterdir()) == [
        f"step-{n}.safetensors" for n in (10, 20, 30)
    ]


def test_a_snapshot_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "ema" / "step-1.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(TrainingError, match="step-1.*cannot be written.*go on with --resume"):
        Walk(tmp_path, PowerEMAConfig(snapshot_steps=1)).on(1)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walked")
    Walk(folder, PowerEMAConfig(snapshot_steps=20)).on(400)
    return folder


@pytest.mark.parametrize(
    ("sigma_rel", "at_step", "told"),
    [
        (0.3, None, "sigma_rel 0.3: expected 0.001 to 0.2887"),
        (0.0, None, "sigma_rel 0: expected"),
        (float("nan"), None, "sigma_rel nan: expected"),
        (0.1, 401, "step 401: the snapshots of .* are of steps 20 to 400"),
        (0.1, 19, "step 19: the snapshots"),
    ],
)
def test_what_is_out_of_range_is_told(walked, sigma_rel, at_step, told):
    with pytest.raises(ConfigError, match=told):
        plan_average(walked, sigma_rel=sigma_rel, at_step=at_step)


def test_too_few_snapshots_are_told(walked):
    told = "from the 2 snapshots up to it: it would be off by .*% of its way to the weights"
    hint = "Ask for a length nearer to 0.05, 0.1, or for step 20 or 40"
    with pytest.raises(TrainingError, match=f"{told}. {hint}"):
        plan_average(walked, sigma_rel=0.2, at_step=30)


def copied(walked: Path, folder: Path) -> Path:
    (folder / "ema").mkdir()
    for path in (walked / "ema").iterdir():
        (folder / "ema" / path.name).write_bytes(path.read_bytes())
    return folder / "ema" / "step-360.safetensors"


@pytest.mark.parametrize("damage", ["flip", "truncate", "metadata", "length", "network", "newer"])
def test_a_damaged_snapshot_is_named(walked, tmp_path, damage):
    file = copied(walked, tmp_path)
    data = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    match damage:
        case "flip":
            data[-1] ^= 1
            file.write_bytes(data)
            told = "the checksum does not match"
        case "truncate":
            file.write_bytes(data[: len(data) // 2])
            told = "damaged"
        case "metadata":
            save_file(tensors, file)
            told = "is no snapshot of averages"
        case "length":
            save_file(tensors, file, {**metadata, "sigma_rel": json.dumps([0.05, 0.2])})
            told = "the checksum does not match"
        case "network":
            tensors["0/0.bias"] = torch.zeros(3)
            save_file(tensors, file, metadata)
            told = "is of another network than step-20.safetensors, which differs in 0.bias"
        case _:
            save_file(tensors, file, {**metadata, "format_version": "2"})
            told = "written by a newer Mezzotint"
    made = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 20))
    before = made[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=told) as error:
        synthesize(plan_average(tmp_path, sigma_rel=0.1), made)
    assert str(file) in str(error.value)
    assert torch.equal(made[0].weight, before)
    file.unlink()
    synthesize(plan_average(tmp_path, sigma_rel=0.1), made)  # without it, it goes on


def test_another_network_is_refused(walked):
    plan = plan_average(walked, sigma_rel=0.1)
    with pytest.raises(CheckpointError, match=r"holds 0.weight \(40, 20\), which its network has"):
        synthesize(plan, nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 20)))


@pytest.fixture(scope="module")
def power_run(tiny, tmp_path_factory):
    """Six steps with both profiles, whose snapshots are exact."""
    recipe = tiny.diffusion(**UNCONDITIONAL, ema=POWER, budget={"max_steps": 6})
    return tiny.train(recipe, tmp_path_factory.mktemp("power") / "run")


def test_resumed_equals_uninterrupted(tiny, power_run, tmp_path):
    recipe = {**UNCONDITIONAL, "ema": POWER}
    part = tiny.train(tiny.diffusion(**recipe, budget={"max_steps": 3}), tmp_path / "part")
    # training's end has a snapshot too, which no multiple of snapshot_steps has to be
    assert [s.step for s in read_snapshots(part / "ema")] == [2, 3]
    tiny.train(tiny.diffusion(**recipe, budget={"max_steps": 6}), part, resume=True)
    a, _ = newest_checkpoint(power_run / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None
    assert sum(name.startswith("1/unet.") for name in a.tensors["ema"]) > 50
    for name, tensor in a.tensors["ema"].items():
        assert torch.equal(tensor, b.tensors["ema"][name]), name
    names = [f"step-{n}.safetensors" for n in (2, 4, 6)]
    assert sorted(p.name for p in (power_run / "ema").iterdir()) == names
    for name in names:
        assert (power_run / "ema" / name).read_bytes() == (part / "ema" / name).read_bytes()


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command_writes_a_model_that_draws(power_run, tmp_path, monkeypatch, capsys):
    checkpoint, _ = newest_checkpoint(power_run / "checkpoints")
    assert checkpoint is not None
    for k, length in enumerate((0.05, 0.10)):
        folder = tmp_path / f"average-{length}"
        asked = ("average", power_run, "--sigma-rel", length, "-o", folder)
        assert command(monkeypatch, *asked) == 0
        out, err = capsys.readouterr()
        assert out == f"{folder}\n"
        assert f"note: sigma_rel {length:g} at step 6, from 3 snapshots" in err
        # the lengths that were tracked are what the checkpoint holds
        for name, parameter in load_model(folder).unet.named_parameters():
            expected = checkpoint.tensors["ema"][f"{k}/unet.{name}" if k else f"unet.{name}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    exported, other = load(power_run), load(tmp_path / "average-0.1")
    for name, parameter in load(tmp_path / "average-0.05").model.unet.named_parameters():
        expected = exported.model.unet.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert other.model_hash != exported.model_hash
    folder = tmp_path / "between"
    asked = ("average", power_run, "--sigma-rel", 0.075, "--at-step", 4, "-o", folder)
    assert command(monkeypatch, *asked) == 0
    drawn = tmp_path / "drawn.png"
    assert command(monkeypatch, "sample", folder, "--steps", 2, "-o", drawn) == 0
    assert drawn.is_file()
    assert not list(tmp_path.glob(".*"))


def test_the_command_says_what_is_wrong(power_run, tiny, text_run, tmp_path, monkeypatch, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text((power_run / "recipe.yaml").read_text())
    (unfinished / "ema").symlink_to(power_run / "ema")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for run, length, output, told in (
        (tmp_path / "none", 0.1, "new", "holds no run; expected a folder that mezzotint train"),
        (text_run, 0.1, "new", "ema: no snapshots; they are written while a recipe is trained"),
        (power_run, 0.5, "new", "sigma_rel 0.5: expected 0.001 to 0.2887"),
        (power_run, 0.1, "full", "is there already; choose another --output"),
        (unfinished, 0.1, "new", "this run is not finished; end it with mezzotint train"),
    ):
        asked = ("average", run, "--sigma-rel", length, "-o", tmp_path / output)
        assert command(monkeypatch, *asked) == 2
        errors = capsys.readouterr().err
        assert told in errors and errors.count("\n") == 1
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_an_autoencoders_latents_are_measured_anew(tiny, tmp_path):
    recipe = tiny.autoencoder(
        ema={**POWER, "sigma_rel": [0.05, 0.1]}, normalization="channel", budget={"max_steps": 6}
    )
    run = tiny.train(recipe, tmp_path / "run")
    same = average_run(run, tmp_path / "same", sigma_rel=0.05, device="cpu")
    assert same.error < 1e-6
    average_run(run, tmp_path / "other", sigma_rel=0.075, device="cpu")
    exported, _ = load_first_stage(run / "model" / "vae")
    found, _ = load_first_stage(tmp_path / "same" / "vae")
    other, _ = load_first_stage(tmp_path / "other" / "vae")
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    # folded into quant_conv, so that the measured deviations are in its weights
    assert not torch.equal(
        other.state_dict()["quant_conv.weight"], exported.state_dict()["quant_conv.weight"]
    )
    # and a diffusion model can be trained on it
    where = {"first_stage__path": str(tmp_path / "other")}
    tiny.train(
        tiny.diffusion(**UNCONDITIONAL, **where, budget={"max_steps": 1}), tmp_path / "diffusion"
    )
