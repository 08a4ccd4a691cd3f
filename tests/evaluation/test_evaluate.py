"""From a model or a folder to a card."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mezzotint import evaluate, load
from mezzotint.config import to_yaml
from mezzotint.data import EmojiDataConfig, FolderData, FolderDataConfig
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.evaluation.card import EvaluationCard, incomparable
from mezzotint.evaluation.distributions import nearest_neighbours
from mezzotint.evaluation.drawing import spread, targets_of
from mezzotint.evaluation.metrics import retrieval
from mezzotint.evaluation.pictures import EmojiPictures, PictureFolder
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.generation.request import FeatureReuse
from mezzotint.models.features import load_features

Write = Callable[..., Path]


def values(card: EvaluationCard) -> dict[str, float]:
    return {name: number.value for name, number in card.numbers.items()}


def changed(protocol: EvaluationProtocol, **changes: Any) -> EvaluationProtocol:
    return EvaluationProtocol.from_dict(protocol.to_dict() | changes)


def test_pictures_against_themselves(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder = write_pictures(tmp_path / "a", 40)
    found = values(evaluate(folder, folder, protocol))
    assert found["fid_random"] == pytest.approx(0.0, abs=1e-6)
    assert found["kid_random"] < 0.0  # unbiased: a picture's kernel with itself is not in it
    assert found["precision_random"] == found["recall_random"] == found["coverage_random"] == 1.0
    assert found["nearest_training_random"] == 0.0


def test_the_card_says_what_was_measured(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder, real = write_pictures(tmp_path / "a", 20), write_pictures(tmp_path / "b", 30, seed=1)
    Image.new("L", (16, 16)).save(folder / "grey.png")
    Image.new("RGBA", (16, 16)).save(folder / "glass.png")
    card = evaluate(folder, real, protocol)
    assert card.protocol == protocol
    assert (card.evaluated.count, card.reference.count) == (22, 30)
    assert card.evaluated.converted == {"grey": 1, "transparent": 1}
    assert card.evaluated.description == str(folder)
    assert card.training == card.reference and card.drawn_with is None
    assert [n.name for n in card.networks] == ["random"]
    assert len(card.networks[0].weights_sha256) == 64
    assert set(card.versions) == {"mezzotint", "torch", "numpy", "torchmetrics", "pillow"}
    assert card.cost.features_seconds is not None and card.cost.features_seconds > 0
    card.write(tmp_path / "card.json")
    assert EvaluationCard.read(tmp_path / "card.json") == card


def test_the_numbers_do_not_depend_on_the_batches(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder, real = write_pictures(tmp_path / "a", 25), write_pictures(tmp_path / "b", 30, seed=1)
    first = values(evaluate(folder, real, protocol))
    second = values(evaluate(folder, real, changed(protocol, batch_size=7)))
    assert second == pytest.approx(first, rel=1e-5)


def test_fewer_samples_are_spread_over_the_folder(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder = write_pictures(tmp_path / "a", 40)
    card = evaluate(folder, folder, protocol, samples=20)
    assert (card.evaluated.count, card.evaluated.available) == (20, 40)
    assert (card.protocol.samples, card.protocol.fewer) == (20, False)
    assert values(card)["recall_random"] < 1.0
    assert values(card)["nearest_training_random"] == 0.0


def test_conditions_come_in_the_proportions_of_the_data() -> None:
    assert [spread(10, 4).count(k) for k in range(4)] == [3, 2, 3, 2]
    assert spread(3, 12) == [0, 4, 8]
    assert spread(24, 12) == [*range(12), *range(12)]


def test_a_model_draws_what_generate_draws(
    tmp_path: Path, class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    """Picture k from seed + k under the k-th class; the grid shows these very pictures."""
    grid = tmp_path / "deep" / "grid.png"
    work = tmp_path / "work"
    card = evaluate(
        class_model,
        clothes,
        protocol,
        samples=18,
        seed=7,
        steps=2,
        sampler="euler",
        guidance_scale=1.5,
        precision="float32",
        work=work,
        grid=grid,
    )
    assert card.reference.split == "train" and card.reference.count == 12
    drawn = card.drawn_with
    assert drawn is not None
    assert (drawn.seed, drawn.last_seed, drawn.steps, drawn.sampler) == (7, 24, 2, "euler")
    assert (drawn.guidance_scale, drawn.precision, drawn.task) == (1.5, "float32", "class-to-image")
    assert drawn.conditions == f"classes of {clothes}, in its proportions"
    assert drawn.spacing in ("leading", "trailing", "linspace", "karras")
    classes = ["boot"] * 6 + ["hat"] * 3 + ["shirt"] * 3 + ["boot"] * 3 + ["hat"] * 2 + ["shirt"]
    pipeline = load(class_model, precision="float32")
    sheet = np.asarray(Image.open(grid))
    for k in (0, 7, 17):
        alone = pipeline.generate(
            class_label=classes[k], seed=7 + k, steps=2, sampler="euler", guidance_scale=1.5
        )
        top, left = 4 + k // 8 * (16 + 16 + 4), 4 + k % 8 * 20
        shown = sheet[top : top + 16, left : left + 16].astype(int)
        assert np.abs(shown - np.asarray(alone[0].image)).max() <= 1  # other rows in its batch
    assert len(list((work / "evaluated").glob("*.safetensors"))) == 3


def test_pictures_can_be_drawn_faster_and_the_card_says_so(
    tmp_path: Path, text_run: Path, protocol: EvaluationProtocol
) -> None:
    real = EmojiDataConfig(names=("red-apple", "bus", "cloud", "key", "panda", "sun"))
    faster = {"guidance_interval": (0.5, 5.0), "feature_reuse": {"interval": 2}}
    cards = [
        evaluate(text_run, real, protocol, samples=12, steps=4, guidance_scale=2.0, **more)
        for more in ({}, faster)
    ]
    plain, fast = (card.drawn_with for card in cards)
    assert plain is not None and fast is not None
    assert plain.feature_reuse is None and plain.guidance_interval is None
    assert fast.feature_reuse == FeatureReuse(interval=2)
    assert fast.guidance_interval == (0.5, 5.0)
    assert cards[0].numbers != cards[1].numbers
    cards[1].write(tmp_path / "card.json")
    assert EvaluationCard.read(tmp_path / "card.json") == cards[1]


def test_a_pipeline_in_memory_and_its_folder_give_the_same(
    class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    options: dict[str, Any] = {"samples": 18, "steps": 2, "precision": "float32"}
    from_folder = evaluate(class_model, clothes, protocol, **options)
    in_memory = evaluate(load(class_model, precision="float32"), clothes, protocol, **options)
    assert values(in_memory) == values(from_folder)
    assert incomparable(in_memory, from_folder) == []


def test_a_test_split_is_compared_with_but_copies_are_looked_for_in_training(
    class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    card = evaluate(class_model, clothes, protocol, samples=18, split="test", steps=2)
    assert card.training is not None
    assert (card.reference.split, card.training.split) == ("test", "train")
    assert (card.reference.count, card.training.count) == (6, 12)


def test_a_work_folder_is_gone_on_with_and_not_for_another_run(
    tmp_path: Path, class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    options: dict[str, Any] = {"samples": 20, "steps": 2, "work": tmp_path / "work"}
    first = evaluate(class_model, clothes, protocol, **options)
    files = sorted((tmp_path / "work" / "evaluated").iterdir())
    times = [p.stat().st_mtime_ns for p in files]
    files[1].write_bytes(files[1].read_bytes()[:-100])  # a disk that lost its end
    files[2].unlink()
    done: list[tuple[str, int]] = []
    again = evaluate(
        class_model,
        clothes,
        protocol,
        on_progress=lambda what, so_far, total: done.append((what, so_far)),
        **options,
    )
    assert values(again) == values(first)
    assert done == [(f"drawing by {class_model}", n) for n in (8, 16, 20)]
    assert [p.stat().st_mtime_ns == t for p, t in zip(files, times, strict=True)] == [
        True,
        False,
        False,
    ]
    with pytest.raises(ConfigError) as caught:
        evaluate(class_model, clothes, protocol, **(options | {"steps": 3, "seed": 1}))
    message = str(caught.value)
    assert "begun with other values of drawn_with.last_seed, drawn_with.seed, drawn_with.steps" in (
        message
    )
    with pytest.raises(ConfigError, match="holds something else"):
        evaluate(class_model, clothes, protocol, **(options | {"work": clothes}))


def test_a_work_folder_of_its_own_is_cleared_away(
    class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    evaluate(class_model, clothes, protocol, samples=18, steps=2)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "mezzotint"
    assert list((cache / "evaluations").iterdir()) == []
    assert len(list((cache / "references").iterdir())) == 1


def test_ones_own_protocol_is_a_file(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(to_yaml(changed(protocol, name="mine", metrics=["kid"])))
    folder = write_pictures(tmp_path / "a", 10)
    card = evaluate(folder, folder, mine)
    assert card.protocol.name == "mine" and list(card.numbers) == ["kid_random"]


def test_sizes_follow_the_measured_pictures(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder = write_pictures(tmp_path / "a", 10)
    large = write_pictures(tmp_path / "b", 10, side=40, seed=1)
    assert evaluate(folder, large, protocol).reference.height == 16
    assert evaluate(folder, large, protocol, against_resolution=40).reference.height == 40
    card = evaluate(folder, large, protocol, resolution=12)
    assert (card.evaluated.height, card.reference.height) == (12, 12)


def test_copies_are_looked_for_among_training_pictures_alone(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    """However few of them the reference has; and not at all where they are not known."""
    drawn = write_pictures(tmp_path / "drawn", 20)
    for name, count in (("train", 30), ("test", 12)):
        write_pictures(tmp_path / "data" / name, count, seed=count)
    few = changed(protocol, reference_samples=10)
    card = evaluate(drawn, tmp_path / "data", few)
    assert card.training is not None
    assert (card.reference.count, card.training.count) == (10, 30)
    network = load_features("random")
    seen, known = (
        network.extract(PictureFolder(folder).read(0, count), "bicubic-antialias")[0]
        for folder, count in ((drawn, 20), (tmp_path / "data" / "train", 30))
    )
    expected = float(nearest_neighbours(seen, known)[0].double().median())
    assert values(card)["nearest_training_random"] == pytest.approx(expected, rel=1e-5)

    (tmp_path / "data" / "train").rename(tmp_path / "elsewhere")
    card = evaluate(drawn, tmp_path / "data", few, split="test")
    assert card.training is None
    assert "is held out, and no training pictures" in card.left_out["nearest_training"]
    assert not any(name.startswith("nearest_training") for name in card.numbers)
    assert "kid_random" in card.numbers
    alone = changed(few, metrics=["nearest_training"])
    with pytest.raises(DataError, match="nothing can be measured here: nearest_training: "):
        evaluate(drawn, tmp_path / "data", alone, split="test")


def test_one_broken_picture_of_many_is_skipped(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder = write_pictures(tmp_path / "a", 100, side=8)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:-40])
    card = evaluate(folder, folder, changed(protocol, samples=100, fewer=False))
    assert (card.evaluated.count, card.evaluated.broken, card.reference.broken) == (99, 1, 1)


def test_the_work_stays_until_the_card_is_safe(
    class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    def full(_: EvaluationCard) -> None:
        raise CheckpointError("the disk is full")

    options: dict[str, Any] = {"samples": 18, "steps": 1}
    with pytest.raises(CheckpointError, match="full"):
        evaluate(class_model, clothes, protocol, on_card=full, **options)
    work = Path(os.environ["XDG_CACHE_HOME"]) / "mezzotint" / "evaluations"
    assert len(list(work.glob("*/evaluated/*.safetensors"))) == 3
    done: list[int] = []
    told: list[EvaluationCard] = []
    card = evaluate(
        class_model,
        clothes,
        protocol,
        on_card=told.append,
        on_progress=lambda _, so_far, __: done.append(so_far),
        **options,
    )
    assert told == [card] and done == [18]  # nothing was drawn again
    assert list(work.iterdir()) == []


def test_retrieval_is_among_the_pictures_whose_captions_are_drawn(
    tmp_path: Path, text_run: Path, protocol: EvaluationProtocol
) -> None:
    asked = changed(protocol, metrics=["kid", "retrieval"])
    work = tmp_path / "work"
    real = EmojiDataConfig(names=("red-apple", "bus", "cloud", "key", "panda"))
    card = evaluate(text_run, real, asked, samples=12, steps=2, work=work)
    files = sorted((work / "evaluated").glob("*.safetensors"))
    drawn = torch.cat([load_file(path)["features.random"] for path in files])
    pictures = EmojiPictures(real.model_copy(update={"resolution": 32})).read(0, 5)
    known = load_features("random").extract(pictures, "bicubic-antialias")[0]
    named = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 2])
    right = retrieval(drawn, known) == named
    assert card.numbers["retrieval_random"].value == float(right.double().mean())
    assert card.left_out == {}


def test_without_captions_retrieval_is_left_out(
    class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    asked = changed(protocol, metrics=["kid", "retrieval"])
    for card in (
        evaluate(class_model, clothes, asked, samples=6, steps=1),
        evaluate(clothes / "test", clothes, asked),
    ):
        assert "a model drew from captions" in card.left_out["retrieval"]
        assert list(card.numbers) == ["kid_random"]


def test_targets_are_found_by_name(tmp_path: Path, write_pictures: Write) -> None:
    """Folders of pictures and data sets do not sort paths alike."""
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path / "a-b", 2, seed=1)
    pictures = PictureFolder(tmp_path)

    def describe(captions: list[str]) -> FolderData:
        rows = [
            {"file_name": name, "text": caption}
            for name, caption in zip(pictures.names, captions, strict=True)
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return FolderData(FolderDataConfig(path=str(tmp_path), caption_column="text"))

    data = describe([f"picture {name}" for name in pictures.names])
    targets = targets_of(data, 6, pictures.names)
    assert isinstance(targets, list)
    captions = [data.describe(k).caption for k in spread(6, 4)]
    assert [f"picture {pictures.names[k]}" for k in targets] == captions
    assert "not among those compared with" in str(targets_of(data, 6, pictures.names[1:]))
    same = describe(["one", "two", "two", "three"])
    assert "the same caption" in str(targets_of(same, 4, pictures.names))
