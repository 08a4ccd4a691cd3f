"""Cards come back as they were, and compare only if they mean the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation.card import (
    EvaluationCard,
    NetworkRecord,
    Number,
    PictureRecord,
    compare,
    incomparable,
)
from mezzotint.evaluation.protocol import PROTOCOLS, EvaluationProtocol


def pictures(**changes: Any) -> PictureRecord:
    fields = {
        "description": "emoji",
        "fingerprint": "a" * 64,
        "count": 100,
        "available": 100,
        "height": 64,
        "width": 64,
    }
    return PictureRecord(**(fields | changes))


def card(**changes: Any) -> EvaluationCard:
    fields: dict[str, Any] = {
        "protocol": PROTOCOLS["small"],
        "numbers": {
            "kid_mobilenet_v2": Number(value=0.5, standard_error=0.03),
            "density_mobilenet_v2": Number(value=1.0),
        },
        "networks": (NetworkRecord(name="mobilenet-v2", weights_sha256="b" * 64),),
        "evaluated": pictures(description="runs/a", fingerprint="c" * 64),
        "reference": pictures(),
        "training": pictures(),
        "versions": {"torch": "2"},
    }
    return EvaluationCard(**(fields | changes))


def test_a_card_comes_back_as_it_was(tmp_path: Path) -> None:
    written = card()
    written.write(tmp_path / "deep" / "card.json")
    assert EvaluationCard.read(tmp_path / "deep" / "card.json") == written
    plain = json.loads((tmp_path / "deep" / "card.json").read_text())
    assert plain["protocol"]["kid_subsets"] is None
    assert plain["numbers"]["kid_mobilenet_v2"] == {"value": 0.5, "standard_error": 0.03}


def test_differences_and_their_errors() -> None:
    """Independent errors add as squares: 3, 4, 5."""
    better = card(
        numbers={
            "kid_mobilenet_v2": Number(value=0.3, standard_error=0.04),
            "density_mobilenet_v2": Number(value=1.25),
        },
        evaluated=pictures(description="runs/b", fingerprint="d" * 64),
        versions={"torch": "3"},
    )
    found = compare(card(), better)
    assert found["kid_mobilenet_v2"].value == pytest.approx(-0.2)
    assert found["kid_mobilenet_v2"].standard_error == pytest.approx(0.05)
    assert found["density_mobilenet_v2"].value == 0.25
    assert found["density_mobilenet_v2"].standard_error is None


def other_protocol(**changes: Any) -> EvaluationProtocol:
    return EvaluationProtocol.from_dict(PROTOCOLS["small"].to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"protocol": other_protocol(resize="tf1-bilinear")},
            "protocol.resize (bicubic-antialias against tf1-bilinear)",
        ),
        (
            {"networks": (NetworkRecord(name="mobilenet-v2", weights_sha256="e" * 64),)},
            "weights of mobilenet-v2 (bbbbbbbbbbbb against eeeeeeeeeeee)",
        ),
        ({"evaluated": pictures(count=99)}, "count of pictures (100 against 99)"),
        ({"evaluated": pictures(height=32)}, "size of pictures (64 x 64 against 64 x 32)"),
        ({"reference": pictures(count=99)}, "count of reference (100 against 99)"),
        (
            {"reference": pictures(fingerprint="f" * 64, description="b", split="test")},
            "reference (emoji aaaaaaaaaaaa against b:test ffffffffffff)",
        ),
        (
            {"training": pictures(fingerprint="f" * 64)},
            "training pictures (emoji aaaaaaaaaaaa against emoji ffffffffffff)",
        ),
        (
            {"numbers": {"kid_mobilenet_v2": Number(value=0.1)}},
            "numbers (density_mobilenet_v2, kid_mobilenet_v2 against kid_mobilenet_v2)",
        ),
    ],
)
def test_each_reason_against_a_comparison(changes: dict[str, Any], reason: str) -> None:
    assert incomparable(card(), card(**changes)) == [reason]
    with pytest.raises(DataError, match="not comparable"):
        compare(card(), card(**changes))


def test_all_reasons_are_told_at_once() -> None:
    other = card(
        protocol=other_protocol(kid_subsets=100, manifold_k=5),
        evaluated=pictures(count=99),
        reference=pictures(fingerprint="f" * 64),
    )
    with pytest.raises(DataError) as caught:
        compare(card(), other)
    message = str(caught.value)
    for part in (
        "manifold_k",
        "kid_subsets (None against 100)",
        "count of pictures",
        "reference (",
    ):
        assert part in message
    assert "\n" not in message


def test_a_protocol_whose_samples_were_overridden_compares_by_what_was_measured() -> None:
    asked = card(protocol=other_protocol(samples=100, fewer=False))
    assert incomparable(card(), asked) == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_what_is_no_card_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(DataError, match="card"):
        EvaluationCard.read(tmp_path / "card.json")
    with pytest.raises(DataError, match="no such card"):
        EvaluationCard.read(tmp_path / "none.json")


def test_a_newer_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(card().to_dict() | {"format_version": 2}))
    with pytest.raises(ConfigError, match="newer"):
        EvaluationCard.read(tmp_path / "card.json")
