"""What the README tells a newcomer to type, typed."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_runs(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(text_run)
    (block,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102
    assert len(namespace["images"]) == 4


def test_the_drawing_commands_run(text_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(text_run)
    lines = [
        line.partition("#")[0].strip()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith(("mezzotint sample runs/demo", "mezzotint replay", "mezzotint doctor"))
    ]
    assert len(lines) >= 4
    lines.sort(key=lambda line: "replay" in line)  # after what it draws again
    for line in lines:
        command = line.replace("mezzotint", str(MEZZOTINT), 1)
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True)


def test_every_recipe_that_it_names_is_shipped():
    from mezzotint.training.run import recipe_names

    named = {w for b in blocks("sh") for w in re.findall(r"mezzotint train ([\w-]+)", b)}
    assert named and named <= set(recipe_names())
