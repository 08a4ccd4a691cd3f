"""Each mistake ends with one line that names the fix, and exit code 2; run as a user runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

MEZZOTINT = str(Path(sys.executable).with_name("mezzotint"))


def refused(*command: str, cwd: Path) -> str:
    """Run a command that must be refused; returns its one line."""
    done = subprocess.run(
        [MEZZOTINT, *command], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def images(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", (40, 40), (k, 0, 0)).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["data.path=empty", "data.split=null"], "no images"),
        (["data.path=pictures", "data.split=null", "data.caption_column=text"], "no column 'text'"),
        (["data.path=pictures"], "no folder 'train'"),
        (["data.path=pictures", "data.resolution=50"], "50 is not divisible by .* f = 4"),
        (["data.path=pictures", "model.block_out_channels=null", "model.factor=3"], "power of two"),
        (["data.path=pictures", "optimizer.learning_rat=1"], "did you mean 'learning_rate'"),
        (["data.path=pictures", "budget.max_minutes=null"], "max_steps and max_minutes"),
        (["data.path=pictures", "precision=float17"], "float17"),
        (["data.path=pictures", "batch_size=0"], "batch_size"),
        (["nonsense"], "dotted.key=value"),
        (["loss.l1=0", "loss.l2=0", "loss.perceptual=0"], "one of l1, l2 and perceptual"),
        (["data.resolution=16"], "too small for loss.perceptual"),
        (["model.in_channels=1"], "in_channels must be 3"),
        (["optimizer.betas=[2,0.9]"], "optimizer.betas"),
    ],
)
def test_train(tmp_path, overrides, message):
    images(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    sets = [part for override in overrides for part in ("--set", override)]
    line = refused("train", "folder-autoencoder", *sets, cwd=tmp_path)
    assert re.search(message, line), line
    assert not (tmp_path / "runs").exists()


def test_text_conditioning_without_captions(tiny, tmp_path):
    data = {"kind": "folder", "path": str(images(tmp_path / "pictures")), "resolution": 32}
    recipe = tiny.write(tmp_path / "recipe.yaml", "diffusion", data=data)
    line = refused("train", str(recipe), cwd=tmp_path)
    assert "no captions" in line and "data.caption_column" in line


def test_class_conditioning_without_classes(tiny, tmp_path):
    data = {"kind": "folder", "path": str(images(tmp_path / "pictures")), "resolution": 32}
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "diffusion",
        data=data,
        conditioning={"kind": "class", "width": 32},
    )
    assert "no classes" in refused("train", str(recipe), cwd=tmp_path)


def test_a_first_stage_that_is_not_there(tiny, tmp_path):
    recipe = tiny.write(tmp_path / "recipe.yaml", "diffusion", first_stage__path="runs/none")
    assert "no autoencoder here" in refused("train", str(recipe), cwd=tmp_path)


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ({"unet__in_channels": 3}, "unet.in_channels is 3; expected 4: 4 of the noisy latent"),
        ({"unet__out_channels": 3}, "unet.in_channels is 4; expected 3: 3 of the noisy latent"),
        (
            {"unet__in_channels": 3, "unet__out_channels": 3},
            "in_channels is 3, but the first stage has 4 latent channels",
        ),
    ],
)
def test_widths_that_do_not_fit(tiny, tmp_path, widths, words):
    recipe = tiny.write(tmp_path / "recipe.yaml", "diffusion", **widths)
    assert words in refused("train", str(recipe), cwd=tmp_path)


def test_a_damaged_index(text_run, tmp_path):
    model = shutil.copytree(text_run / "model", tmp_path / "model")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("image_size", "image_sise"))
    assert "expected [height, width]" in refused("sample", "model", "a cat", cwd=tmp_path)


def test_resuming_what_is_not_there(tiny, tmp_path):
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder")
    line = refused("train", str(recipe), "--output", "typo", "--resume", cwd=tmp_path)
    assert "holds no run to go on with" in line


def test_classes_in_another_order_than_the_data(tiny, tmp_path):
    for name in ("hat", "shoe"):
        images(tmp_path / "pictures" / name)
    recipe = tiny.write(
        tmp_path / "recipe.yaml",
        "diffusion",
        data={"kind": "folder", "path": "pictures", "resolution": 32},
        conditioning={"kind": "class", "width": 32, "class_names": ["shoe", "hat"]},
    )
    assert "the data has hat, shoe" in refused("train", str(recipe), cwd=tmp_path)


def test_a_truncated_model(text_run, tmp_path):
    model = shutil.copytree(text_run / "model", tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(weights) in refused("sample", str(model), "a cat", cwd=tmp_path)


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "conditioner"])
def test_a_model_that_lacks_a_part(text_run, tmp_path, part):
    model = shutil.copytree(text_run / "model", tmp_path / "model")
    shutil.rmtree(model / part)
    assert part in refused("sample", str(model), "a cat", cwd=tmp_path)


def test_a_prompt_to_a_class_only_model(class_run, tmp_path):
    line = refused("sample", str(class_run), "a cat", cwd=tmp_path)
    assert "wants a class" in line and "--class" in line


def test_an_unfinished_run(tiny, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "--resume" in refused("sample", "run", "a cat", cwd=tmp_path)


def test_too_many_broken_images(tiny, tmp_path):
    folder = images(tmp_path / "pictures", 20)
    for k in range(3):
        (folder / f"{k}.png").write_bytes(b"not a picture")
    sets = ["--set", f"data.path={folder}", "--set", "data.split=null"]
    line = refused("train", "folder-autoencoder", *sets, cwd=tmp_path)
    assert "3 of 20 images are broken" in line and "0.png" in line


def test_a_broken_image_is_skipped_counted_and_named(tiny, tmp_path):
    folder = images(tmp_path / "pictures", 20)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    data = {"kind": "folder", "path": str(folder), "resolution": 32, "max_broken": 0.1}
    recipe = tiny.write(tmp_path / "recipe.yaml", "autoencoder", data=data)
    done = subprocess.run(
        [MEZZOTINT, "train", str(recipe), "--output", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=True,
    )
    assert "19 images" in done.stdout
    assert "skipped 7.png" in (tmp_path / "run" / "log.txt").read_text()
