"""Parquet files, and data sets laid out as those of the hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import picture

from mezzotint.data import HubDataConfig, ParquetDataConfig, TableData, open_data
from mezzotint.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library keeps its copies, instead of the home of whoever tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def table(count: int = 9, **columns: list[Any]) -> Any:
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": picture(k), "path": None} for k in range(count)],
        "text": [f"number {k}" for k in range(count)],
        "kind_of": [k % 3 for k in range(count)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "kind_of": datasets.ClassLabel(names=["c", "b", "a"]),
        }
        | {name: datasets.Value("string") for name in columns}
    )
    return datasets.Dataset.from_dict(rows | columns, features=features)


def open_parquet(path: object, **settings: object) -> TableData:
    values = {"path": str(path), "resolution": 16, **settings}
    data = open_data(ParquetDataConfig.from_dict(values))
    assert isinstance(data, TableData)
    return data


def test_rows_are_images(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "one.parquet")
    data = open_parquet(tmp_path / "one.parquet", caption_column="text", class_column="kind_of")
    assert (len(data), data.class_names, data.faults) == (9, ("c", "b", "a"), [])
    for k in range(9):
        example = data.load(k)
        assert int(example.image[0, 0, 0]) == k
        assert (example.caption, example.label) == (f"number {k}", k % 3)
    again = open_parquet(tmp_path, caption_column="text", class_column="kind_of", cache_limit_mib=0)
    assert torch.equal(again.load(4).image, data.load(4).image)
    assert again.fingerprint == data.fingerprint
    assert open_parquet(tmp_path / "*.parquet").load(3).caption is None
    ordered = open_parquet(tmp_path, class_column="kind_of", classes=["a", "b", "c"])
    assert [ordered.load(k).label for k in range(3)] == [2, 1, 0]


def test_images_may_be_bytes_or_paths_inside_the_folder(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    bare = pa.table({"image": [picture(k) for k in range(3)], "n": ["x", "y", "x"]})
    pa.parquet.write_table(bare, tmp_path / "bytes.parquet")
    data = open_parquet(tmp_path / "bytes.parquet", class_column="n")
    assert [int(data.load(k).image[0, 0, 0]) for k in range(3)] == [0, 1, 2]
    assert data.class_names == ("x", "y")
    folder = tmp_path / "paths"
    (folder / "images").mkdir(parents=True)
    (folder / "images/a.png").write_bytes(picture(5))
    (tmp_path / "secret.png").write_bytes(picture(6))
    names = ["images/a.png", "../secret.png", str(tmp_path / "secret.png"), "gone.png", None]
    pa.parquet.write_table(pa.table({"image": names}), folder / "a.parquet")
    data = open_parquet(folder / "a.parquet", max_broken=0.9)
    assert len(data) == 1 and int(data.load(0).image[0, 0, 0]) == 5
    reasons = [fault.reason for fault in data.faults]
    assert ["leads out of the folder" in reason for reason in reasons] == [True, True, False, False]
    assert reasons[2:] == ["no such file", "no image"]


def test_a_path_is_from_the_folder_of_its_own_parquet_file(tmp_path: Path) -> None:
    """The same name in several folders is another picture in each; and files differ in length."""
    import pyarrow as pa
    import pyarrow.parquet

    wanted: dict[str, int] = {}
    for number, (folder, count) in enumerate({"b": 3, "a": 1, "c/d": 2}.items()):
        (tmp_path / folder).mkdir(parents=True)
        names = [f"{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            wanted[f"{folder} {name}"] = 10 * number + k
            (tmp_path / folder / name).write_bytes(picture(10 * number + k))
        texts = [f"{folder} {name}" for name in names]
        rows = pa.table({"image": names, "text": texts})
        pa.parquet.write_table(rows, tmp_path / folder / "rows.parquet")
    for path in (tmp_path, tmp_path / "**/*.parquet"):
        data = open_parquet(path, caption_column="text")
        found = [data.load(k) for k in range(len(data))]
        assert {e.caption: int(e.image[0, 0, 0]) for e in found} == wanted and len(found) == 6


def test_one_of_several_captions_is_chosen(tmp_path: Path) -> None:
    rows = {
        "image": [{"bytes": picture(k), "path": None} for k in range(2)],
        "texts": [["one", "two", "three", " "], []],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = open_parquet(tmp_path, caption_column="texts", max_broken=0.5, flip=True)
    assert [fault.name for fault in data.faults] == ["row 1"]
    assert data.load(0).caption == "one"
    drawn = []
    for seed in range(40):
        drawn.append(data.load(0, torch.Generator().manual_seed(seed)).caption)
        same = data.describe(0, torch.Generator().manual_seed(seed)).caption
        assert same == drawn[-1]
    assert set(drawn) == {"one", "two", "three"}


def test_damage_is_told(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "one.parquet")
    with pytest.raises(DataError, match="caption_column: no column 'txt'.*did you mean 'text'"):
        open_parquet(tmp_path / "one.parquet", caption_column="txt")
    with pytest.raises(DataError, match="image_column: no column 'picture'"):
        open_parquet(tmp_path / "one.parquet", image_column="picture")
    with pytest.raises(DataError, match="no such file, folder or pattern; did you mean .*one.parq"):
        open_parquet(tmp_path / "ones.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no parquet files in this folder"):
        open_parquet(tmp_path / "empty")
    (tmp_path / "two.parquet").write_bytes((tmp_path / "one.parquet").read_bytes()[:300])
    with pytest.raises(DataError, match="two.parquet: cannot be read as a table of images"):
        open_parquet(tmp_path / "two.parquet")
    with pytest.raises(DataError, match="9 of 9 images are broken.*row 0 .no such file"):
        open_parquet(tmp_path / "one.parquet", image_column="text")
    with pytest.raises(DataError, match="cannot be read as a table of images"):
        open_parquet(tmp_path / "one.parquet", image_column="kind_of")


def test_a_hub_data_set_is_opened_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "things"
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(3).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    values = {"name": str(folder), "resolution": 16, "class_column": "kind_of"}
    data = open_data(HubDataConfig.from_dict(values))
    assert (len(data), data.class_names) == (9, ("c", "b", "a"))
    assert len(open_data(HubDataConfig.from_dict({**values, "split": "test"}))) == 3
    part = open_data(HubDataConfig.from_dict({**values, "split": "train[3:5]"}))
    assert [int(part.load(k).image[0, 0, 0]) for k in range(2)] == [3, 4]
    with pytest.raises(DataError, match="dev: cannot be read as a table.*[Uu]nknown split"):
        open_data(HubDataConfig.from_dict({**values, "split": "dev"}))
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="cannot be read as a table of images"):
        open_data(HubDataConfig.from_dict({**values, "name": "no-one/has-this"}))
