"""What the comparisons share: ratios, shares, rows, and what is read back."""

import time
from pathlib import Path

import pytest
import torch
from benchmarks.growth import exponent
from benchmarks.side_by_side import (
    Comparison,
    Record,
    difference,
    execution_of,
    finish,
    must_agree,
    options_parser,
    rows,
    side_by_side,
)


def comparison(**changes: object) -> Comparison:
    fields = {
        "what": "a step",
        "mezzotint": "float32",
        "peer": "a peer, float32",
        "seconds": (1.0, 2.0, 9.0),
        "peer_seconds": (2.0, 4.0, 9.0),
        "peaks": (10.0, 10.0, 10.0),
        "flops": 5,
    }
    return Comparison.from_dict({**fields, **changes})


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    assert comparison().ratio == 0.5  # of 0.5, 0.5 and 1


def test_the_share_is_of_the_peak_of_its_pair() -> None:
    assert comparison().share == 0.25  # of 0.5, 0.25 and 0.06
    halved = comparison(peaks=(5.0, 5.0, 5.0))
    assert halved.share == 0.5
    assert comparison(flops=None).share is None


def test_both_are_called_in_turns_after_a_warm_up() -> None:
    options = options_parser("", ("peer",)).parse_args(["--pairs", "2", "--tiny"])
    called: list[str] = []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds)

    measured = side_by_side(
        lambda: call("A", 0.01), lambda: call("B", 0.04), options, execution_of(options)
    )
    assert "".join(called) == "ABABAB"
    assert all(s >= 0.01 for s in measured["seconds"])
    assert all(s >= 0.04 for s in measured["peer_seconds"])
    assert len(measured["peaks"]) == 2 and min(measured["peaks"]) > 0


def test_a_difference_is_of_the_largest_value() -> None:
    theirs = torch.tensor([1.0, -4.0])
    assert difference(theirs + torch.tensor([0.0, 0.2]), theirs) == pytest.approx(0.05)


def test_networks_that_differ_are_not_timed() -> None:
    float32 = execution_of(options_parser("", ("p",)).parse_args(["--precision", "float32"]))
    assert must_agree(9e-5, float32, "a peer, float32") == 9e-5
    with pytest.raises(SystemExit, match="differ by 2.0e-04"):
        must_agree(2e-4, float32, "a peer, float32")
    with pytest.raises(SystemExit, match="differ by nan"):
        must_agree(float("nan"), float32, "a peer, float32")
    assert must_agree(2e-2, float32, "a peer, bfloat16") == 2e-2
    assert must_agree(2e-2, float32, "a peer, float32", near=True) == 2e-2
    for other in (1.0, float("nan")):  # of other weights, or of none
        with pytest.raises(SystemExit, match="expected at most 5e-01"):
            must_agree(other, float32, "a peer, bfloat16")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    parser = options_parser("", ("peer", "another"))
    path = tmp_path / "there" / "step.json"
    options = parser.parse_args(
        ["--peer", "another", "--precision", "float32", "--output", str(path), "--work", "w"]
    )
    record = finish("unet_step", [comparison(wanted=0.6)], options, execution_of(options))
    assert Record.read(path) == record
    words = "--pairs 5 --peer another --precision float32 --device cpu"
    assert record.command == f"python -m benchmarks.unet_step {words}"
    assert torch.__version__.startswith(record.versions["torch"].partition("+")[0])
    assert not record.tiny and record.comparisons[0].wanted == 0.6


@pytest.mark.parametrize("told", [["batch"], ["batch", "--set", "a=1", "--set", "b=2", "--tiny"]])
def test_the_command_of_a_record_is_understood(tmp_path: Path, told: list[str]) -> None:
    parser = options_parser("", ("peer",))
    parser.add_argument("axis", choices=("batch",))
    parser.add_argument("--set", action="append")
    parser.add_argument("--values", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args([*told, "--output", str(tmp_path / "x.json")])
    record = finish("growth", [comparison()], options, execution_of(options), axis="batch")
    again = parser.parse_args(record.command.split()[3:])
    assert vars(again) == {**vars(options), "output": None}


def test_runs_that_were_told_different_things_are_different_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = options_parser("", ("peer",))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance-interval", type=float, nargs=2)
    for told in ([], ["--batch", "64"], ["--guidance-interval", "0.5", "5"], ["--tiny"]):
        options = parser.parse_args(["--precision", "float32", *told])
        finish("text_to_image", [comparison()], options, execution_of(options))
    assert {path.stem for path in (tmp_path / "runs" / "performance").iterdir()} == {
        "text-to-image-peer-float32-batch-1",
        "text-to-image-peer-float32-batch-64",
        "text-to-image-peer-float32-batch-1-guidance-interval-0.5-5.0",
        "text-to-image-peer-float32-tiny-batch-1",
    }


def test_what_is_aimed_at_is_not_for_rehearsals(tmp_path: Path) -> None:
    parser = options_parser("", ("peer",))
    options = parser.parse_args(["--tiny", "--output", str(tmp_path / "step.json")])
    record = finish("unet_step", [comparison(wanted=0.6)], options, execution_of(options))
    assert record.tiny and record.comparisons[0].wanted is None


def test_a_row() -> None:
    *_, row = rows([comparison(wanted=0.6, difference=3e-6)])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "a step",
        "float32",
        "a peer, float32",
        "0.50",
        "≤ 0.60",
        "2",
        "4",
        "25%",
        "3e-06",
    ]


def test_the_exponent_of_a_power() -> None:
    assert exponent([1, 2, 4, 8], [3 * v**1.5 for v in (1, 2, 4, 8)]) == pytest.approx(1.5)
