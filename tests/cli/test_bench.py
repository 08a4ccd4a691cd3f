"""``mezzotint bench``: a table, a file, and mistakes told before anything is measured."""

import json
import sys
from pathlib import Path

import pytest

from mezzotint.cli import main as cli
from mezzotint.studies.benchmark import Benchmark


def call(*arguments: str) -> int:
    sys.argv = ["mezzotint", "bench", *arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_quick_shows_and_writes_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--quick", "--steps", "2", "--json", "speed.json", "--precision", "float32"]
    assert call(*told, "--device", "cpu") == 0
    printed = capsys.readouterr()
    for words in (
        "random weights, tiny",
        "TFLOP/s in float32",
        "UNet step, latents 2 x 4 x 8 x 8",
        "decoding, 1 x 64 x 64",
        "picture, 64 x 64, 2 steps",
        "where the picture's time goes",
        "condition",
    ):
        assert words in printed.out
    assert "measuring the machine's peak" in printed.err
    written = Benchmark.from_dict(json.loads(Path("speed.json").read_text()))
    assert written.steps == 2 and written.model == "random weights, tiny"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs/demo", "--quick"], "--quick is a model of its own"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: expected a file in a folder"),
        (["--json", "."], "--json .: expected a file in a folder"),
        (["no-such-model"], "no-such-model: no such model"),
        (["--quick", "--engine", "openvin"], "engine 'openvin': did you mean 'openvino'?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mezzotint: {told}")
