from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from mezzotint.config import Config, Document, apply_overrides, read_yaml, to_yaml
from mezzotint.errors import ConfigError


class Optimizer(Config):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Kl(Config):
    kind: Literal["kl"] = "kl"
    latent_channels: int = 4


class Vq(Config):
    kind: Literal["vq"] = "vq"
    codebook_size: int = 512


class Plan(Document):
    FORMAT_VERSION: ClassVar[int] = 3
    format_version: int = 3

    name: str
    model: Annotated[Kl | Vq, Field(discriminator="kind")] = Kl()
    optimizer: Optimizer = Optimizer()
    stages: tuple[Optimizer, ...] = ()
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Plan":
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high, {self.high}")
        return self


def message(data: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        Plan.from_dict(data, "plan.yaml")
    return str(caught.value)


def test_all_mistakes_are_told_at_once_each_in_one_line() -> None:
    told = message(
        {
            "optimizer": {"learning_rate": -1, "beta": [0, 1]},
            "model": {"kind": "vq", "codebook_sise": 3},
            "stages": [{}, {"learning_rat": 1}],
        }
    )
    first, *lines = told.splitlines()
    assert first == "plan.yaml: "
    assert sorted(line.strip() for line in lines) == [
        "name: required, but missing",
        "optimizer.learning_rate: Input should be greater than 0, got -1",
        "unknown key 'model.codebook_sise'; did you mean 'codebook_size'?"
        " Choose from: codebook_size, kind",
        "unknown key 'optimizer.beta'; did you mean 'betas'? Choose from: betas, learning_rate",
        "unknown key 'stages.1.learning_rat'; did you mean 'learning_rate'?"
        " Choose from: betas, learning_rate",
    ]


def test_one_mistake_is_one_line() -> None:
    told = message({"name": "a", "nane": "b"})
    assert told.startswith("plan.yaml: unknown key 'nane'; did you mean 'name'?")
    assert "\n" not in told


def test_a_mistake_between_fields_names_the_field() -> None:
    assert message({"name": "a", "low": 3}) == "plan.yaml: low: 3 is above high, 1"


def test_an_unknown_kind_is_told_with_the_kinds_that_there_are() -> None:
    told = message({"name": "a", "model": {"kind": "gan"}})
    assert "model" in told
    assert "'kl'" in told
    assert "'vq'" in told


def test_a_newer_version_is_refused_and_an_older_one_migrated() -> None:
    told = message({"name": "a", "format_version": 4})
    assert told == (
        "plan.yaml: format_version 4 is newer than the 3 that this Mezzotint reads;"
        " upgrade Mezzotint"
    )

    class Renamed(Plan):
        @classmethod
        def migrate(cls, data: dict[str, object]) -> dict[str, object]:
            if data.get("format_version") == 2:
                data["name"] = data.pop("title")
                data["format_version"] = 3
            return data

    plan = Renamed.from_dict({"format_version": 2, "title": "old"})
    assert (plan.name, plan.format_version) == ("old", 3)


def test_a_config_is_frozen() -> None:
    plan = Plan(name="a")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        plan.name = "b"  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_validated_too() -> None:
    class Wrong(Config):
        steps: Annotated[int, Field(ge=1)] = 0

    with pytest.raises(ConfigError, match="steps"):
        Wrong.from_dict({})


@settings(max_examples=40)
@given(
    name=st.text(st.characters(codec="utf-8"), max_size=20),
    rate=st.floats(1e-9, 1e3),
    size=st.integers(1, 10**6),
    low=st.integers(-5, 0),
)
def test_plain_values_and_yaml_are_round_trips(name: str, rate: float, size: int, low: int) -> None:
    plan = Plan(
        name=name, model=Vq(codebook_size=size), optimizer=Optimizer(learning_rate=rate), low=low
    )
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(yaml.safe_load(to_yaml(plan))) == plan


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=2e-4", 2e-4),
        ("optimizer.learning_rate=3", 3),
        ("optimizer.betas=[0.5, 0.9]", [0.5, 0.9]),
        ("optimizer.learning_rate=null", None),
        ("optimizer.name=adam=w", "adam=w"),
        ("optimizer.on=true", True),
    ],
)
def test_overrides_are_read_as_yaml(override: str, value: object) -> None:
    data = {"optimizer": {"learning_rate": 1.0}, "name": "a"}
    key = override.partition("=")[0].split(".")[1]
    assert apply_overrides(data, [override])["optimizer"][key] == value
    assert data == {"optimizer": {"learning_rate": 1.0}, "name": "a"}


def test_an_override_makes_the_keys_that_lead_to_it() -> None:
    assert apply_overrides({}, ["a.b.c=1", "a.d=2"]) == {"a": {"b": {"c": 1}, "d": 2}}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "override 'seed': expected dotted.key=value"),
        ("=3", "override '=3': expected dotted.key=value"),
        ("name.x=3", "override 'name.x=3': 'name' holds no keys"),
        ("name=[1", "override 'name=[1': the value is not valid YAML"),
    ],
)
def test_a_wrong_override_says_how_one_is_written(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"name": "a"}, [override])
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2\n", ", line 2: not valid YAML"),
        ("- 1\n- 2\n", ": expected keys and values, got list"),
        ("", ": expected keys and values, got NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}{told}"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "latin.yaml")
