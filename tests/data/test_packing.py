"""Looking at data, and writing them as shards: what comes back is what went in."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shard_files import picture, sample, write_shards, write_tar

from mezzotint.data import ShardData, WebDatasetConfig
from mezzotint.data.base import Fault
from mezzotint.data.inspection import inspect_images
from mezzotint.data.packing import pack
from mezzotint.data.sources import open_source, source_config
from mezzotint.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven captioned images of several kinds and shapes, two of them equal, and three faults."""
    root = tmp_path / "things"
    root.mkdir()
    rows = []
    shapes = [("png", (24, 16)), ("jpg", (64, 64)), ("webp", (300, 200)), ("bmp", (20, 40))]
    for k in range(7):
        kind, size = shapes[k % 4]
        path = root / f"{k}.{kind}"
        Image.new("RGB", size, (k * 9 % 63, 8, 9)).save(path)
        rows.append({"file_name": path.name, "text": f"a thing {k // 3}"})
    (root / "7.png").write_bytes((root / "0.png").read_bytes())
    (root / "8.png").write_bytes(b"no picture")
    rows += [{"file_name": f"{k}.png", "text": "a twin"} for k in (7, 8)]
    rows += [{"file_name": "9.png", "text": "gone"}, {"file_name": "0.png", "text": None}]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_packed_and_read_again(folder: Path, tmp_path: Path) -> None:
    found = open_source(source_config(str(folder)))
    done: list[int] = []
    packed = pack(found.entries, tmp_path / "shards", 3, done.append)
    assert (packed.images, packed.shards) == (8, 3) and done[-1] == 11
    assert {fault.name for fault in packed.faults} == {"0.png", "8.png", "9.png"}
    data = ShardData(WebDatasetConfig(urls=str(tmp_path / "shards"), stream=False, resolution=16))
    whole = sorted(p for p in folder.iterdir() if p.name not in ("8.png", "metadata.jsonl"))
    for k, path in enumerate(whole):
        entry = data._entries[k]
        assert entry.file.read() == path.read_bytes()
        assert entry.captions == (
            "a twin" if path.stem == "7" else f"a thing {int(path.stem) // 3}",
        )


def test_the_shards_are_those_of_img2dataset(folder: Path, tmp_path: Path) -> None:
    pack(open_source(source_config(str(folder))).entries, tmp_path / "shards", 3)
    names = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert names == [f"0000{k}{end}" for k in range(3) for end in (".tar", "_stats.json")]
    stats = [
        json.loads((tmp_path / "shards" / f"0000{k}_stats.json").read_text()) for k in range(3)
    ]
    assert [s["successes"] for s in stats] == [3, 3, 2]
    assert sum(s["count"] for s in stats) == 11
    assert all(s["status_dict"]["success"] == s["successes"] for s in stats)
    with tarfile.open(tmp_path / "shards/00001.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        read = {name: file.read() for name, file in members.items() if file is not None}
    assert sorted({name.partition(".")[0] for name in read}) == [
        "000010000", "000010001", "000010002",
    ]  # fmt: skip
    told = json.loads(read["000010000.json"])
    image = (folder / "3.bmp").read_bytes()
    assert read["000010000.bmp"] == image and read["000010000.txt"] == b"a thing 1"
    assert told["sha256"] == hashlib.sha256(image).hexdigest()
    assert (told["width"], told["height"], told["status"]) == (20, 40, "success")


def test_classes_are_packed_and_shards_packed_anew(tmp_path: Path) -> None:
    for name in ("apple", "leaf"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "classes" / name / f"{k}.png").write_bytes(picture(k + len(name)))
    pack(open_source(source_config(str(tmp_path / "classes"))).entries, tmp_path / "a", 4)
    again = source_config(str(tmp_path / "a"))
    assert isinstance(again, WebDatasetConfig) and again.class_column == "cls"
    assert again.caption_column is None
    pack(open_source(again).entries, tmp_path / "b", 2)
    one, two = (
        ShardData(
            WebDatasetConfig(
                urls=str(tmp_path / name), stream=False, caption_column=None, class_column="cls"
            )
        )
        for name in "ab"
    )
    assert one.class_names == two.class_names == ("apple", "leaf")
    assert one.fingerprint == two.fingerprint


def test_there_is_never_a_part_of_a_folder(folder: Path, tmp_path: Path) -> None:
    found = open_source(source_config(str(folder)))

    def stop(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(found.entries, tmp_path / "shards", 2, stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["things"]
    with pytest.raises(DataError, match="things: is there already"):
        pack(found.entries, folder, 2)
    with pytest.raises(DataError, match="no whole image to write; a: broken"):
        pack([Fault("a", "broken")], tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_report_counts_what_is_there(folder: Path) -> None:
    report = inspect_images(open_source(source_config(str(folder))).entries)
    assert report.images == 8 and report.duplicates == 1
    assert report.kinds == {"png": 3, "jpg": 2, "webp": 2, "bmp": 1}
    assert report.short_sides == {"under 32": 4, "64-127": 2, "128-255": 2}
    assert report.ratios == {"3:2": 5, "1:1": 2, "1:2": 1}
    assert (report.smallest, report.largest) == ((24, 16), (300, 200))
    assert (report.captioned, report.without_caption) == (8, 1)
    assert report.words == (2, 23 / 8, 3) and report.distinct_captions == 4
    assert dict(report.frequent_captions) == {"a thing 0": 3, "a thing 1": 3}
    assert sorted(fault.name for fault in report.faults) == ["0.png", "8.png", "9.png"]
    assert json.loads(json.dumps(report.to_dict()))["images"] == 8
    told = dict(report.lines())
    assert told["captions"] == "8; 11.1% are missing" and told["faults"] == "3"


def test_what_a_name_stands_for(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2, 1)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.parquet").write_bytes(b"")
    kinds = {
        str(folder): "folder",
        str(tmp_path / "tars"): "webdataset",
        str(tmp_path / "tars/0000{0..1}.tar"): "webdataset",
        str(tmp_path / "tables"): "parquet",
        "hub:owner/name": "hub",
        str(tmp_path / "gone"): "folder",
    }
    assert {name: source_config(name).kind for name in kinds} == kinds
    with pytest.raises(DataError, match="no such folder"):
        open_source(source_config(str(tmp_path / "gone")))
    with pytest.raises(DataError, match="no shard holds a picture"):
        source_config(str(write_tar(tmp_path / "one.tar", {"a.txt": b"words"})))


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mezzotint.cli.data import app

    call = CliRunner().invoke
    done = call(app, ["inspect", str(folder)])
    assert done.exit_code == 0
    assert "images      8, " in done.stdout and "9.png: no such file" in done.stdout
    assert "3 times 'a thing 0'" in done.stdout
    done = call(app, ["pack", str(folder), "-o", str(tmp_path / "a"), "--shard-size", "4"])
    assert done.exit_code == 0 and done.stdout.endswith("8 images in 2 shards\n")
    assert "left out 9.png: no such file" in done.stderr
    done = call(app, ["inspect", str(tmp_path / "a/{00000..00001}.tar"), "--json"])
    told = json.loads(done.stdout)
    assert told["images"] == 8 and told["faults"] == []
    done = call(app, ["inspect", "emoji-demo"])
    assert "images      48, " in done.stdout and "ratio       1:1 48" in done.stdout


def test_a_sample_may_lack_a_caption(tmp_path: Path) -> None:
    members = sample("a", 1) | {"b.png": picture(2)}
    found = open_source(source_config(str(write_tar(tmp_path / "one.tar", members))))
    report = inspect_images(found.entries)
    assert (report.images, report.without_caption) == (1, 1)
