import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.conditioning.base import Box
from mezzotint.data.coco import CocoData, CocoDataConfig
from mezzotint.errors import ConfigError, DataError

COLOURS = {"apple": (220, 30, 30), "leaf": (30, 200, 40), "sea": (30, 40, 210)}
IDS = {"leaf": 17, "apple": 3, "sea": -4}  # any whole numbers, in any order
Edit = Callable[[dict[str, Any]], None]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four grey images of several shapes, each with rectangles of the colour of their class."""
    data: dict[str, Any] = {
        "categories": [{"id": number, "name": name} for name, number in IDS.items()],
        "images": [],
        "annotations": [],
    }
    draw = np.random.default_rng(0)
    sizes = [(96, 64), (64, 96), (80, 80), (150, 64)]
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        name = f"sub/{3 - number}.png" if number % 2 else f"{3 - number}.png"
        pixels = np.full((height, width, 3), 128, np.uint8)
        cells = [(x, y) for x in range(0, width - 31, 32) for y in range(0, height - 31, 32)]
        for place in draw.permutation(len(cells))[:3]:
            x, y = cells[place]
            w, h = (int(side) for side in draw.integers(16, 32, 2))
            kind = list(COLOURS)[int(draw.integers(3))]
            pixels[y : y + h, x : x + w] = COLOURS[kind]
            data["annotations"].append(
                {
                    "image_id": 100 + number, "category_id": IDS[kind], "iscrowd": 0,
                    "bbox": [x, y, w, float(h)], "segmentation": [[x, y, x + w, y, x, y + h]],
                }
            )  # fmt: skip
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        data["images"].append(
            {"id": 100 + number, "file_name": name, "width": width, "height": height}
        )
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    captions = [
        {"image_id": image["id"], "caption": f"{word} {image['id']}\n"}
        for image in data["images"]
        for word in ("first", "second", "third")
    ]
    captions.append({"image_id": 999, "caption": "of another image"})
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    return tmp_path


def settings(root: Path, **changes: object) -> CocoDataConfig:
    values = {
        "annotations": str(root / "boxes.json"), "images": str(root / "images"), "resolution": 64,
        **changes,
    }  # fmt: skip
    return CocoDataConfig.from_dict(values)


def open_coco(root: Path, **changes: object) -> CocoData:
    return CocoData(settings(root, **changes))


def edit(root: Path, change: Edit, name: str = "boxes.json") -> Path:
    path = root / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return root


def painted(image: torch.Tensor, names: tuple[str, ...]) -> dict[int, torch.Tensor]:
    """Where each class's colour is seen."""
    return {
        label: (image.int() - torch.tensor(COLOURS[name])[:, None, None]).abs().amax(0) < 40
        for label, name in enumerate(names)
    }


def check_truth(image: torch.Tensor, boxes: tuple[Box, ...], names: tuple[str, ...]) -> None:
    """Inside every box its colour is seen, and outside of all boxes none."""
    side = image.shape[1]
    seen = painted(image, names)
    outside = torch.ones(side, side, dtype=torch.bool)
    for box in boxes:
        edges = [edge * side for edge in (box.left, box.top, box.right, box.bottom)]
        inner = [int(np.ceil(e + 1)) for e in edges[:2]] + [int(np.floor(e - 1)) for e in edges[2:]]
        left, top, right, bottom = inner
        if left < right and top < bottom:
            assert seen[box.label][top:bottom, left:right].all()
        left, top, right, bottom = (
            round(e + d) for e, d in zip(edges, (-1, -1, 1, 1), strict=True)
        )
        outside[max(top, 0) : bottom, max(left, 0) : right] = False
    for mask in seen.values():
        assert not (mask & outside).any()


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("resolution", [48, 64, 100])
def test_boxes_lie_where_their_colours_are(root: Path, crop: str, resolution: int) -> None:
    data = open_coco(
        root, crop=crop, resolution=resolution, flip=True, min_box=0.0, min_visible=0.0
    )
    assert data.class_names == ("leaf", "apple", "sea")
    count = 0
    for index in range(len(data)):
        for seed in [None, *range(12)]:
            example = data.load(index, None if seed is None else generator(seed))
            assert example.image.shape == (3, resolution, resolution) and example.boxes is not None
            assert all(
                0 <= b.left < b.right <= 1 and 0 <= b.top < b.bottom <= 1 for b in example.boxes
            )
            check_truth(example.image, example.boxes, data.class_names)
            count += len(example.boxes)
    assert count > 60


def test_images_are_sorted_by_name_and_kept_in_the_folder(root: Path) -> None:
    data = open_coco(root)
    assert [data.load(k).name for k in range(4)] == ["1.png", "3.png", "sub/0.png", "sub/2.png"]
    assert data.faults == [] and data.load(0).label is None and data.load(0).caption is None


def test_describe_says_what_load_does(root: Path) -> None:
    data = open_coco(root, crop="random", flip=True, captions=str(root / "captions.json"))
    for index in range(4):
        for seed in range(8):
            example = data.load(index, generator(seed))
            known = data.describe(index, generator(seed), with_map=True)
            assert (known.caption, known.label) == (example.caption, None)
            assert known.boxes == example.boxes and known.map is None
        assert data.describe(index).boxes == data.load(index).boxes


def test_captions_come_from_a_second_file(root: Path) -> None:
    data = open_coco(root, captions=str(root / "captions.json"))
    assert data.load(0).caption == "first 102" and data.load(1).caption == "first 100"
    drawn = {data.load(0, generator(seed)).caption for seed in range(40)}
    assert drawn == {"first 102", "second 102", "third 102"} == set(data.captions_of(0))
    edit(root, lambda d: d["annotations"].__delitem__(slice(0, 3)), "captions.json")
    some = open_coco(root, captions=str(root / "captions.json"), max_broken=0.25)
    assert len(some) == 3
    assert [(f.name, f.reason) for f in some.faults] == [("3.png", "no caption in captions.json")]


def only(root: Path, *boxes: list[float], **more: object) -> Path:
    """Leave one image of 80x80 with these boxes."""

    def change(data: dict[str, Any]) -> None:
        data["images"] = [image for image in data["images"] if image["id"] == 102]
        data["annotations"] = [
            {"image_id": 102, "category_id": 3, "bbox": box, **more} for box in boxes
        ]

    return edit(root, change)


def test_little_boxes_and_little_visible_ones_are_left_out(root: Path) -> None:
    Image.new("RGB", (160, 80)).save(root / "images" / "1.png")
    boxes = [[0, 0, 60, 80], [30, 0, 40, 40], [60, 20, 5, 5], [10, 10, 28, 20]]
    only(root, *boxes)
    edit(root, lambda d: d["images"][0].update(width=160))  # the central square is 40 to 120
    seen = {
        (least, visible): open_coco(root, min_box=least, min_visible=visible).load(0).boxes
        for least in (0.0, 0.01)
        for visible in (0.0, 0.5, 1.0)
    }
    first = Box(1, 0.0, 0.0, 0.25, 1.0)  # 1/3 of it
    second = Box(1, 0.0, 0.0, 0.375, 0.5)  # 3/4 of it
    third = Box(1, 0.25, 0.25, 0.3125, 0.3125)  # all of it: 1/256 of the view
    assert seen[0.0, 0.0] == (first, second, third)
    assert seen[0.0, 0.5] == (second, third)
    assert seen[0.0, 1.0] == (third,)
    assert seen[0.01, 0.0] == (first, second)


def test_the_largest_are_kept_in_their_order(root: Path) -> None:
    only(root, [0, 0, 10, 10], [0, 0, 40, 40], [0, 0, 20, 20], [0, 0, 30, 30])
    boxes = open_coco(root, max_objects=2).load(0).boxes
    assert boxes is not None and [box.right for box in boxes] == [0.5, 0.375]


def test_crowds_are_left_out_and_images_without_boxes_are_kept(root: Path) -> None:
    only(root, [0, 0, 30, 30], iscrowd=1)
    data = open_coco(root)
    assert data.load(0).boxes == () and data.faults == []


def test_boxes_beyond_the_edge_are_clipped(root: Path) -> None:
    only(root, [-10, 60, 30, 30])
    assert open_coco(root).load(0).boxes == (Box(1, 0.0, 0.75, 0.25, 1.0),)


def test_smaller_copies_of_the_images_will_do(root: Path) -> None:
    before = [open_coco(root, resolution=32).load(k).boxes for k in range(4)]
    for path in (root / "images").rglob("*.png"):
        with Image.open(path) as picture:
            small = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3))
        small.save(path)
    after = [open_coco(root, resolution=32).load(k).boxes for k in range(4)]
    for a, b in zip(before, after, strict=True):
        assert a is not None and b is not None and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(
                (x.left, x.top, x.right, x.bottom), (y.left, y.top, y.right, y.bottom), atol=0.02
            )


def test_sizes_may_be_left_to_the_files(root: Path) -> None:
    before = [open_coco(root).load(k).boxes for k in range(4)]
    edit(root, lambda d: [(i.pop("width"), i.pop("height")) for i in d["images"]])
    assert [open_coco(root).load(k).boxes for k in range(4)] == before


def test_a_photo_on_its_side_is_a_fault(root: Path) -> None:
    """Boxes that were measured before a photo was turned upright lie elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "images" / "3.png") as picture:
        picture.load()
        picture.save(root / "images" / "3.png", exif=exif)
    data = open_coco(root, max_broken=0.25)
    reasons = [(fault.name, fault.reason) for fault in data.faults]
    assert reasons == [("3.png", "is 64x96, but its boxes are measured in 96x64")]
    assert len(data) == 3
    check_truth(data.load(1).image, data.load(1).boxes or (), data.class_names)


def test_broken_images_are_faults_with_a_limit(root: Path) -> None:
    (root / "images" / "1.png").unlink()
    (root / "images" / "sub" / "2.png").write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"2 of 4 images are broken \(50.0%.*1.png \(no such file\)"
    ):
        open_coco(root)
    data = open_coco(root, max_broken=0.5)
    assert [data.load(k).name for k in range(2)] == ["3.png", "sub/0.png"]
    for index in range(2):
        check_truth(data.load(index).image, data.load(index).boxes or (), data.class_names)
    assert {fault.name for fault in data.faults} == {"1.png", "sub/2.png"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [1, 2, 3]}, r"bbox: expected \[left, top, width, height\], got \[1, 2, 3\]"),
        ({"bbox": None}, "bbox: expected"),
        ({"bbox": [0, 0, 0, 5]}, "bbox: expected a width and a height above 0"),
        ({"bbox": [0, 0, float("nan"), 5]}, "bbox: expected"),
        ({"bbox": [0, 0, float("inf"), 5]}, "bbox: expected"),
        ({"bbox": [0, 0, 10**400, 5]}, "bbox: expected"),
        ({"bbox": [0, 0, True, 5]}, "bbox: expected"),
        ({"bbox": [500, 0, 10, 10]}, "bbox: lies outside the image of 96x64"),
        ({"category_id": 5}, "category_id: no category has the id 5"),
        ({"category_id": [3]}, "category_id: no category"),
        ({"image_id": 5}, "image_id: no image has the id 5"),
        ({"image_id": {}}, "image_id: no image"),
    ],
)  # fmt: skip
def test_bad_boxes_are_faults_with_a_limit(
    root: Path, change: dict[str, object], reason: str
) -> None:
    edit(root, lambda d: d["annotations"][0].update(change))
    with pytest.raises(DataError, match=rf"boxes.json: 1 of 12 boxes are broken.*\[0\] .*{reason}"):
        open_coco(root)
    data = open_coco(root, max_broken=0.1)
    assert len(data) == 4 and len(data.faults) == 1
    assert data.faults[0].name == "annotations[0]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "images: expected a list, got nothing"),
        (lambda d: d.update(annotations={"a": 1}), "annotations: expected a list, got {'a': 1}"),
        (lambda d: d.update(images=[]), "images: the list is empty"),
        (lambda d: d["images"].append(7), r"images\[4\]: expected keys and values, got 7"),
        (lambda d: d["images"][1].pop("file_name"), r"images\[1\].file_name: expected text"),
        (lambda d: d["images"][1].update(id="x"), r"images\[1\].id: expected a whole number"),
        (lambda d: d["images"][1].update(id=True), r"images\[1\].id: expected a whole number"),
        (lambda d: d["images"][1].update(id=100), "images: two have the id 100"),
        (lambda d: d["images"][1].update(width=0), r"images\[1\]: expected a width and a height"),
        (lambda d: d["images"][1].pop("width"), r"images\[1\].width: expected a whole number"),
        (lambda d: d["categories"][0].pop("name"), r"categories\[0\].name: expected text"),
        (lambda d: d["categories"][0].update(id=1.5), r"categories\[0\].id: expected a whole num"),
        (lambda d: d["categories"][0].update(id=3), "categories: two have the id 3"),
        (lambda d: d["categories"][0].update(name="sea"), "categories: two have the name 'sea'"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_told_with_its_key(
    root: Path, change: Edit, message: str
) -> None:
    edit(root, change)
    with pytest.raises(DataError, match=message) as error:
        open_coco(root)
    assert "boxes.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../b.png", "C:\\b.png"])
def test_file_names_cannot_lead_out_of_the_folder(root: Path, name: str) -> None:
    edit(root, lambda d: d["images"][0].update(file_name=name))
    with pytest.raises(DataError, match=r"images\[0\].file_name: .* leads out of the folder"):
        open_coco(root)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 200_000, b'{"images": ' + b"9" * 9000 + b"}",
     b'{"a":' * 100_000],
    ids=["empty", "cut", "list", "no-text", "deep-list", "long-number", "deep-keys"],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(root: Path, content: bytes) -> None:
    (root / "boxes.json").write_bytes(content)
    with pytest.raises(DataError, match=r"boxes.json: ") as error:
        open_coco(root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_huge_values_are_not_quoted_at_length(root: Path) -> None:
    edit(root, lambda d: d.update(images="x" * 100_000))
    with pytest.raises(DataError) as error:
        open_coco(root)
    assert len(str(error.value)) < 400


def test_large_and_missing_files_are_told(root: Path) -> None:
    with (root / "boxes.json").open("ab") as file:
        file.truncate(2 << 20)
    with pytest.raises(DataError, match=r"at most 1 MiB \(json_limit_mib\), got 2 MiB"):
        open_coco(root, json_limit_mib=1)
    with pytest.raises(DataError, match="no such file; did you mean 'boxes.json'"):
        open_coco(root, annotations=str(root / "box.json"))
    with pytest.raises(DataError, match="no such folder; did you mean .*images"):
        open_coco(root, images=str(root / "image"))
    with pytest.raises(DataError, match="expected a file of at most"):
        open_coco(root, annotations="/dev/zero")


def test_pixels_that_do_not_fit_in_memory_are_read_again(root: Path) -> None:
    kept, again = (open_coco(root, crop="random", cache_limit_mib=m) for m in (2048, 0))
    for index in range(4):
        a, b = (data.load(index, generator(3)) for data in (kept, again))
        assert torch.equal(a.image, b.image) and a.boxes == b.boxes


def test_fingerprint_follows_content_and_view_but_not_place(root: Path, tmp_path: Path) -> None:
    first = open_coco(root).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("images", "boxes.json"):
        shutil.move(root / name, moved / name)
    assert open_coco(moved, cache_limit_mib=0).fingerprint == first
    assert open_coco(moved, flip=True).fingerprint != first
    edit(moved, lambda d: d["annotations"][0]["bbox"].__setitem__(2, 9))
    assert open_coco(moved).fingerprint != first


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match=r"(?s)annotations: required.*images: required"):
        CocoDataConfig.from_dict({"resolution": 64})
    with pytest.raises(ConfigError, match="max_objects: Input should be greater than or equal"):
        CocoDataConfig.from_dict({"annotations": "a", "images": "b", "max_objects": 0})
