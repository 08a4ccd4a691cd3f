"""Real pictures: what a name means, and that their features are kept by content."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mezzotint.data import EmojiDataConfig, FolderDataConfig
from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation import reference as reference_module
from mezzotint.evaluation.card import versions
from mezzotint.evaluation.pictures import PictureFolder
from mezzotint.evaluation.reference import RealPictures, Reference, cache_path, features_of
from mezzotint.evaluation.shards import FeaturePass, NetworkSpec
from mezzotint.models.features import load_features

Write = Callable[..., Path]
SIZE = (16, 16)


def job(folder: Path, work: Path) -> FeaturePass:
    return FeaturePass(
        source=PictureFolder(folder),
        networks=(NetworkSpec("random"),),
        resize="bicubic-antialias",
        batch_size=4,
        folder=work,
        device="cpu",
    )


def test_features_are_kept_by_content(tmp_path: Path, write_pictures: Write) -> None:
    folder = write_pictures(tmp_path / "a", 10)
    network = load_features("random")
    checksums = {"random": network.weights_sha256}
    done: list[int] = []

    def count(so_far: int, total: int) -> None:
        done.append(so_far)

    first = features_of(job(folder, tmp_path / "w"), checksums, on_progress=count)
    expected, _ = network.extract(PictureFolder(folder).read(0, 10), "bicubic-antialias")
    torch.testing.assert_close(first["random"], expected, rtol=1e-5, atol=1e-6)
    assert done == [0, 4, 8, 10]
    assert not (tmp_path / "w").exists()

    moved = folder.rename(tmp_path / "b")
    again = features_of(job(moved, tmp_path / "w"), checksums, on_progress=count)
    assert done == [0, 4, 8, 10]  # nothing was computed
    assert torch.equal(again["random"], first["random"])

    write_pictures(moved, 1, seed=5)  # one picture is another one now
    changed = features_of(job(moved, tmp_path / "w"), checksums, on_progress=count)
    assert len(done) == 8
    assert (changed["random"] != first["random"]).any(1).tolist() == [True] + [False] * 9


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, write_pictures: Write, damage: str) -> None:
    work = job(write_pictures(tmp_path / "a", 6), tmp_path / "w")
    checksums = {"random": load_features("random").weights_sha256}
    first = features_of(work, checksums)["random"]
    path = cache_path(work.source.record.fingerprint, checksums["random"], work.resize, "cpu")
    whole = path.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]
    path.write_bytes({"truncated": whole[:-40], "flipped": flipped, "emptied": b""}[damage])
    assert torch.equal(features_of(work, checksums)["random"], first)
    assert path.read_bytes() == whole


def test_what_decides_features_decides_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache_path("a", "b", "tf1-bilinear", "cuda:0")
    assert cache_path("a", "b", "tf1-bilinear", "cuda:1") == first
    paths = [
        first,
        cache_path("c", "b", "tf1-bilinear", "cuda"),
        cache_path("a", "d", "tf1-bilinear", "cuda"),
        cache_path("a", "b", "pil-bicubic", "cuda"),
        cache_path("a", "b", "tf1-bilinear", "cpu"),
    ]
    known = versions()
    for name in ("mezzotint", "torch", "pillow"):
        monkeypatch.setattr(reference_module, "versions", lambda n=name: {**known, n: "0"})
        paths.append(cache_path("a", "b", "tf1-bilinear", "cuda"))
    assert len(set(paths)) == 8


def test_names_of_emoji() -> None:
    train = RealPictures("emoji").open(SIZE)
    assert train.pictures.record.split == "train"
    assert (train.pictures.record.height, train.called) == (16, "emoji:train")
    held_out = RealPictures("emoji:validation").open(SIZE)
    assert held_out.pictures.record.split == "validation"
    assert RealPictures("emoji", split="all").open(SIZE).pictures.record.count == 1590
    assert RealPictures("emoji", resolution=32).open(SIZE).pictures.record.width == 32
    with pytest.raises(DataError, match="no split 'valid'; did you mean 'validation'"):
        RealPictures("emoji:valid").open(SIZE)
    with pytest.raises(DataError, match="emoji: the measured pictures are 8 x 4"):
        RealPictures("emoji").open((4, 8))


def test_a_folder_of_that_name_comes_first(
    tmp_path: Path, write_pictures: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "emoji", 3)
    assert RealPictures("emoji").open(SIZE).pictures.record.count == 3


def training_of(real: RealPictures) -> Reference | None:
    return real.open_training(real.open(SIZE), SIZE)


def test_training_pictures_are_the_other_split(tmp_path: Path, write_pictures: Write) -> None:
    data = tmp_path / "data"
    write_pictures(data / "train", 3)
    write_pictures(data / "test", 2)
    against: tuple[RealPictures, ...] = (
        RealPictures(data, split="test"),
        RealPictures(FolderDataConfig(path=str(data)), split="test"),
        RealPictures(FolderDataConfig(path=str(data), split="test")),
        RealPictures(data / "test"),  # whose name says what it is
    )
    for real in against:
        assert real.open(SIZE).pictures.record.count == 2
        found = training_of(real)
        assert found is not None
        assert (found.pictures.record.count, found.pictures.record.split) == (3, "train")


def test_training_pictures_are_the_reference_where_it_is_all(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path / "data" / "training", 3)
    write_pictures(tmp_path / "data" / "test", 2)
    write_pictures(tmp_path / "flat", 2)
    for path, split in (("flat", None), ("data", None), ("data", "all"), ("data/training", None)):
        real = RealPictures(tmp_path / path, split=split)
        reference = real.open(SIZE)
        assert real.open_training(reference, SIZE) is reference


def test_where_no_training_pictures_are_known_there_are_none(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path / "data" / "test", 2)
    write_pictures(tmp_path / "data" / "validation", 2)
    assert training_of(RealPictures(tmp_path / "data", split="test")) is None
    assert training_of(RealPictures(tmp_path / "data" / "validation")) is None


def test_copies_are_looked_for_among_all_training_pictures(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path / "data" / "train", 9)
    write_pictures(tmp_path / "data" / "test", 8)
    for split in ("train", "test"):
        real = RealPictures(tmp_path / "data", split=split, limit=4)
        assert real.open(SIZE).pictures.record.count == 4
        found = training_of(real)
        assert found is not None and found.pictures.record.count == 9


def test_training_emoji_are_those_of_the_split() -> None:
    counts = {
        "emoji:validation": RealPictures("emoji:train").open(SIZE).pictures.record.count,
        "emoji:all": 1590,
    }
    for name, count in counts.items():
        found = training_of(RealPictures(name, limit=50))
        assert found is not None and found.pictures.record.count == count
    held_out = RealPictures(EmojiDataConfig(subset="demo-candidates-16", resolution=16))
    found = training_of(held_out)
    assert found is not None and found.pictures.record.count == counts["emoji:validation"]
    trained_on = RealPictures(EmojiDataConfig(subset="demo-48", resolution=16))
    reference = trained_on.open(SIZE)
    assert trained_on.open_training(reference, SIZE) is reference


def test_an_explicit_split_comes_before_a_configurations(
    tmp_path: Path, write_pictures: Write
) -> None:
    for name, count in (("train", 3), ("test", 2)):
        write_pictures(tmp_path / name, count)
    config = FolderDataConfig(path=str(tmp_path), split="train")
    assert RealPictures(config).open(SIZE).pictures.record.count == 3
    assert RealPictures(config, split="test").open(SIZE).pictures.record.count == 2
    emoji = RealPictures(EmojiDataConfig(split="train"), split="validation").open(SIZE)
    assert emoji.pictures.record.split == "validation" and emoji.called == "emoji:validation"


def test_contradictory_splits_are_refused() -> None:
    assert RealPictures("emoji:train", split="train").open(SIZE).called == "emoji:train"
    with pytest.raises(ConfigError, match="emoji:train: and split 'validation' contradict"):
        RealPictures("emoji:train", split="validation").open(SIZE)
    with pytest.raises(ConfigError, match="names its emoji, whatever their split"):
        RealPictures(EmojiDataConfig(subset="demo-48"), split="train").open(SIZE)
    with pytest.raises(ConfigError, match="split"):
        RealPictures(EmojiDataConfig(), split="test").open(SIZE)


def test_a_configurations_pictures_get_the_measured_size(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path, 2, side=40)
    for config in (FolderDataConfig(path=str(tmp_path), resolution=32), EmojiDataConfig()):
        record = RealPictures(config).open(SIZE).pictures.record
        assert (record.height, record.width) == SIZE
        assert RealPictures(config, resolution=24).open(SIZE).pictures.record.height == 24
        with pytest.raises(DataError, match="the measured pictures are 8 x 4"):
            RealPictures(config).open((4, 8))


def test_what_is_neither_is_refused(tmp_path: Path, write_pictures: Write) -> None:
    write_pictures(tmp_path / "photos", 1)
    with pytest.raises(DataError, match=r"neither a folder nor 'emoji'; did you mean .*photos\?"):
        RealPictures(tmp_path / "photo").open(SIZE)
    with pytest.raises(DataError, match="is a file"):
        RealPictures(tmp_path / "photos" / "000.png").open(SIZE)
