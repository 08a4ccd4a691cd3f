"""The study of sampling with tiny trained models: points, resumption, and the report."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mezzotint.data.emoji import EmojiData, EmojiDataConfig, emoji_image
from mezzotint.data.images import FolderDataConfig
from mezzotint.errors import ConfigError, DataError, RequestError
from mezzotint.evaluation.distributions import kid, precision_recall
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import load
from mezzotint.models.features import load_features
from mezzotint.studies.sampling import data_config, run_sampling_study
from mezzotint.studies.sampling_points import Bench, MeasuredPoint, SamplingStudy
from mezzotint.training.run import load_recipe

SMALL: dict[str, Any] = {
    "samples": 6,
    "steps": [1, 3],
    "samplers": ["ddim", "heun"],
    "scales": [1.0, 2.0],
    "scale_steps": 3,
    "precision": "float32",
    "device": "cpu",
}
FILES = {"report.html", "study.yaml", "points.csv", "denoising.webp", "interpolation.webp"}


def run(model: Path, output: Path, **changes: Any) -> str:
    """Run a small study; returns what it says."""
    said = StringIO()
    run_sampling_study(model, output, console=Console(file=said), **(SMALL | changes))
    return said.getvalue()


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
        kept = point(studied, name)
        assert float(row["kid_mobilenet_v2"]) == kept.kid
        assert float(row["kid_mobilenet_v2_standard_error"]) == kept.kid_standard_error > 0
        assert float(row["retrieval_mobilenet_v2"]) == kept.retrieval


def test_network_calls_are_counted(studied: Path) -> None:
    names = ("ddim-1-3", "ddim-3-3", "ddim-3-1", "heun-1-3", "heun-3-3")
    # Heun calls twice, but once in the last step, which goes to 0
    assert [point(studied, n).network_calls for n in names] == [1, 3, 3, 1, 5]
    assert all(point(studied, n).seconds_per_image > 0 for n in names)


def test_a_point_is_what_the_metrics_say_of_its_pictures(studied: Path, text_run: Path) -> None:
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
    features = network.extract(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2))[0]
    real_features = network.extract(real)[0]
    kept = point(studied, "heun-3-3")
    expected = kid(features, real_features)
    assert kept.kid == pytest.approx(expected.value, rel=1e-4)
    assert kept.kid_standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert (kept.precision, kept.recall) == precision_recall(features, real_features)
    unit = torch.nn.functional.normalize
    found = (unit(features, dim=1) @ unit(real_features, dim=1).T).argmax(1).tolist()
    assert kept.retrieval == sum(f == r for f, r in zip(found, rows, strict=True)) / 6
    sheet = np.asarray(Image.open(studied / "points" / "heun-3-3.png"))
    assert np.array_equal(sheet[4:36, 4:36], drawn[0])


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
    changes = {"samplers": ["ddim"], "steps": [1], "scales": [1.0], "scale_steps": 1}
    run(text_run, tmp_path, **changes)
    before = point(tmp_path, "ddim-1-3")
    (tmp_path / "points" / "ddim-1-3.png").unlink()
    assert "1 of 2 points are there already" in run(text_run, tmp_path, **changes)
    after = point(tmp_path, "ddim-1-3")
    assert (after.kid, after.precision) == (before.kid, before.precision)


def test_points_of_other_settings_are_refused(studied: Path, text_run: Path) -> None:
    before = stamps(studied)
    with pytest.raises(ConfigError, match=r"ddim-1-3.json: .* another samples \(6, now 7\)"):
        run(text_run, studied, samples=7)
    with pytest.raises(ConfigError, match="another data_fingerprint"):
        run(text_run, studied, against="emoji:validation")
    assert stamps(studied) == before
    assert "samples: 6" in (studied / "study.yaml").read_text()


def test_a_damaged_point_is_told(text_run: Path, tmp_path: Path) -> None:
    changes = {"samplers": ["ddim"], "steps": [1], "scales": [], "scale_steps": 1}
    run(text_run, tmp_path, **changes)
    (tmp_path / "points" / "ddim-1-3.json").write_text('{"settings":')
    with pytest.raises(ConfigError, match="ddim-1-3.json: damaged; remove it"):
        run(text_run, tmp_path, **changes)


def test_a_class_model_is_drawn_by_class_and_has_no_captions(
    class_run: Path, tmp_path: Path
) -> None:
    run(class_run, tmp_path, samplers=["dpmpp_2m"], steps=[2], scales=[1.0], scale_steps=2)
    assert point(tmp_path, "dpmpp_2m-2-3").retrieval is None
    page = (tmp_path / "report.html").read_text()
    assert "etrieval" not in page
    assert "retrieval" not in (tmp_path / "points.csv").read_text()
    assert "of “food-drink”" in page


def test_every_sampler_can_be_studied(text_run: Path, tmp_path: Path) -> None:
    default = SamplingStudy(model="m", data=EmojiDataConfig())
    run(text_run, tmp_path, samplers=default.samplers, samples=4, steps=[2], scales=[])
    assert len(list((tmp_path / "points").glob("*.json"))) == len(default.samplers) == 8


def test_the_real_pictures_are_those_of_the_run_unless_others_are_named(
    text_run: Path, tmp_path: Path
) -> None:
    pipeline, recipe = load(text_run, device="cpu"), load_recipe(text_run / "recipe.yaml")
    same = data_config(pipeline, recipe, None)
    assert same == recipe.data
    emoji = data_config(pipeline, recipe, "emoji")
    assert isinstance(emoji, EmojiDataConfig)
    assert (emoji.subset, emoji.split, emoji.resolution) == (None, "train", 32)
    assert data_config(pipeline, recipe, "emoji:validation").split == "validation"
    folder = data_config(pipeline, recipe, str(tmp_path))
    assert folder == FolderDataConfig(path=str(tmp_path), resolution=32)
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        data_config(pipeline, recipe, "emoji:trian")
    with pytest.raises(ConfigError, match="no recipe.yaml says what it was trained on"):
        data_config(pipeline, None, None)


def test_data_without_what_the_model_draws_from_are_refused(
    text_run: Path, class_run: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("red-apple", "banana", "lemon"):
        emoji_image(name, 32).save(pictures / f"{name}.png")
    with pytest.raises(DataError, match="3 images are too few to compare with; give at least 4"):
        run(text_run, tmp_path / "out", against=str(pictures))
    emoji_image("carrot", 32).save(pictures / "carrot.png")
    with pytest.raises(DataError, match="no captions, and the model draws from them"):
        run(text_run, tmp_path / "out", against=str(pictures))
    with pytest.raises(DataError, match="no classes, and the model draws from them"):
        run(class_run, tmp_path / "out", against=str(pictures))
    assert not (tmp_path / "out").exists()


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
    bench = Bench(pipeline, EmojiData(config), study, tmp_path)
    prompts = [fields["prompt"] for fields in bench.fields]
    assert prompts[:8] == ["red apple", "banana", "lemon", "carrot"] * 2
    assert [fields["seed"] for fields in bench.fields] == list(range(5, 14))
