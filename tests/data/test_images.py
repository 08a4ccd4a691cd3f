import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import Description, FolderData, FolderDataConfig, open_data
from mezzotint.data.decoding import read_image
from mezzotint.errors import ConfigError, DataError, MissingExtraError

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (30, 40, 210)


def paint(path: Path, colour: object, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # pyright: ignore[reportArgumentType]


def open_folder(path: Path, **settings: object) -> FolderData:
    values = {"kind": "folder", "path": str(path), "resolution": 16, **settings}
    data = open_data(FolderDataConfig.from_dict(values))
    assert isinstance(data, FolderData)
    return data


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes of plain colour, four images each."""
    root = tmp_path / "things [1]"  # brackets mean something to a glob
    for name, colour in (("apple", RED), ("leaf", GREEN), ("sea", BLUE)):
        for number in range(4):
            paint(root / name / f"{number}.png", colour, (20 + 10 * number, 30))
    return root


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    root = tmp_path / "captioned"
    rows = []
    for name, colour in (("b", BLUE), ("a", RED), ("g", GREEN)):
        paint(root / "images" / f"{name}.png", colour)
        rows.append({"file_name": f"images/{name}.png", "text": f"a {name}", "kind_of": name})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_sub_folders_are_classes(classes: Path) -> None:
    data = open_folder(classes)
    assert len(data) == 12
    assert data.class_names == ("apple", "leaf", "sea")
    assert data.faults == []
    for index in range(12):
        example = data.load(index)
        assert example.image.shape == (3, 16, 16) and example.image.dtype == torch.uint8
        assert example.caption is None
        assert data.describe(index) == Description(None, example.label)
        assert example.label == example.image.float().mean((1, 2)).argmax()
        assert example.name == f"{data.class_names[example.label]}/{index % 4}.png"


def test_metadata_gives_captions_and_classes(captioned: Path) -> None:
    data = open_folder(captioned, caption_column="text", class_column="kind_of")
    found = [(e.name, e.caption, e.label) for e in map(data.load, range(3))]
    assert found == [
        ("images/a.png", "a a", 0),
        ("images/b.png", "a b", 1),
        ("images/g.png", "a g", 2),
    ]
    assert open_folder(captioned).load(0).caption is None
    ordered = open_folder(captioned, class_column="kind_of", classes=["g", "b", "a", "z"])
    assert [ordered.load(k).label for k in range(3)] == [2, 1, 0]
    assert ordered.class_names == ("g", "b", "a", "z")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*metadata.csv")
def test_metadata_may_be_csv(captioned: Path) -> None:
    (captioned / "metadata.jsonl").unlink()
    (captioned / "metadata.csv").write_text("file_name,text\nimages/a.png,red\nimages/b.png,blue\n")
    data = open_folder(captioned, caption_column="text")
    assert [data.load(k).caption for k in range(2)] == ["red", "blue"]
    gc.collect()  # the library leaves the file to the collector, which warns of it here


def test_a_plain_folder_has_neither(tmp_path: Path) -> None:
    for number in range(3):
        paint(tmp_path / f"{number}.jpg", RED)
    (tmp_path / "notes.txt").write_text("not an image")
    data = open_folder(tmp_path)
    assert (len(data), data.class_names, data.load(0).label) == (3, None, None)


def test_a_split_is_a_sub_folder_and_numbers_classes_as_the_others_do(
    classes: Path, tmp_path: Path
) -> None:
    root = tmp_path / "both"
    for split in ("train", "validation"):
        shutil.copytree(classes, root / split)
    shutil.rmtree(root / "validation" / "apple")
    data = open_folder(root, split="validation")
    assert data.class_names == ("apple", "leaf", "sea")
    assert {data.load(k).label for k in range(len(data))} == {1, 2}
    with pytest.raises(DataError, match="no folder 'valid'.*did you mean 'validation'"):
        open_folder(root, split="valid")
    with pytest.raises(DataError, match="holds the splits train, validation; name one.*split: tr"):
        open_folder(root)


Maker = Callable[[], Image.Image]


def transparent_palette() -> Image.Image:
    picture = Image.new("P", (20, 20), 0)
    picture.putpalette([220, 30, 30, 0, 0, 0])
    picture.info["transparency"] = 0
    return picture


@pytest.mark.parametrize(
    ("make", "suffix", "expected"),
    [
        (lambda: Image.new("L", (20, 20), 77), "png", (77, 77, 77)),
        (lambda: Image.new("1", (20, 20), 1), "png", (255, 255, 255)),
        (lambda: Image.new("LA", (20, 20), (0, 0)), "png", (255, 255, 255)),
        (lambda: Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "png", (204, 204, 204)),
        (lambda: Image.new("RGB", (20, 20), RED).quantize(4), "png", RED),
        (transparent_palette, "png", (255, 255, 255)),
        (lambda: Image.new("I;16", (20, 20), 0x8000), "png", (127, 127, 127)),
        (lambda: Image.new("I", (20, 20), 65535), "tiff", (255, 255, 255)),
        (lambda: Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (lambda: Image.new("RGB", (20, 20), GREEN), "webp", GREEN),
        (lambda: Image.new("RGB", (20, 20), GREEN), "bmp", GREEN),
    ],
    ids=["grey", "1-bit", "grey-alpha", "rgba", "palette", "palette-alpha", "16-bit", "32-bit",
         "cmyk", "webp", "bmp"],
)  # fmt: skip
def test_every_kind_of_pixel_becomes_rgb(
    tmp_path: Path, make: Maker, suffix: str, expected: tuple[int, ...]
) -> None:
    path = tmp_path / f"one.{suffix}"
    make().save(path)
    pixels = read_image(path.read_bytes(), 8, square=True)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[4, 4].astype(int), expected, atol=3)  # JPEG and WebP lose


def test_floating_point_pixels_are_a_fault(tmp_path: Path) -> None:
    Image.new("F", (20, 20), 0.5).save(tmp_path / "one.tiff")
    with pytest.raises(ValueError, match="no known range"):
        read_image((tmp_path / "one.tiff").read_bytes(), 8, square=True)


def test_exif_turns_a_photo_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 0), (0, 0, 64, 16))  # black along the top
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top of the scene is on the right
    picture.save(tmp_path / "one.png", exif=exif)
    pixels = read_image((tmp_path / "one.png").read_bytes(), 32, square=True)
    assert pixels[16, 28].max() < 10 and pixels[4, 4].min() > 245


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (7, 5), (1600, 1000)])
def test_the_short_side_meets_the_resolution(tmp_path: Path, size: tuple[int, int]) -> None:
    paint(tmp_path / "one.jpg", GREEN, size)
    content = (tmp_path / "one.jpg").read_bytes()
    assert read_image(content, 16, square=True).shape == (16, 16, 3)
    whole = read_image(content, 16, square=False)
    assert min(whole.shape[:2]) == 16
    assert whole.shape[1] / whole.shape[0] == pytest.approx(size[0] / size[1], rel=0.05)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    """A fine checkerboard becomes its mean, where point sampling would leave black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "one.png")
    pixels = read_image((tmp_path / "one.png").read_bytes(), 32, square=True)
    assert np.abs(pixels[2:-2, 2:-2].astype(int) - 127).max() <= 2


def ramp(folder: Path) -> Path:
    """A wide picture whose columns are numbered by their brightness."""
    columns = np.arange(96, dtype=np.uint8) * 2
    folder.mkdir()
    Image.fromarray(np.tile(columns, (32, 1))).save(folder / "ramp.png")
    return folder


def test_random_crops_reach_both_ends_and_the_plain_view_is_central(tmp_path: Path) -> None:
    data = open_folder(ramp(tmp_path / "r"), resolution=32, crop="random")
    assert data.load(0).image[0, 0, 0] == 64  # column 32 of 96
    firsts = [int(data.load(0, generator(seed)).image[0, 0, 0]) // 2 for seed in range(300)]
    assert min(firsts) <= 3 and max(firsts) >= 61
    assert np.mean(firsts) == pytest.approx(32, abs=5)  # 4.6 standard errors
    center = open_folder(tmp_path / "r", resolution=32)
    assert torch.equal(center.load(0, generator(0)).image, data.load(0).image)


def test_flip_mirrors_half_of_the_views(tmp_path: Path) -> None:
    data = open_folder(ramp(tmp_path / "r"), resolution=32, flip=True)
    plain = data.load(0).image
    views = [data.load(0, generator(seed)).image for seed in range(80)]
    mirrored = sum(torch.equal(view, plain.flip(2)) for view in views)
    assert mirrored + sum(torch.equal(view, plain) for view in views) == 80
    assert 22 <= mirrored <= 58  # 4 standard deviations


def test_pixels_that_do_not_fit_in_memory_are_read_again(classes: Path) -> None:
    kept, again = open_folder(classes), open_folder(classes, cache_limit_mib=0)
    assert kept._files.in_memory and not again._files.in_memory
    for index in range(len(kept)):
        assert torch.equal(kept.load(index).image, again.load(index).image)
    shutil.rmtree(classes / "sea")
    with pytest.raises(DataError, match="no such file; it was whole when"):
        again.load(11)


def break_some(root: Path) -> None:
    whole = (root / "apple/0.png").read_bytes()
    (root / "apple/0.png").write_bytes(whole[: len(whole) // 2])
    (root / "leaf/1.png").write_bytes(b"this is text")


def test_broken_images_are_skipped_counted_and_named(classes: Path) -> None:
    break_some(classes)
    (classes / "sea/2.png").write_bytes(b"")
    data = open_folder(classes, max_broken=0.25)
    assert len(data) == 9
    assert sorted(fault.name for fault in data.faults) == [
        "apple/0.png", "leaf/1.png", "sea/2.png",
    ]  # fmt: skip
    assert all(fault.reason and "\n" not in fault.reason for fault in data.faults)
    assert [data.load(k).label for k in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff"])
def test_a_truncated_image_is_not_taken_for_whole(tmp_path: Path, suffix: str) -> None:
    speckled = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(speckled).save(tmp_path / f"one.{suffix}")
    shutil.copy(tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}")
    whole = (tmp_path / f"one.{suffix}").read_bytes()
    (tmp_path / f"one.{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    data = open_folder(tmp_path, max_broken=0.5)
    assert [fault.name for fault in data.faults] == [f"one.{suffix}"]
    assert len(data) == 1


def test_too_many_broken_images_stop(classes: Path) -> None:
    break_some(classes)
    with pytest.raises(DataError) as error:
        open_folder(classes)
    message = str(error.value)
    assert "2 of 12 images are broken (16.7%; max_broken allows 1.0%)" in message
    assert "apple/0.png (" in message and "leaf/1.png (" in message and "\n" not in message


def test_rows_without_file_or_caption_are_faults(captioned: Path) -> None:
    with (captioned / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "images/c.png", "text": "gone", "kind_of": "c"}) + "\n")
        file.write(json.dumps({"file_name": "images/a.png", "text": " ", "kind_of": "a"}) + "\n")
    data = open_folder(captioned, caption_column="text", max_broken=0.5)
    assert len(data) == 3
    reasons = {fault.name: fault.reason for fault in data.faults}
    assert reasons == {"images/a.png": "no text in column 'text'", "images/c.png": "no such file"}


def test_missing_folders_are_told_with_the_nearest(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; did you mean .*things \[1\]\?"):
        open_folder(tmp_path / "thing")
    with pytest.raises(DataError, match="is the nearest that exists"):
        open_folder(tmp_path / "zzzzzzz" / "b")
    with pytest.raises(DataError, match="is a file, not a folder"):
        open_folder(classes / "apple/0.png")


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(DataError, match="no images in this folder"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("csv", "file_name,text\n"), ("jsonl", "")])
def test_metadata_without_rows_are_told(captioned: Path, name: str, text: str) -> None:
    (captioned / "metadata.jsonl").unlink()
    (captioned / f"metadata.{name}").write_text(text)
    with pytest.raises(DataError, match="its metadata file names no image"):
        open_folder(captioned)


def test_a_missing_column_is_told_with_those_that_stand(captioned: Path, classes: Path) -> None:
    with pytest.raises(
        DataError, match="caption_column: no column 'txt'.*did you mean 'text'.*kind_of, text"
    ):
        open_folder(captioned, caption_column="txt")
    with pytest.raises(DataError, match="class_column: no column 'kind'.*did you mean 'kind_of'"):
        open_folder(captioned, class_column="kind")
    with pytest.raises(DataError, match="caption_column: no column 'text'"):
        open_folder(classes, caption_column="text")


def test_damaged_metadata_is_told_in_one_line(captioned: Path) -> None:
    (captioned / "metadata.jsonl").write_text('{"file_name": "images/a.png", "text"\n')
    with pytest.raises(DataError) as error:
        open_folder(captioned)
    assert str(captioned) in str(error.value) and "\n" not in str(error.value)
    (captioned / "metadata.jsonl").write_text('{"name": "images/a.png"}\n')
    with pytest.raises(DataError, match="file_name"):
        open_folder(captioned)


def test_metadata_cannot_lead_out_of_the_folder(captioned: Path) -> None:
    paint(captioned.parent / "secret.png", RED)
    (captioned / "metadata.jsonl").write_text('{"file_name": "../secret.png"}\n')
    with pytest.raises(DataError, match="secret.png"):
        open_folder(captioned)


def test_unlisted_class_is_told(captioned: Path) -> None:
    with pytest.raises(DataError, match="has a class 'b' that is not among them"):
        open_folder(captioned, class_column="kind_of", classes=["a", "g"])


@pytest.mark.parametrize("resolution", [0, -8])
def test_resolution_must_be_positive(resolution: int) -> None:
    with pytest.raises(ConfigError, match="resolution: Input should be greater than 0"):
        FolderDataConfig.from_dict({"path": "x", "resolution": resolution})


def test_fingerprint_follows_content_and_view_but_not_place(classes: Path, tmp_path: Path) -> None:
    first = open_folder(classes).fingerprint
    moved = shutil.copytree(classes, tmp_path / "moved")
    assert open_folder(moved).fingerprint == first
    assert open_folder(moved, cache_limit_mib=0).fingerprint == first
    assert open_folder(moved, resolution=24).fingerprint != first
    paint(moved / "sea/0.png", GREEN)
    assert open_folder(moved).fingerprint != first


def test_nothing_is_written_into_the_folder_or_home(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = sorted(classes.rglob("*"))
    open_folder(classes)
    assert sorted(classes.rglob("*")) == before
    assert list(home.rglob("*")) == []


def test_nothing_is_asked_of_the_network(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        pytest.fail(f"asked for {address}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert len(open_folder(classes)) == 12


def test_without_datasets_the_extra_is_named(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"mezzotint\[train\]"):
        open_folder(classes)
