import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data.maps import MapFolderData, MapFolderDataConfig
from mezzotint.errors import ConfigError, DataError

NAMES = ("sky", "sea", "land", "sand")
COLOURS = np.array([(90, 160, 250), (20, 40, 200), (40, 200, 40), (230, 200, 120)], np.uint8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images of coloured fields, and maps whose values are 0 to 3."""
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate([(96, 64), (64, 128), (72, 72)]):
        values = draw.integers(0, 4, (height // 8, width // 8)).astype(np.uint8)
        values = values.repeat(8, 0).repeat(8, 1)
        stem = f"sub/{number}" if number == 2 else str(number)
        for folder, pixels in (("images", COLOURS[values]), ("maps", values)):
            path = tmp_path / folder / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def open_maps(root: Path, **changes: object) -> MapFolderData:
    values = {
        "images": str(root / "images"), "maps": str(root / "maps"), "classes": NAMES,
        "resolution": 64, **changes,
    }  # fmt: skip
    if "classes_file" in changes:
        values.pop("classes")
    return MapFolderData(MapFolderDataConfig.from_dict(values))


def rewrite(root: Path, change: object) -> None:
    """Change the values of every map."""
    for path in (root / "maps").rglob("*.png"):
        with Image.open(path) as picture:
            values = np.asarray(picture)
        change(values).save(path)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("resolution", [32, 64])
def test_classes_lie_where_their_colours_are(root: Path, crop: str, resolution: int) -> None:
    data = open_maps(root, crop=crop, resolution=resolution, flip=True)
    assert len(data) == 3 and data.class_names == NAMES
    colours = torch.from_numpy(COLOURS).int()
    for index in range(3):
        for seed in [None, *range(8)]:
            example = data.load(index, None if seed is None else generator(seed))
            assert example.map is not None and example.map.dtype == torch.uint8
            assert example.map.shape == (resolution, resolution)
            nearest = (example.image.int()[None] - colours[:, :, None, None]).abs().sum(1).argmin(0)
            agree = (nearest + 1 == example.map.int()).float().mean()
            # pixels on the edge of two fields may be of either, and mix to the colour of a third
            assert agree > (0.97 if resolution == 64 else 0.75)
            interior = torch.nn.functional.unfold(example.map.float()[None, None], 5, padding=2)
            flat = (interior.amax(1) == interior.amin(1)).view(resolution, resolution)
            if resolution == 64:
                assert torch.equal((nearest + 1)[flat], example.map.int()[flat])


def test_maps_are_never_mixed(root: Path) -> None:
    rewrite(root, lambda values: Image.fromarray((values > 1).astype(np.uint8) * 3))
    for side in (17, 50, 200):
        data = open_maps(root, resolution=side)
        for index in range(3):
            found = data.load(index).map
            assert found is not None and set(found.unique().tolist()) == {1, 4}


def test_describe_says_what_load_does(root: Path) -> None:
    data = open_maps(root, crop="random", flip=True)
    for index in range(3):
        for seed in range(6):
            known = data.describe(index, generator(seed), with_map=True)
            example = data.load(index, generator(seed))
            assert known.map is not None and example.map is not None
            assert torch.equal(known.map, example.map)
            assert (known.caption, known.label, known.boxes) == (None, None, None)
        assert data.describe(index).map is None


def as_palette(values: np.ndarray) -> Image.Image:
    picture = Image.new("P", values.shape[::-1])
    picture.putdata(values.flatten().tolist())
    picture.putpalette(COLOURS[::-1].flatten().tolist())
    return picture


@pytest.mark.parametrize(
    "make",
    [
        as_palette,
        lambda v: Image.fromarray(v.astype(np.uint16)),
        lambda v: Image.fromarray(v).convert("RGB"),
        lambda v: Image.fromarray(v).convert("LA"),
    ],
    ids=["palette", "16-bit", "grey-rgb", "grey-alpha"],
)
def test_every_kind_of_map_is_read(root: Path, make: object) -> None:
    expected = [open_maps(root).load(k).map for k in range(3)]
    rewrite(root, make)
    data = open_maps(root)
    for index in range(3):
        found = data.load(index).map
        assert found is not None and expected[index] is not None
        assert torch.equal(found, expected[index])


def test_ignored_values_become_background_or_a_class(root: Path) -> None:
    plain = open_maps(root).load(0).map
    rewrite(root, lambda v: Image.fromarray(np.where(v == 3, 255, v).astype(np.uint8)))
    ignored = open_maps(root).load(0).map
    assert plain is not None and ignored is not None
    assert torch.equal(ignored, torch.where(plain == 4, 0, plain))
    given = open_maps(root, ignore_as="sea").load(0).map
    assert given is not None and torch.equal(given, torch.where(plain == 4, 2, plain))


def test_values_may_begin_elsewhere(root: Path) -> None:
    """As in ADE20K: 0 is nothing, and the first class is 1."""
    plain = open_maps(root).load(0).map
    rewrite(root, lambda v: Image.fromarray(v + 1))
    shifted = open_maps(root, first_value=1, ignore=0).load(0).map
    assert plain is not None and shifted is not None and torch.equal(shifted, plain)


def test_a_value_without_a_class_is_a_fault(root: Path) -> None:
    rewrite(root, lambda v: Image.fromarray(np.where(v == 3, 7, v).astype(np.uint8)))
    with pytest.raises(DataError, match="3 of 3 images are broken.*has the value 7, which is no"):
        open_maps(root)
    rewrite(root, lambda v: Image.fromarray(np.where(v == 7, 60000, v.astype(np.uint16))))
    with pytest.raises(DataError, match="has the value 60000, which is no class"):
        open_maps(root)


def break_one(root: Path, how: str) -> None:
    path = root / "maps" / "1.png"
    if how == "missing":
        path.unlink()
    elif how == "colour":
        shutil.copy(root / "images" / "1.png", path)
    elif how == "jpeg":
        with Image.open(path) as picture:
            picture.load()
        path.unlink()
        picture.save(path.with_suffix(".jpg"))
    elif how == "size":
        Image.new("L", (64, 64)).save(path)
    elif how == "twice":
        shutil.copy(path, path.with_suffix(".bmp"))
    elif how == "image":
        (root / "images" / "1.png").write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        ("missing", "1.png", "no map of this name in"),
        ("colour", "1.png", "is in colour; expected grey values"),
        ("jpeg", "1.jpg", "is a JPEG, which does not keep classes"),
        ("size", "1.png", "is 64x64, but its image is 64x128"),
        ("twice", "1.png", "1.bmp and 1.png have the same name"),
        ("image", "1.png", ""),
        ("cut", "1.png", ""),
    ],
)
def test_broken_pairs_are_faults_with_a_limit(root: Path, how: str, name: str, reason: str) -> None:
    whole = open_maps(root)
    break_one(root, how)
    with pytest.raises(DataError, match="1 of 3 images are broken"):
        open_maps(root)
    data = open_maps(root, max_broken=0.4)
    assert [fault.name for fault in data.faults] == [name] and reason in data.faults[0].reason
    assert [data.load(k).name for k in range(2)] == ["0.png", "sub/2.png"]
    for index, before in ((0, 0), (1, 2)):
        a, b = data.load(index), whole.load(before)
        assert torch.equal(a.image, b.image)
        assert a.map is not None and b.map is not None and torch.equal(a.map, b.map)


def test_names_may_stand_in_a_file(root: Path) -> None:
    path = root / "names.txt"
    path.write_text("\ufeffsky\n sea \nland\nsand\n\n", encoding="utf-8")
    assert open_maps(root, classes_file=str(path)).class_names == NAMES
    for text, message in (
        ("sky\n\nsea", "line 2: expected a name, got nothing"),
        ("", "expected 1 to 255 classes, got 0"),
        ("sky\nsky", "expected names that differ, got 'sky'"),
        ("\n".join(map(str, range(256))), "expected 1 to 255 classes, got 256"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            open_maps(root, classes_file=str(path))
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="names.txt: cannot be read"):
        open_maps(root, classes_file=str(path))
    with pytest.raises(DataError, match="no such file|cannot be read"):
        open_maps(root, classes_file=str(root / "none.txt"))


def test_wrong_settings_are_told(root: Path) -> None:
    folders = {"images": "a", "maps": "b"}
    with pytest.raises(ConfigError, match="either classes or classes_file"):
        MapFolderDataConfig.from_dict(folders)
    with pytest.raises(ConfigError, match="either classes or classes_file"):
        MapFolderDataConfig.from_dict({**folders, "classes": ["a"], "classes_file": "b"})
    with pytest.raises(ConfigError, match="no value is ignored"):
        MapFolderDataConfig.from_dict(
            {**folders, "classes": ["a"], "ignore": None, "ignore_as": "a"}
        )
    with pytest.raises(DataError, match="ignore_as: no class 'see'; did you mean 'sea'"):
        open_maps(root, ignore_as="see")
    with pytest.raises(DataError, match="no such folder"):
        open_maps(root, maps=str(root / "map"))
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no images in this folder"):
        open_maps(root, images=str(root / "empty"))


def test_pixels_that_do_not_fit_in_memory_are_read_again(root: Path) -> None:
    kept, again = (open_maps(root, crop="random", cache_limit_mib=m) for m in (2048, 0))
    for index in range(3):
        a, b = (data.load(index, generator(3)) for data in (kept, again))
        assert a.map is not None and b.map is not None
        assert torch.equal(a.image, b.image) and torch.equal(a.map, b.map)


def test_fingerprint_follows_content_and_view_but_not_place(root: Path, tmp_path: Path) -> None:
    first = open_maps(root).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("images", "maps"):
        shutil.move(root / name, moved / name)
    assert open_maps(moved, cache_limit_mib=0).fingerprint == first
    assert open_maps(moved, ignore_as="sea").fingerprint != first
    assert open_maps(moved, classes=NAMES[::-1]).fingerprint != first
    rewrite(moved, lambda values: Image.fromarray(3 - values))
    assert open_maps(moved).fingerprint != first
