"""What the guide to approximations tells one to type, typed, and drawn again."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.generation.metadata import read_request
from mezzotint.studies.benchmark import Benchmark
from mezzotint.training.run import recipe_names

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "faster.md").read_text()
QUICK = [f"--set={what}" for what in ("budget.max_steps=1", "data.count=8")]
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_it_runs(tiny, text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("emoji", "runs/emoji-text"):
        (tmp_path / name).symlink_to(text_run)
    tiny.train(tiny.distill(text_run), tmp_path / "runs" / "student")
    lines = [line.partition(" # ")[0].strip() for b in blocks("sh") for line in b.splitlines()]
    asked = []
    for number, line in enumerate(lines):
        words = shlex.split(line)[1:]
        more: list[str] = []
        if words[0] == "train":
            more = QUICK
        elif words[0] == "evaluate":
            more = ["--steps", "2", "--samples", "24"]
        elif words[0] == "sample":
            steps = [] if "lcm" in line or "student" in line else ["--steps", "3"]
            more = [*steps, "-o", f"{number}.png"]
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
        if words[0] == "sample":
            asked.append(read_request(Path(f"{number}.png")))
    reuse = [r.feature_reuse and (r.feature_reuse.interval, r.feature_reuse.blocks) for r in asked]
    assert reuse == [(2, 1), (3, 2), *[None] * 6]
    assert [r.token_merging for r in asked] == [0, 0, 0.5, *[0] * 5]
    assert [r.resolved.quantization for r in asked] == [*[None] * 3, "int8", *[None] * 4]
    assert [(r.sampler, r.steps) for r in asked[4:7]] == [("lcm", 4), ("lcm", 2), ("lcm", 2)]
    assert [r.resolved.decoder is not None for r in asked] == [*[False] * 7, True]
    assert Benchmark.from_dict(json.loads(Path("speed.json").read_text())).steps == 10
    done = subprocess.run([MEZZOTINT, "replay", "1.png"], check=True, capture_output=True)
    assert b"the same, bit for bit" in done.stdout
    (block,) = blocks("python")
    exec(compile(block, "faster.md", "exec"), {})  # noqa: S102
    assert Path("fast.png").is_file() and Path("faster.png").is_file()


def test_its_recipes_are_shipped():
    named = set(re.findall(r"`((?:emoji|distill)-[\w-]+)`", GUIDE))
    assert len(named) == 4 and named <= set(recipe_names())
