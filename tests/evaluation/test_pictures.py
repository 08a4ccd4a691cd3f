"""Which pictures are read, what becomes of those that aren't plain RGB, and what is refused."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.errors import DataError
from mezzotint.evaluation.pictures import EmojiPictures, PictureFolder, evenly, find_split

Write = Callable[..., Path]


def test_indices_are_spread_evenly() -> None:
    assert evenly(4, 4) == [0, 1, 2, 3]
    assert evenly(9, 4) == [0, 1, 2, 3]
    found = evenly(7, 1000)
    assert len(set(found)) == 7 and set(np.diff(found)) <= {142, 143}


def test_pictures_are_read_as_they_are(tmp_path: Path, write_pictures: Write) -> None:
    folder = write_pictures(tmp_path / "a", 5)
    pictures = PictureFolder(folder)
    assert pictures.read(1, 4).shape == (3, 3, 16, 16)
    for k in range(5):
        stored = torch.from_numpy(np.array(Image.open(folder / f"{k:03d}.png"))).permute(2, 0, 1)
        assert torch.equal(pictures.read(k, k + 1)[0], stored)
    again = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(again.read(0, 5), pictures.read(0, 5))


def test_grey_and_transparent_pictures_are_converted_and_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 257 * 9, np.uint16)).save(tmp_path / "d.png")
    Image.new("P", (8, 8)).save(tmp_path / "e.png")
    pictures = PictureFolder(tmp_path)
    corner = pictures.read(0, 4)[:, :, 0, 0].tolist()
    assert corner == [[10, 20, 30], [77] * 3, [204] * 3, [9] * 3]  # 204 = 255 (1 - 51 / 255)
    assert pictures.record.converted == {"grey": 2, "transparent": 1, "other": 1}


def test_a_picture_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", (12, 8))
    lying.putpixel((0, 0), (255, 0, 0))
    lying.save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (8, 12)).save(tmp_path / "b.png")
    pictures = PictureFolder(tmp_path)
    assert (pictures.record.height, pictures.record.width) == (12, 8)
    assert pictures.read(0, 1)[0, :, 0, -1].tolist() == [255, 0, 0]


def test_sub_folders_are_searched_and_hidden_files_are_not(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path / "b", 2)
    write_pictures(tmp_path / "a" / "deep", 1)
    write_pictures(tmp_path / ".thumbnails", 3)
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(PictureFolder(tmp_path)) == 3


def test_the_fingerprint_is_of_content_order_and_size(
    tmp_path: Path, write_pictures: Write
) -> None:
    folder = write_pictures(tmp_path / "a", 4)
    print_ = PictureFolder(folder).record.fingerprint
    moved = shutil.copytree(folder, tmp_path / "b" / "elsewhere")
    for path in sorted(moved.iterdir()):
        path.rename(path.with_name(f"picture-{path.name}"))
    assert PictureFolder(moved).record.fingerprint == print_
    assert PictureFolder(folder, resolution=16).record.fingerprint == print_
    others = [
        PictureFolder(folder, resolution=8),
        PictureFolder(folder, limit=3),
        PictureFolder(write_pictures(tmp_path / "c", 4, seed=1)),
    ]
    (moved / "picture-000.png").rename(moved / "picture-999.png")
    others.append(PictureFolder(moved))
    assert len({o.record.fingerprint for o in others} | {print_}) == 5


def test_mixed_sizes_are_refused_unless_a_resolution_is_chosen(
    tmp_path: Path, write_pictures: Write
) -> None:
    write_pictures(tmp_path, 2)
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    with pytest.raises(DataError) as caught:
        PictureFolder(tmp_path)
    message = str(caught.value)
    assert "000.png is 16 x 16" in message and "wide.png is 40 x 20" in message
    assert "--resolution" in message
    assert PictureFolder(tmp_path, resolution=10).read(0, 3).shape == (3, 3, 10, 10)
    assert PictureFolder(tmp_path, like=(12, 12)).read(0, 3).shape == (3, 3, 12, 12)


def test_pictures_are_left_alone_if_they_are_like_the_others(tmp_path: Path) -> None:
    for k in range(2):
        Image.new("RGB", (12, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    assert PictureFolder(tmp_path, like=(8, 12)).read(0, 2).shape == (2, 3, 8, 12)
    with pytest.raises(DataError, match="the measured pictures are 12 x 6, and these are not"):
        PictureFolder(tmp_path, like=(6, 12))


def test_broken_files_are_named(tmp_path: Path, write_pictures: Write) -> None:
    folder = write_pictures(tmp_path, 6)
    for k in range(5):
        (folder / f"{k:03d}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        PictureFolder(folder)
    message = str(caught.value)
    assert "5 of 6 pictures are broken, and at most 1.0% are skipped: " in message
    assert "000.png: broken: cannot identify image file;" in message
    assert message.endswith("and 2 more: mend or remove them")


@pytest.mark.parametrize("name", ["001.png", "001.jpg"])
def test_a_truncated_file_is_found_when_the_folder_is_opened(
    tmp_path: Path, write_pictures: Write, name: str
) -> None:
    folder = write_pictures(tmp_path, 1, side=64)
    path = folder / name
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{name}: broken: .*truncated.*: mend or remove it"):
        PictureFolder(folder)


def test_a_broken_picture_among_many_is_skipped_and_counted(
    tmp_path: Path, write_pictures: Write
) -> None:
    folder = write_pictures(tmp_path, 100, side=8)
    before = PictureFolder(folder).read(38, 42)
    path = folder / "040.png"
    path.write_bytes(path.read_bytes()[:-40])
    pictures = PictureFolder(folder)
    record = pictures.record
    assert (record.count, record.available, record.broken) == (99, 100, 1)
    assert "040.png" not in pictures.names and len(pictures.names) == 99
    assert torch.equal(pictures.read(38, 41), before[[0, 1, 3]])
    (folder / "041.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 of 100 pictures are broken, and at most 1\.0%"):
        PictureFolder(folder)
    assert len(PictureFolder(folder, max_broken=0.02)) == 98


def test_an_empty_folder_and_none(tmp_path: Path, write_pictures: Write) -> None:
    with pytest.raises(DataError, match="no pictures in this folder"):
        PictureFolder(tmp_path)
    write_pictures(tmp_path / "pictures", 1)
    with pytest.raises(DataError, match=r"no such folder; did you mean .*pictures\?"):
        PictureFolder(tmp_path / "pictuers")


def test_splits_are_found_by_their_usual_names(tmp_path: Path, write_pictures: Write) -> None:
    for name in ("training", "val"):
        write_pictures(tmp_path / name, 1)
    assert find_split(tmp_path, None, "train") == (tmp_path / "training", "training")
    assert find_split(tmp_path, "validation", "train") == (tmp_path / "val", "val")
    assert find_split(tmp_path, None, "all") == (tmp_path, "all")
    with pytest.raises(DataError, match="no folder 'test' in .*Choose from: training, val"):
        find_split(tmp_path, "test", "train")
    write_pictures(tmp_path / "shoes", 1)  # these are classes, then, not splits
    assert find_split(tmp_path, None, "train") == (tmp_path, None)
    with pytest.raises(DataError, match="it has no sub-folders"):
        find_split(tmp_path / "val", "test", "train")


def test_emoji_are_their_plain_view() -> None:
    config = EmojiDataConfig(resolution=16, split="validation")
    pictures, data = EmojiPictures(config, limit=7), EmojiData(config)
    chosen = evenly(7, len(data))
    assert len(pictures) == 7
    expected = torch.stack([data.load(k).image for k in chosen])
    assert torch.equal(pictures.read(0, 7), expected)
    again = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(again.read(2, 5), expected[2:5])
    assert again.record == pictures.record
    assert again.names == [data.load(k).name for k in chosen]
    assert EmojiPictures(config).record.fingerprint != pictures.record.fingerprint
