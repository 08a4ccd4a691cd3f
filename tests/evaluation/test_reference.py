"""Real pictures: what a name means, and that their features are kept by content."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mezzotint.data import EmojiDataConfig, FolderDataConfig
from mezzotint.errors import DataError
from mezzotint.evaluation.pictures import PictureFolder
from mezzotint.evaluation.reference import RealPictures, cache_path, features_of
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
    path = cache_path(work.source.record.fingerprint, checksums["random"], work.resize)
    whole = path.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]
    path.write_bytes({"truncated": whole[:-40], "flipped": flipped, "emptied": b""}[damage])
    assert torch.equal(features_of(work, checksums)["random"], first)
    assert path.read_bytes() == whole


def test_another_network_resize_or_content_is_another_entry() -> None:
    first = cache_path("a", "b", "tf1-bilinear")
    others = [
        cache_path("c", "b", "tf1-bilinear"),
        cache_path("a", "d", "tf1-bilinear"),
        cache_path("a", "b", "pil-bicubic"),
    ]
    assert len({first, *others}) == 4


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


def test_training_pictures_are_the_other_split(tmp_path: Path, write_pictures: Write) -> None:
    write_pictures(tmp_path / "data" / "train", 3)
    write_pictures(tmp_path / "data" / "test", 2)
    write_pictures(tmp_path / "flat", 2)
    emoji = RealPictures("emoji:validation")
    found = emoji.open_training(emoji.open(SIZE), SIZE)
    assert found.pictures.record.split == "train"
    for against in (str(tmp_path / "data"), FolderDataConfig(path=str(tmp_path / "data"))):
        real = RealPictures(against, split="test")
        held_out = real.open(SIZE)
        assert held_out.pictures.record.count == 2
        assert real.open_training(held_out, SIZE).pictures.record.count == 3
    flat = RealPictures(tmp_path / "flat")
    reference = flat.open(SIZE)
    assert flat.open_training(reference, SIZE) is reference
    subset = RealPictures(EmojiDataConfig(subset="demo-candidates-16", resolution=16))
    assert subset.open_training(subset.open(SIZE), SIZE).pictures.record.count == 16


def test_what_is_neither_is_refused(tmp_path: Path, write_pictures: Write) -> None:
    write_pictures(tmp_path / "photos", 1)
    with pytest.raises(DataError, match=r"neither a folder nor 'emoji'; did you mean .*photos\?"):
        RealPictures(tmp_path / "photo").open(SIZE)
    with pytest.raises(DataError, match="is a file"):
        RealPictures(tmp_path / "photos" / "000.png").open(SIZE)
