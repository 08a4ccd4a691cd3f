"""What the guide to approximations tells one to type, typed, and drawn again."""

import json
import re
import subprocess
import sys
from pathlib import Path

from mezzotint.generation.metadata import read_request
from mezzotint.studies.benchmark import Benchmark

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "faster.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_it_runs(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(text_run)
    lines = [line.partition("#")[0].strip() for b in blocks("sh") for line in b.splitlines()]
    measuring = [line for line in lines if line.startswith("mezzotint bench")]
    drawing = [line for line in lines if line.startswith("mezzotint sample")]
    assert lines == [*drawing, *measuring] and len(measuring) == 2
    asked = []
    for number, line in enumerate(drawing):
        command = line.replace("mezzotint", str(MEZZOTINT), 1) + f" --steps 3 -o {number}.png"
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
        request = read_request(Path(f"{number}.png"))
        asked.append((request.feature_reuse, request.token_merging))
    reuse = [found and (found.interval, found.blocks) for found, _ in asked]
    assert reuse == [(2, 1), (3, 2), None]
    assert [ratio for _, ratio in asked] == [0, 0, 0.5]
    done = subprocess.run([MEZZOTINT, "replay", "1.png"], check=True, capture_output=True)
    assert b"the same, bit for bit" in done.stdout
    for line in measuring:
        command = line.replace("mezzotint", str(MEZZOTINT), 1)
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert Benchmark.from_dict(json.loads(Path("speed.json").read_text())).steps == 10
    (block,) = blocks("python")
    exec(compile(block, "faster.md", "exec"), {})  # noqa: S102
    assert Path("fast.png").is_file()
