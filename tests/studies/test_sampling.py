"""The study of sampling with tiny trained models: points, resumption, and the report."""

import csv
import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mezzotint.data.emoji import EmojiData, EmojiDataConfig, emoji_image
from mezzotint.errors import ConfigError, DataError, RequestError
from mezzotint.evaluation.card import EvaluationCard, compare
from mezzotint.evaluation.distributions import kid, precision_recall
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import load
from mezzotint.models.features import load_features
from mezzotint.studies.sampling import run_sampling_study
from mezzotint.studies.sampling_points import Bench, MeasuredPoint, SamplingStudy

SMALL: dict[str, Any] = {
    "samples": 6,
    "steps": [1, 3],
    "samplers": ["ddim", "heun"],
    "scales": [1.0, 2.0],
    "scale_steps": 3,
    "precision": "float32",
    "device": "cpu",
}
KID = "kid_mobilenet_v2"
RETRIEVAL = "retrieval_mobilenet_v2"
FEW: dict[str, Any] = {"samplers": ["ddim"], "steps": [1, 2], "scales": [], "scale_steps": 1}
FILES = {"report.html", "study.yaml", "points.csv", "denoising.webp", "interpolation.webp"}


def run(model: Path, output: Path, **changes: Any) -> str:
    """Run a small study; returns what it says."""
    said = StringIO()
    run_sampling_study(model, output, console=Console(file=said), **(SMALL | changes))
    return said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features of real pictures are kept between tests, and not between runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def studied(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of a text model."""
    folder = tmp_path_factory.mktemp("study")
    run(text_run, folder)
    return folder


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "points").iterdir()}


def point(folder: Path, name: str) -> MeasuredPoint:
    path = folder / "points" / f"{name}.json"
    return MeasuredPoint.from_dict(json.loads(path.read_text()))


def test_every_point_is_measured_once_and_told(studied: Path) -> None:
    # the recipe's guidance scale is 3; ddim at 3 steps also stands in the row of scales, at 1 and 2
    names = {"ddim-1-3", "ddim-3-3", "heun-1-3", "heun-3-3", "ddim-3-1", "ddim-3-2"}
    assert {Path(name).stem for name in stamps(studied)} == names
    assert {p.name for p in studied.iterdir()} >= FILES
    page = (studied / "report.html").read_text()
    for text in ("Quality against steps", "Quality against guidance scale", "ddim", "heun"):
        assert text in page
    with (studied / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        name = f"{row['sampler']}-{row['steps']}-{float(row['guidance_scale']):g}"
        numbers = point(studied, name).card.numbers
        assert float(row[KID]) == numbers[KID].value
        assert float(row[f"{KID}_standard_error"]) == numbers[KID].standard_error
        assert float(row[RETRIEVAL]) == numbers[RETRIEVAL].value


def test_network_calls_are_counted(studied: Path) -> None:
    names = ("ddim-1-3", "ddim-3-3", "ddim-3-1", "heun-1-3", "heun-3-3")
    # Heun calls twice, but once in the last step, which goes to 0
    assert [point(studied, n).network_calls for n in names] == [1, 3, 3, 1, 5]
    assert all(point(studied, n).seconds_per_image > 0 for n in names)


def test_a_point_holds_the_card_of_an_evaluation(studied: Path, text_run: Path) -> None:
    card = point(studied, "heun-3-3").card
    again = evaluate(
        load(text_run, device="cpu", precision="float32"),
        EmojiDataConfig(subset="demo-48", resolution=32),
        card.protocol,
        steps=3,
        sampler="heun",
        guidance_scale=3.0,
    )
    differences = compare(card, again)
    assert set(differences) == {f"{m}_mobilenet_v2" for m in ("kid", "precision", "recall")} | {
        RETRIEVAL
    }
    assert [d.value for d in differences.values()] == [0, 0, 0, 0]
    assert card.drawn_with == again.drawn_with
    assert card.protocol.name == "sampling-study"
    assert 0 < point(studied, "heun-3-3").seconds_per_image < 10


def test_its_numbers_and_pictures_are_those_of_what_was_asked(
    studied: Path, text_run: Path
) -> None:
    pipeline = load(text_run, device="cpu", precision="float32")
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=32))
    real = torch.stack([data.load(k).image for k in range(48)])
    rows = [0, 8, 16, 24, 32, 40]  # six of 48, evenly
    captions = [data.concepts[k].caption for k in rows]
    requests = [
        pipeline.request(prompt=c, seed=k, steps=3, sampler="heun", guidance_scale=3.0)
        for k, c in enumerate(captions)
    ]
    drawn = [np.array(d.image) for d in generate_each(pipeline, requests)]
    network = load_features("mobilenet-v2")
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    features = network.extract(images, "bicubic-antialias")[0]
    real_features = network.extract(real, "bicubic-antialias")[0]
    kept = point(studied, "heun-3-3")
    expected = kid(features, real_features)
    assert kept.kid.value == pytest.approx(expected.value, rel=1e-4)
    assert kept.kid_error == pytest.approx(expected.standard_error, rel=1e-4)
    shares = tuple(kept.share(name) for name in ("precision", "recall"))
    assert shares == precision_recall(features, real_features)
    unit = torch.nn.functional.normalize
    found = (unit(features, dim=1) @ unit(real_features, dim=1).T).argmax(1).tolist()
    assert kept.share("retrieval") == sum(f == r for f, r in zip(found, rows, strict=True)) / 6
    sheet = np.asarray(Image.open(studied / "points" / "heun-3-3.png")).astype(int)
    for k, (x, y) in enumerate([(4, 4), (40, 4), (4, 40), (40, 40)]):
        # drawn in a batch of four here and of six there
        assert np.abs(sheet[y : y + 32, x : x + 32] - drawn[k]).max() <= 1


def test_what_is_measured_is_not_measured_again(studied: Path, text_run: Path) -> None:
    before = stamps(studied)
    said = run(text_run, studied, steps=[1, 2, 3])
    after = stamps(studied)
    new = {name for name in after if name not in before}
    assert new == {f"{s}-2-3.{kind}" for s in ("ddim", "heun") for kind in ("json", "png")}
    assert {name: after[name] for name in before} == before
    assert "6 of 8 points are there already" in said
    assert "8 of 8: heun, 2 steps" in said


def test_a_point_that_was_cut_short_is_measured_again(text_run: Path, tmp_path: Path) -> None:
    changes = FEW | {"scales": [1.0]}
    run(text_run, tmp_path, **changes)
    before = point(tmp_path, "ddim-1-3")
    (tmp_path / "points" / "ddim-1-3.png").unlink()
    assert "2 of 3 points are there already" in run(text_run, tmp_path, **changes)
    after = point(tmp_path, "ddim-1-3")
    assert after.card.numbers == before.card.numbers


def test_points_of_other_settings_are_refused(studied: Path, text_run: Path) -> None:
    before = stamps(studied)
    with pytest.raises(ConfigError, match=r"ddim-1-3.json: .* another samples \(6, now 7\)"):
        run(text_run, studied, samples=7)
    with pytest.raises(ConfigError, match=r"another data \([0-9a-f]{64}, now [0-9a-f]{64}\)"):
        run(text_run, studied, against="emoji:validation")
    assert stamps(studied) == before
    assert "samples: 6" in (studied / "study.yaml").read_text()


def test_points_of_another_machine_are_refused(text_run: Path, tmp_path: Path) -> None:
    run(text_run, tmp_path, **FEW)
    path = tmp_path / "points" / "ddim-1-3.json"
    kept = json.loads(path.read_text())
    threads = kept["machine"]["threads"]
    assert kept["machine"]["processor"]
    kept["machine"] |= {"processor": "abacus", "threads": threads + 1}
    path.write_text(json.dumps(kept))
    told = (
        rf"another processor \(abacus, now .+\), another threads \({threads + 1}, now {threads}\)"
    )
    with pytest.raises(ConfigError, match=told):
        run(text_run, tmp_path, **FEW)


def test_a_damaged_point_is_told(text_run: Path, tmp_path: Path) -> None:
    run(text_run, tmp_path, **FEW)
    for text in ('{"card":', "7"):
        (tmp_path / "points" / "ddim-1-3.json").write_text(text)
        with pytest.raises(ConfigError, match="ddim-1-3.json: damaged; remove it"):
            run(text_run, tmp_path, **FEW)


def test_a_class_model_is_drawn_by_class_and_has_no_captions(
    class_run: Path, tmp_path: Path
) -> None:
    run(class_run, tmp_path, samplers=["dpmpp_2m"], steps=[1, 2], scales=[1.0], scale_steps=2)
    assert point(tmp_path, "dpmpp_2m-2-3").share("retrieval") is None
    page = (tmp_path / "report.html").read_text()
    assert "etrieval" not in page
    assert "retrieval" not in (tmp_path / "points.csv").read_text()
    assert "of “food-drink”" in page


def test_every_sampler_can_be_studied(text_run: Path, tmp_path: Path) -> None:
    default = SamplingStudy(model="m", data=EmojiDataConfig())
    run(text_run, tmp_path, samplers=default.samplers, samples=4, steps=[2], scales=[])
    assert len(list((tmp_path / "points").glob("*.json"))) == len(default.samplers) == 13


def test_the_real_pictures_are_those_of_the_run_unless_others_are_named(
    studied: Path, text_run: Path, tmp_path: Path
) -> None:
    real = point(studied, "ddim-1-3").card.reference
    assert (real.count, real.split, real.width) == (48, None, 32)  # demo-48, at its 32 pixels
    run(text_run, tmp_path, against="emoji:validation", **FEW)
    assert point(tmp_path, "ddim-1-3").card.reference.split == "validation"
    with pytest.raises(DataError, match="did you mean 'train'"):
        run(text_run, tmp_path / "out", against="emoji:trian")
    with pytest.raises(ConfigError, match="no recipe.yaml says what it was trained on"):
        run(Path(shutil.copytree(text_run / "model", tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_emoji(folder: Path, names: str) -> None:
    folder.mkdir(parents=True)
    for name in names.split():
        emoji_image(name, 32).save(folder / f"{name}.png")


def test_data_without_what_the_model_draws_from_are_refused(
    text_run: Path, class_run: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    write_emoji(pictures, "red-apple banana lemon carrot")
    with pytest.raises(DataError, match="the model draws from captions, and they cannot be read"):
        run(text_run, tmp_path / "out", against=str(pictures))
    with pytest.raises(DataError, match="no classes, and the model draws from them"):
        run(class_run, tmp_path / "out", against=str(pictures))
    write_emoji(tmp_path / "few" / "food-drink", "red-apple banana")
    write_emoji(tmp_path / "few" / "animals-nature", "cactus")
    with pytest.raises(DataError, match="3 pictures, but precision needs 4, recall needs 4"):
        run(class_run, tmp_path / "out", against=str(tmp_path / "few"))
    assert not (tmp_path / "out").exists()


def test_held_out_pictures_show_how_low_a_kid_can_be(class_run: Path, tmp_path: Path) -> None:
    write_emoji(tmp_path / "data" / "train" / "food-drink", "red-apple banana lemon")
    write_emoji(tmp_path / "data" / "train" / "animals-nature", "cactus")
    run(class_run, tmp_path / "alone", against=str(tmp_path / "data"), **FEW)
    assert not (tmp_path / "alone" / "held-out.json").exists()
    assert "were kept from training" not in (tmp_path / "alone" / "report.html").read_text()
    write_emoji(tmp_path / "data" / "validation" / "food-drink", "green-apple pear tomato")
    run(class_run, tmp_path / "both", against=str(tmp_path / "data"), **FEW)
    card = EvaluationCard.read(tmp_path / "both" / "held-out.json")
    assert (card.evaluated.count, card.reference.count) == (3, 4)
    assert card.reference == point(tmp_path / "both", "ddim-1-3").card.reference
    expected = f"{card.numbers[KID].value:.4f} ± {card.numbers[KID].standard_error:.4f}"
    page = (tmp_path / "both" / "report.html").read_text()
    assert f"were kept from training to those of the training is {expected}" in page


def test_an_unconditional_model_has_no_scales(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.diffusion(conditioning={"kind": "none"}, unet__cross_attention_dim=None)
    model = tiny.train(recipe, tmp_path / "run")
    run(model, tmp_path / "out", **FEW | {"scales": [2.0]})
    points = {p.stem for p in (tmp_path / "out" / "points").glob("*.json")}
    assert points == {"ddim-1-3", "ddim-2-3"}
    assert "guidance scale</h2>" not in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(RequestError, match="1001 is more than the 1000 noise levels"):
        run(model, tmp_path / "other", steps=[1], scale_steps=1001)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samplers": ["ddin"]}, "unknown sampler 'ddin'; did you mean 'ddim'?"),
        ({"samplers": []}, "samplers"),
        ({"steps": [2, 2]}, "steps: a value stands there twice"),
        ({"steps": [0]}, "steps"),
        ({"samples": 3}, "samples"),
        ({"scales": [-1]}, "scales"),
        ({"stesp": [2]}, "stesp"),
    ],
)
def test_wrong_settings_are_told(
    text_run: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        run(text_run, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_more_steps_than_there_are_noise_levels_are_refused(text_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="1001 is more than the 1000 noise levels"):
        run(text_run, tmp_path / "out", steps=[1001])


def test_conditions_come_in_the_proportions_of_the_data(text_run: Path, tmp_path: Path) -> None:
    pipeline = load(text_run, device="cpu", precision="float32")
    config = EmojiDataConfig(names=("red-apple", "banana", "lemon", "carrot"), resolution=32)
    study = SamplingStudy(model="m", data=config, samples=9, seed=5)
    bench = Bench(pipeline, study, tmp_path)
    shown = bench.requests(("ddim", 2, 1.5))
    assert [r.prompt for r in shown] == ["red apple", "banana", "lemon", "carrot"]
    assert [(r.seed, r.steps, r.guidance_scale) for r in shown] == [
        (s, 2, 1.5) for s in range(5, 9)
    ]
    with_ = bench.drawn_with(("ddim", 2, 1.5))
    assert (with_.seed, with_.last_seed, with_.steps) == (5, 13, 2)
