"""The named protocols say what their sources say; one's own is a file."""

from pathlib import Path

import pytest
import yaml

from mezzotint.config import to_yaml
from mezzotint.errors import ConfigError
from mezzotint.evaluation.protocol import METRICS, PROTOCOLS, EvaluationProtocol, get_protocol


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "ldm-2022",  # appendix E.3: torch-fidelity's FID, ADM's precision and recall
            {
                "network": "inception-v3-fid",
                "manifold_network": None,
                "manifold_k": 3,
                "resize": "tf1-bilinear",
                "samples": 50_000,
                "fewer": False,
                "reference_split": "train",
                "reference_samples": None,
                "manifold_reference_samples": 10_000,
                "inception_splits": 10,
                "inception_shuffle_seed": 2020,
                "ema": True,
            },
        ),
        (
            "adm",
            {
                "network": "inception-v3-fid",
                "resize": "tf1-bilinear",
                "samples": 50_000,
                "manifold_k": 3,
                "manifold_reference_samples": 10_000,
                "inception_shuffle_seed": None,
                "real_side": "reference",
            },
        ),
        (
            "torch-fidelity",
            {
                "network": "inception-v3-fid",
                "resize": "tf1-bilinear",
                "manifold_network": "vgg16",
                "manifold_k": 3,
                "manifold_reference_samples": None,
                "real_side": "reference",
                "kid_subsets": 100,
                "kid_subset_size": 1000,
                "inception_splits": 10,
                "inception_shuffle_seed": 2020,
            },
        ),
        (
            "clean-fid",
            {
                "network": "inception-v3-fid",
                "resize": "pil-bicubic",
                "kid_subsets": 100,
                "kid_subset_size": 1000,
            },
        ),
        (
            "small",
            {
                "network": "mobilenet-v2",
                "kid_subsets": None,
                "fewer": True,
                "resize": "bicubic-antialias",
            },
        ),
        (
            "reconstruction",
            {
                "network": "mobilenet-v2",
                "fewer": True,
                "reference_split": "validation",
                "of_first_stages": True,
            },
        ),
    ],
)
def test_the_facts_of_each(name: str, facts: dict[str, object]) -> None:
    protocol = get_protocol(name)
    assert {key: getattr(protocol, key) for key in facts} == facts
    assert protocol.dtype == "uint8"


def test_the_names_are_their_own_and_frozen() -> None:
    assert {name: p.name for name, p in PROTOCOLS.items()} == {name: name for name in PROTOCOLS}
    assert PROTOCOLS["small"].metrics[0] == "kid"
    assert "retrieval" in PROTOCOLS["small"].metrics
    assert [name for name, p in PROTOCOLS.items() if p.of_first_stages] == ["reconstruction"]
    with pytest.raises(TypeError):
        PROTOCOLS["mine"] = PROTOCOLS["small"]  # pyright: ignore
    with pytest.raises(ValueError, match="frozen"):
        PROTOCOLS["small"].samples = 3  # pyright: ignore


def test_each_network_is_looked_through_once() -> None:
    protocol = PROTOCOLS["torch-fidelity"]
    assert protocol.networks == ("inception-v3-fid", "vgg16")
    assert protocol.network_of("recall") == "vgg16"
    assert protocol.network_of("kid") == "inception-v3-fid"
    assert PROTOCOLS["clean-fid"].networks == ("inception-v3-fid",)
    assert PROTOCOLS["adm"].network_of("precision") == "inception-v3-fid"


def test_ones_own_protocol_is_a_file(tmp_path: Path) -> None:
    mine = PROTOCOLS["adm"].model_copy(update={"name": "mine", "samples": 10_000})
    (tmp_path / "mine.yaml").write_text(to_yaml(mine))
    assert get_protocol(tmp_path / "mine.yaml") == mine


def test_what_each_metric_needs() -> None:
    protocol = PROTOCOLS["torch-fidelity"]
    assert {m: protocol.needs_of(m) for m in METRICS if m != "fid"} == {
        "kid": 1000,
        "inception_score": 20,
        "precision": 4,
        "recall": 4,
        "density": 6,
        "coverage": 6,
        "nearest_training": 2,
        "retrieval": 1,
        **dict.fromkeys(("rate", "psnr", "ssim", "lpips", "rkid", "rfid"), 3),
    }
    assert (protocol.needs(), protocol.needed_by()) == (1000, "kid")
    assert PROTOCOLS["small"].needs() == 20  # ten groups of two for FID's standard error


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'torch-fidelity'"):
        get_protocol("torch-fidelty")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        get_protocol("nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": "mobilenet"}, "did you mean 'mobilenet-v2'"),
        ({"samples": 0}, "samples: "),
        (
            {"samples": 500, "kid_subsets": 100},
            "samples: 500 are too few: kid takes at least 1,000",
        ),
        ({"metrics": ["kid", "kid"]}, "a metric stands there twice"),
        ({"metrics": []}, "metrics"),
        ({"resamples": 1}, "at least 2, or 0"),
        ({"resise": "tf1-bilinear"}, "did you mean 'resize'"),
        ({"name": "adm"}, "is a built-in protocol"),
        (
            {"manifold_reference_samples": 5},
            "manifold_reference_samples: 5 are too few: density takes at least 6",
        ),
        ({"metrics": ["kid", "psnr"]}, "psnr is of a first stage, and others are of a set"),
        ({"metrics": ["psnr"], "network": "random"}, "are measured on mobilenet-v2"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    values = PROTOCOLS["small"].to_dict() | {"name": "mine"} | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        get_protocol(tmp_path / "mine.yaml")
    assert told in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    values = PROTOCOLS["small"].to_dict() | {"samples": -1, "resize": "none", "wight": 3}
    with pytest.raises(ConfigError) as caught:
        EvaluationProtocol.from_dict(values)
    assert all(key in str(caught.value) for key in ("samples", "resize", "wight"))
