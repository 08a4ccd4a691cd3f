"""`sample` and `replay` with a small real model: what is drawn, named, written and drawn again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from mezzotint.checkpoints.model import save_model
from mezzotint.cli.main import app
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import IdentityFirstStage, IdentityFirstStageConfig
from mezzotint.models.unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model of two classes, on 8 x 8 pixels."""
    torch.manual_seed(0)
    unet = UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        attention_levels=(False, True),
        cross_attention_dim=8,
        num_attention_heads=2,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("models") / "two"
    composed = LatentDiffusion(
        IdentityFirstStage(IdentityFirstStageConfig()),
        UNet(unet),
        ClassConditioner(ClassConditionerConfig(width=8, class_names=("fruit", "Tool box"))),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (8, 8),
    )
    save_model(composed, folder)
    return folder


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def mezzotint(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_are_named_after_words_and_seeds_and_none_is_overwritten(model: Path) -> None:
    call = ("sample", model, "--class", "Tool box", "-n", 2, "--seed", 5, "--steps", 2)
    first, second = mezzotint(*call), mezzotint(*call)
    assert first.stdout.split() == ["outputs/tool-box-5.png", "outputs/tool-box-6.png"]
    assert second.stdout.split() == ["outputs/tool-box-5-2.png", "outputs/tool-box-6-2.png"]
    for a, b in zip(first.stdout.split(), second.stdout.split(), strict=True):
        assert np.array_equal(pixels(a), pixels(b))


def test_every_flag_arrives_in_the_request(model: Path) -> None:
    flags = "--class 1 --seed 3 --steps 4 --sampler euler --spacing karras --guidance-scale 1.5"
    flags += " --size 16x8 --precision float32 --device cpu --batch-size 2 -n 3 -o drawn"
    paths = mezzotint("sample", model, *flags.split()).stdout.split()
    assert paths == [f"drawn/1-{seed}.png" for seed in (3, 4, 5)]
    request = read_request(Path(paths[2]))
    asked = {
        "task": "class-to-image",
        "class_label": "1",
        "seed": 3,
        "num_images": 3,
        "steps": 4,
        "sampler": "euler",
        "spacing": "karras",
        "guidance_scale": 1.5,
        "width": 16,
        "height": 8,
        "model": str(model),
    }
    assert {name: getattr(request, name) for name in asked} == asked
    assert request.resolved is not None
    recorded = request.resolved.to_dict()
    assert (recorded["precision"], recorded["device"]) == ("float32", "cpu")
    assert (recorded["image_index"], recorded["batch_size"], recorded["batch_row"]) == (2, 1, 0)
    assert pixels(paths[2]).shape == (8, 16, 3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replay_draws_the_same_bit_for_bit(model: Path, precision: str) -> None:
    call = f"--class fruit -n 3 --steps 3 --sampler ddpm --batch-size 2 --precision {precision}"
    for path in mezzotint("sample", model, *call.split()).stdout.split():
        drawn = mezzotint("replay", path, "-o", "again")
        assert drawn.stdout.splitlines()[1] == "the same, bit for bit"
        assert np.array_equal(pixels(drawn.stdout.split()[0]), pixels(path))


def test_replay_says_by_how_much_a_picture_differs(model: Path) -> None:
    drawn = mezzotint("sample", model, "--class", "0", "--steps", 2, "-o", "a.png")
    assert drawn.stdout == "a.png\n"
    changed = pixels("a.png").copy()
    changed[0, 0, 0] = changed[0, 0, 0] ^ 128
    write_image(Image.fromarray(changed), read_request(Path("a.png")), Path("b.png"))
    assert mezzotint("replay", "b.png").stdout.splitlines()[1] == "differs by up to 128 of 255"
    request = read_request(Path("a.png"))
    write_image(Image.new("RGB", (4, 4)), request, Path("c.png"))
    assert mezzotint("replay", "c.png").stdout.splitlines()[1] == "differs in size"


def test_replay_finds_a_model_that_has_moved(model: Path, tmp_path: Path) -> None:
    mezzotint("sample", model, "--class", "0", "--steps", 2, "-o", "a.png")
    request = read_request(Path("a.png")).model_copy(update={"model": str(tmp_path / "gone")})
    write_image(Image.open("a.png"), request, Path("b.png"))
    assert isinstance(mezzotint("replay", "b.png").exception, CheckpointError)
    again = mezzotint("replay", "b.png", "--model", model)
    assert again.stdout.splitlines()[1] == "the same, bit for bit"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a red apple"], "the model wants a class"),
        ([], "the model wants a class"),
        (["--class", "friut"], "unknown class 'friut'; did you mean 'fruit'?"),
        (["--class", "7"], "unknown class '7'"),
        (["--class", "0", "--steps", "1001"], "steps: 1001 is more than the 1000"),
        (["--class", "0", "--sampler", "plms", "--eta", "1"], "'plms' has no option eta"),
    ],
)
def test_what_this_model_cannot_draw_is_told(model: Path, arguments: list[str], told: str) -> None:
    failed = mezzotint("sample", model, *arguments)
    assert isinstance(failed.exception, RequestError)
    assert told in str(failed.exception)
    assert "\n" not in str(failed.exception)
    assert not Path("outputs").exists()


@pytest.mark.parametrize("kind", ["denoising", "interpolation"])
def test_a_strip_is_one_picture_for_each_seed(model: Path, kind: str) -> None:
    call = f"--class fruit -n 2 --seed 5 --steps 3 --strip {kind}"
    drawn = mezzotint("sample", model, *call.split())
    assert drawn.stdout.split() == [f"outputs/fruit-{seed}-{kind}.png" for seed in (5, 6)]
    first, second = (pixels(path) for path in drawn.stdout.split())
    assert not np.array_equal(first, second)
    if kind == "interpolation":  # the last of one strip is the first of the next, 12 times as large
        assert np.abs(first[-100:-4, -100:-4].astype(int) - second[-100:-4, 4:100]).max() <= 1
    with Image.open("outputs/fruit-5-" + kind + ".png") as strip:
        told = json.loads(strip.info["mezzotint-strip"])
    assert (told["strip"], told["request"]["seed"]) == (kind, 5)
    refused = mezzotint("replay", f"outputs/fruit-5-{kind}.png")
    assert "holds no generation request" in str(refused.exception)
