"""A first stage alone is measured by what it keeps of pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from mezzotint import evaluate
from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.folder import save_component
from mezzotint.errors import CheckpointError, ConfigError, DataError, RequestError
from mezzotint.evaluation.card import EvaluationCard, incomparable
from mezzotint.evaluation.evaluate import default_protocol
from mezzotint.evaluation.first_stage import find_first_stage
from mezzotint.evaluation.pictures import PictureFolder
from mezzotint.evaluation.reconstruction import measure_reconstruction
from mezzotint.models.autoencoder import IdentityFirstStage, IdentityFirstStageConfig

if TYPE_CHECKING:
    from tests.conftest import Tiny

Write = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path, write_pictures: Write) -> Path:
    return write_pictures(tmp_path / "photos", 5, side=32)


@pytest.fixture
def run(tiny: "Tiny") -> Path:
    assert tiny.autoencoder_run is not None
    return tiny.autoencoder_run


def test_the_card_of_an_autoencoder_run(run: Path, photos: Path, tmp_path: Path) -> None:
    card = evaluate(run, photos, grid=tmp_path / "grid.png")
    assert card.protocol.name == "reconstruction"
    first_stage, _ = load_first_stage(run / "model" / "vae")
    images = PictureFolder(photos).read(0, 5)
    scores = measure_reconstruction(first_stage.eval(), images)
    assert {name: number.value for name, number in card.numbers.items()} == pytest.approx(
        {
            "rate": scores.rate,
            "psnr": scores.psnr,
            "ssim": scores.ssim,
            "lpips_mobilenet_v2": scores.lpips_mobilenet_v2,
            "rkid_mobilenet_v2": scores.rkid_mobilenet_v2.value,
            "rfid_mobilenet_v2": scores.rfid_mobilenet_v2,
        },
        rel=1e-4,
    )
    assert card.numbers["rkid_mobilenet_v2"].standard_error is not None
    assert card.evaluated.description == str(run)
    assert (card.evaluated.count, card.reference.count, card.evaluated.height) == (5, 5, 32)
    assert card.evaluated.fingerprint != card.reference.fingerprint
    assert [n.name for n in card.networks] == ["mobilenet-v2"]
    card.write(tmp_path / "card.json")
    assert EvaluationCard.read(tmp_path / "card.json") == card
    with Image.open(tmp_path / "grid.png") as grid:  # originals above, and what became of them
        assert grid.width > 5 * 36 and grid.height == 4 + 2 * 36


def test_emoji_and_folders_of_one_size(run: Path, photos: Path) -> None:
    card = evaluate(run, "emoji", samples=4, resolution=32)
    assert (card.reference.split, card.reference.count) == ("validation", 4)
    assert evaluate(run, photos, resolution=16).reference.width == 16
    again = evaluate(run, "emoji", samples=4, resolution=32, compare_with=card)
    assert incomparable(card, again) == []
    with pytest.raises(DataError, match=r"size of pictures \(32 x 32 against 16 x 16\)"):
        evaluate(run, "emoji", samples=4, resolution=16, compare_with=card)


def test_the_identity_restores_exactly(photos: Path, tmp_path: Path) -> None:
    save_component(IdentityFirstStage(IdentityFirstStageConfig()), tmp_path / "identity")
    card = evaluate(tmp_path / "identity", photos)
    assert card.numbers["rate"].value == 24.0
    assert card.numbers["ssim"].value == pytest.approx(1.0)
    assert card.numbers["rkid_mobilenet_v2"].value == pytest.approx(0.0, abs=1e-9)
    assert "psnr" not in card.numbers and "infinite" in card.left_out["psnr"]


def test_what_is_a_first_stage_alone(run: Path, text_run: Path, tmp_path: Path) -> None:
    place = run / "model" / "vae"
    assert [find_first_stage(p) for p in (run, run / "model", place)] == [place] * 3
    assert find_first_stage(text_run) is find_first_stage(tmp_path) is None
    assert find_first_stage(text_run / "model" / "vae") == text_run / "model" / "vae"
    assert (default_protocol(run), default_protocol(text_run)) == ("reconstruction", "small")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"protocol": "small"}, "measures pictures, and"),
        ({"processes": 2}, "processes: a first stage is measured in one go"),
        ({"work": "work"}, "work: a first stage"),
        ({"precision": "bfloat16"}, "precision: a first stage"),
        ({"weights": {"mobilenet-v2": "a.pth"}}, "weights: a first stage"),
        ({"steps": 3}, "steps: "),
    ],
)
def test_what_does_not_apply_is_refused(
    run: Path, photos: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(run, photos, **options)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_that_do_not_fit(run: Path, photos: Path, write_pictures: Write) -> None:
    with pytest.raises(RequestError):  # f = 4 does not divide it
        evaluate(run, photos, resolution=18)
    with pytest.raises(DataError, match="5 pictures, but 6 are to be measured"):
        evaluate(run, photos, samples=6)
    with pytest.raises(ConfigError, match="measures a first stage alone"):
        evaluate(photos, photos, "reconstruction")


def test_an_unfinished_run_is_told(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="--resume"):
        evaluate(tmp_path / "run", photos)
