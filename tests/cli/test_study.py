"""``mezzotint study``: flags arrive as settings, and mistakes are told."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mezzotint.cli.main import app
from mezzotint.config import read_yaml
from mezzotint.errors import CheckpointError, ConfigError


def mezzotint(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_every_flag_arrives_in_the_study(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    flags = "--against emoji:validation --samples 4 --steps 1,2 --samplers ddim --scales 1,2.5"
    flags += " --guidance-scale 1.5 --seed 9 --precision float32 --device cpu"
    done = mezzotint("study", "sampling", text_run, *flags.split(), "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"look at {tmp_path}/out/report.html" in done.stdout
    study = read_yaml(tmp_path / "out" / "study.yaml")
    told = {name: study[name] for name in ("samples", "steps", "samplers", "scales", "seed")}
    assert told == {
        "samples": 4,
        "steps": [1, 2],
        "samplers": ["ddim"],
        "scales": [1.0, 2.5],
        "seed": 9,
    }
    assert (study["guidance_scale"], study["data"]) == (1.5, "emoji:validation")
    points = {p.stem for p in (tmp_path / "out" / "points").glob("*.json")}
    assert points == {"ddim-1-1.5", "ddim-2-1.5", "ddim-20-1", "ddim-20-2.5"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "2,x"], "--steps '2,x': expected whole numbers between commas"),
        (["--steps", "2.5"], "--steps '2.5': expected whole numbers between commas"),
        (["--scales", "1;2"], "--scales '1;2': expected numbers between commas"),
    ],
)
def test_lists_that_cannot_be_read_are_told(tmp_path: Path, flags: list[str], told: str) -> None:
    failed = mezzotint("study", "sampling", "model", *flags, "-o", tmp_path / "out")
    assert isinstance(failed.exception, ConfigError)
    assert str(failed.exception) == told
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_told(tmp_path: Path) -> None:
    failed = mezzotint("study", "sampling", tmp_path / "none", "-o", tmp_path / "out")
    assert isinstance(failed.exception, CheckpointError)
    assert "no such model folder" in str(failed.exception)


def test_the_studies_are_listed() -> None:
    assert "sampling" in mezzotint("study", "--help").stdout
