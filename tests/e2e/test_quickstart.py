"""What the quickstart tells a newcomer to type, typed after a training of one step."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mezzotint.cli.main import app

PAGE = (Path(__file__).parents[2] / "docs/quickstart.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_it_runs(text_run: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("emoji").symlink_to(text_run)  # what lies here goes before the shipped model
    quick = {"first_stage": f"{{kind: trained, path: {tiny.autoencoder_run}}}"}
    quick |= {"budget.max_steps": 1, "latent_variants": 1, "sample_steps": 2, "batch_size": 2}
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        name, *words = shlex.split(line.partition(" # ")[0])
        assert name == "mezzotint"
        if words[0] == "train":
            words += [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
        elif words[0] == "sample" and "--steps" not in words:
            words += ["--steps", "2"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
    (block,) = blocks("python")
    exec(compile(block.replace("steps=25", "steps=2"), "quickstart.md", "exec"), {})  # noqa: S102
    with Image.open("red-apple.png") as drawn:
        assert drawn.size == (32, 32)
