"""`evaluate` on the command line: flags arrive, numbers are printed, cards are written."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from mezzotint.cli.main import app
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.evaluation.card import EvaluationCard

PROTOCOL = {
    "name": "tiny",
    "metrics": ["kid", "fid"],
    "network": "random",
    "resize": "bicubic-antialias",
    "samples": 64,
    "fewer": True,
    "kid_subsets": None,
    "resamples": 2,
}


@pytest.fixture(autouse=True)
def _a_folder_with_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, count in (("drawn", 9), ("real", 10)):
        Path(name).mkdir()
        for k in range(count):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{name}/{k}.png")
    Image.new("L", (12, 12)).save("drawn/grey.png")
    Path("tiny.yaml").write_text(yaml.safe_dump(PROTOCOL))


def mezzotint(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_numbers_are_printed_and_the_card_written() -> None:
    done = mezzotint("evaluate", "drawn", "--against", "real", "--protocol", "tiny.yaml")
    assert done.exit_code == 0, done.output
    card = EvaluationCard.read(Path("outputs/drawn-tiny.json"))
    lines = done.stdout.splitlines()
    assert lines[:2] == ["protocol tiny: 10 pictures of drawn", "against 10 of real"]
    kid, fid = card.numbers["kid_random"], card.numbers["fid_random"]
    assert lines[2].split() == ["kid_random", f"{kid.value:.5g}", "±", f"{kid.standard_error:.2g}"]
    assert lines[3].split()[:2] == ["fid_random", f"{fid.value:.5g}"]
    assert lines[4] == "drawn: converted to RGB: 1 grey"
    assert "a picture was read in" in lines[5] and lines[5].endswith("of one process of 1")
    assert lines[6:] == ["outputs/drawn-tiny.json"]


def test_a_card_is_not_overwritten_unless_it_is_named() -> None:
    call = ("evaluate", "drawn", "--against", "real", "--protocol", "tiny.yaml")
    assert mezzotint(*call).exit_code == mezzotint(*call).exit_code == 0
    assert Path("outputs/drawn-tiny-2.json").is_file()
    for _ in range(2):
        named = mezzotint(*call, "-o", "cards/a.json", "--grid", "grid.png", "-n", 8)
        assert named.stdout.splitlines()[-1] == "cards/a.json"
    card = EvaluationCard.read(Path("cards/a.json"))
    assert card.evaluated.count == card.protocol.samples == 8
    with Image.open("grid.png") as grid:
        assert grid.size == (8 * 16 + 4, 16 + 4)


def test_two_cards_are_compared() -> None:
    call = ("evaluate", "drawn", "--against", "real", "--protocol", "tiny.yaml")
    mezzotint(*call, "-o", "a.json")
    changed = json.loads(Path("a.json").read_text())
    changed["numbers"]["kid_random"]["value"] -= 0.25
    Path("b.json").write_text(json.dumps(changed))
    done = mezzotint(*call, "-o", "c.json", "--compare", "b.json")
    assert any(line.startswith("kid_random +0.25 ± ") for line in done.stdout.splitlines())
    refused = mezzotint(*call, "-o", "d.json", "--compare", "a.json", "-n", 9)
    assert isinstance(refused.exception, DataError)
    assert "count of pictures (10 against 9)" in str(refused.exception)
    assert not Path("d.json").exists()  # it is told before anything is computed


def test_what_was_searched_and_what_was_left_out_is_said() -> None:
    small = PROTOCOL | {"metrics": ["kid", "nearest_training", "retrieval"]}
    Path("tiny.yaml").write_text(yaml.safe_dump(small))
    call = ("evaluate", "drawn", "--protocol", "tiny.yaml", "--against")
    lines = mezzotint(*call, "real").stdout.splitlines()
    assert "copies were looked for among 10 of real" in lines
    assert any(line.startswith("retrieval: left out: only pictures that") for line in lines)
    Path("real").rename("test")
    lines = mezzotint(*call, "test").stdout.splitlines()
    assert any(line.startswith("nearest_training: left out: test is held out") for line in lines)
    assert not any("copies were" in line for line in lines)


def test_the_numbers_are_printed_even_if_the_card_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(card: EvaluationCard, path: Path) -> None:
        raise CheckpointError(f"{path}: cannot be written: no space left")

    monkeypatch.setattr(EvaluationCard, "write", full)
    done = mezzotint("evaluate", "drawn", "--against", "real", "--protocol", "tiny.yaml")
    assert isinstance(done.exception, CheckpointError)
    assert any(line.startswith("kid_random ") for line in done.stdout.splitlines())
    assert list(Path("cache/mezzotint/evaluations").glob("*/evaluated/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--protocol", "tiny.yml"], "tiny.yml: no such file"),
        (["--protocol", "smal"], "did you mean 'small'"),
        (["-o", "card.txt"], "name it *.json"),
        (["-o", "real/0.png/card.json"], "0.png is a file, not a folder"),
        (["--grid", "real"], "--grid real: is a folder"),
        (["--resolution", "0"], "resolution: must be at least 1, got 0"),
        (["--against-resolution", "-3"], "against_resolution: must be at least 1, got -3"),
        (["--compare", "none.json"], "none.json: no such card"),
        (["--weights", "inception"], "expected NAME=PATH"),
        (["--protocol", "tiny.yaml", "-n", "0"], "samples: "),
        (["--protocol", "tiny.yaml", "--split", "test"], "no folder 'test'"),
        (["--protocol", "tiny.yaml", "--processes", "0"], "processes: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(options: list[str], told: str) -> None:
    failed = mezzotint("evaluate", "drawn", "--against", "real", *options)
    assert isinstance(failed.exception, ConfigError | DataError)
    assert told in str(failed.exception) and "\n" not in str(failed.exception)
    assert not Path("outputs").exists()
