"""What the guide to the shipped models tells one to type, typed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.data.portraits import well_known

GUIDE = (Path(__file__).parents[2] / "docs/guides/emoji.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def bright(path: str, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").crop(box), dtype=float)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 56, 56))
    mask.save("mask.png")
    (layout,) = blocks("json")
    Path("layout.json").write_text(layout)
    (commands,) = blocks("sh")
    lines = commands.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "mezzotint"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
    small, large, other = (bright(f"{name}.png") for name in ("cat", "large", "other"))
    assert large.shape == (128, 128, 3)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    # of 255: it is the same picture, and finer
    assert np.abs(shrunk - small).mean() < 12
    kept = np.asarray(mask) == 0
    assert np.array_equal(other[kept], small[kept]) and not np.array_equal(other, small)
    # the boxes hold something, and their outside little
    ground = bright("scene.png", (0, 0, 128, 24)).mean((0, 1))
    for box in ((12, 44, 60, 92), (76, 56, 116, 100)):
        assert np.abs(bright("scene.png", box) - ground).max(-1).mean() > 40
    (block,) = blocks("python")
    exec(compile(block, "emoji.md", "exec"), {})  # noqa: S102
    with Image.open("rocket.png") as drawn:
        assert drawn.size == (128, 128)


def test_the_captions_that_it_names_are_known() -> None:
    names = well_known()
    for word in ("cat-face", "soccer-ball", "rocket", "red-apple", "fox", "key"):
        assert word in names and word.replace("-", " ") in GUIDE
    assert len(names) == 256
