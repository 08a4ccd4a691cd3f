"""What the guide to engines tells one to type, typed."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "engines.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_its_commands_run(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MEZZOTINT_CACHE", raising=False)
    (tmp_path / "emoji").symlink_to(text_run)
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
    told: list[str] = []
    for command in block.splitlines():
        line = command.replace("mezzotint", str(MEZZOTINT), 1)
        if " sample " in line:
            line = line.replace("--engine", "--steps 2 --precision float32 --engine")
        if " evaluate " in line:
            line += " --steps 1 --samples 20 --precision float32"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        told.append(done.stdout)
    assert told[1].endswith("the same, bit for bit\n")
    assert told[2].endswith(("the same, bit for bit\n", "differs by up to 1 of 255\n"))
    assert len(list((tmp_path / "cache" / "mezzotint" / "engines").glob("*/*"))) == 2
