"""What the guide to memory tells one to type, typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.generation.metadata import read_request

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "memory.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_it_runs(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(text_run)
    lines = [line.partition(" # ")[0].strip() for b in blocks("sh") for line in b.splitlines()]
    for number, line in enumerate(lines):
        command = line.replace("mezzotint", str(MEZZOTINT), 1) + f" --steps 2 -o {number}.png"
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert [read_request(Path(f"{n}.png")).tiled_decoding for n in range(3)] == [True, False, False]
    pictures = [Path(f"{number}.png").read_bytes() for number in (1, 2)]
    assert pictures[0] == pictures[1]
    again = [MEZZOTINT, "replay", "1.png", "--offload", "sequential"]
    done = subprocess.run(again, check=True, capture_output=True)
    assert b"the same, bit for bit" in done.stdout
    (block,) = blocks("python")
    exec(compile(block, "memory.md", "exec"), {})  # noqa: S102
    assert Path("small.png").is_file()
