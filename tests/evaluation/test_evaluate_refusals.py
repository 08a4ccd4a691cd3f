"""What `evaluate` refuses, in one line each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezzotint import evaluate, load
from mezzotint.errors import CheckpointError, ConfigError, DataError, MezzotintError, RequestError
from mezzotint.evaluation.card import incomparable
from mezzotint.evaluation.protocol import PROTOCOLS, EvaluationProtocol

Write = Callable[..., Path]


def changed(protocol: EvaluationProtocol, **changes: Any) -> EvaluationProtocol:
    return EvaluationProtocol.from_dict(protocol.to_dict() | changes)


def refused(kind: type[MezzotintError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        evaluate(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_few_pictures(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    three, many = write_pictures(tmp_path / "a", 3), write_pictures(tmp_path / "b", 30)
    message = refused(DataError, three, many, protocol)
    assert "a: 3 pictures, but fid needs 8, precision needs 4" in message
    message = refused(DataError, many, three, protocol)
    assert "b" not in message.partition(":")[0].rpartition("/")[2] and "3 pictures, but" in message
    message = refused(DataError, many, many, changed(protocol, fewer=False))
    assert "30 pictures, but 64 are to be measured; ask for fewer by samples (--samples 30)" in (
        message
    )
    message = refused(
        ConfigError, many, many, changed(protocol, kid_subsets=100, samples=1000), samples=30
    )
    assert "samples: 30 are too few: kid takes at least 1,000" in message
    assert "samples: " in refused(ConfigError, many, many, protocol, samples=0)


def test_folders_that_cannot_be_measured(
    tmp_path: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    real = write_pictures(tmp_path / "real", 30)
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(DataError, tmp_path / "empty", real, protocol)
    assert "no pictures" in refused(DataError, real, tmp_path / "empty", protocol)
    message = refused(DataError, tmp_path / "raal", real, protocol)
    assert "no such model, nor folder of pictures; did you mean" in message
    assert "neither a folder nor 'emoji'" in refused(DataError, real, "nothing", protocol)
    message = refused(ConfigError, real, real, protocol, steps=5)
    assert "steps: " in message and "is no model" in message
    (real / "007.png").write_bytes((real / "007.png").read_bytes()[:-40])
    assert "007.png: broken" in refused(DataError, real, real, protocol)


def test_networks_that_are_not_there(tmp_path: Path, write_pictures: Write) -> None:
    folder = write_pictures(tmp_path / "a", 30)
    message = refused(CheckpointError, folder, folder, "adm", samples=30)
    assert "inception-v3-fid" in message and "weights" in message
    message = refused(
        ConfigError, folder, folder, "small", samples=30, weights={"inception-v3": "x.pt"}
    )
    assert "the protocol small does not use 'inception-v3'; Choose from: mobilenet-v2" in message
    mine = EvaluationProtocol.from_dict(
        PROTOCOLS["adm"].to_dict() | {"name": "mine", "network": "vgg16", "samples": 30}
    )
    message = refused(ConfigError, folder, folder, mine)
    assert "inception_score needs class logits, which the network 'vgg16' has not" in message
    wrong = tmp_path / "weights.safetensors"
    wrong.write_bytes(b"weights")
    located = {"inception-v3-fid": f"{wrong}#{'0' * 64}"}
    message = refused(CheckpointError, folder, folder, "adm", samples=30, weights=located)
    assert "sha256" in message.lower() and "weights.safetensors" in message
    assert "did you mean 'small'" in refused(ConfigError, folder, folder, "smal")


@pytest.mark.parametrize("name", ["resolution", "against_resolution"])
@pytest.mark.parametrize("value", [0, -4])
def test_a_side_is_at_least_1(
    clothes: Path, protocol: EvaluationProtocol, name: str, value: int
) -> None:
    message = refused(ConfigError, clothes / "test", clothes, protocol, **{name: value})
    assert message == f"{name}: must be at least 1, got {value}"


def test_models_and_data_that_do_not_fit(
    tmp_path: Path,
    class_model: Path,
    clothes: Path,
    write_pictures: Write,
    protocol: EvaluationProtocol,
) -> None:
    plain = write_pictures(tmp_path / "plain", 20)
    message = refused(DataError, class_model, plain, protocol)
    assert "has no classes" in message and "sub-folder per class" in message
    for name in ("hat", "sock"):
        write_pictures(tmp_path / "other" / name, 10)
    assert "unknown class 'sock'" in refused(
        RequestError, class_model, tmp_path / "other", protocol
    )
    assert "resolution" in refused(ConfigError, class_model, clothes, protocol, resolution=8)
    assert "steps: 1001" in refused(RequestError, class_model, clothes, protocol, steps=1001)
    message = refused(RequestError, class_model, clothes, protocol, sampler="lcm", steps=51)
    assert message == "steps: must be from 1 to 50, got 51"
    message = refused(ConfigError, class_model, clothes, protocol, step=5)
    assert "did you mean 'steps'" in message
    message = refused(ConfigError, class_model, clothes, changed(protocol, ema=False))
    assert "holds the averaged ones" in message
    message = refused(ConfigError, load(class_model), clothes, protocol, processes=2)
    assert "processes" in message
    assert "name it *.png" in refused(ConfigError, class_model, clothes, protocol, grid="a.jpg")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "--resume" in refused(CheckpointError, tmp_path / "run", clothes, protocol)


def test_a_text_model_against_pictures_without_captions(
    tmp_path: Path, text_run: Path, write_pictures: Write, protocol: EvaluationProtocol
) -> None:
    folder = write_pictures(tmp_path / "a", 20, side=32)
    message = refused(DataError, text_run, folder, protocol)
    assert "the model draws from captions" in message and "'text'" in message
    rows = [
        {"file_name": p.name, "words": f"a picture, {k}"}
        for k, p in enumerate(sorted(folder.glob("*.png")))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    card = evaluate(text_run, folder, protocol, caption_column="words", steps=1, samples=8)
    assert card.drawn_with is not None and card.drawn_with.task == "text-to-image"
    card = evaluate(text_run, "emoji:validation", protocol, steps=1, samples=8)
    assert card.drawn_with is not None
    assert card.drawn_with.conditions == "captions of emoji:validation, in its proportions"


def test_what_could_not_be_compared_is_refused_before_anything_is_drawn(
    tmp_path: Path, class_model: Path, clothes: Path, protocol: EvaluationProtocol
) -> None:
    options: dict[str, Any] = {"samples": 18, "steps": 1}
    before = evaluate(class_model, clothes, protocol, **options)
    again = evaluate(class_model, clothes, protocol, compare_with=before, **options)
    assert incomparable(before, again) == []
    other = changed(protocol, manifold_k=2)
    work = tmp_path / "work"
    message = refused(
        DataError, class_model, clothes, other, compare_with=before, work=work, steps=1, samples=17
    )
    assert "protocol.manifold_k (3 against 2)" in message
    assert "count of pictures (18 against 17)" in message
    assert not work.exists()
