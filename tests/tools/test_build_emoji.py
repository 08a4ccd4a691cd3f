import gzip
import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mezzotint.data.emoji import emoji_concepts

ROOT = Path(__file__).parents[2]
SKIN = {"hexcode": "1F44B-1F3FB"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from tools import build_emoji

    return build_emoji


def icon(width: int = 32, height: int = 32, **more: object) -> dict[str, object]:
    body = f'<rect width="{width}" height="{height}" fill="#c80000"/>'
    return {"body": body, "width": width, "height": height, **more}


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """The npm packages in small: two concepts that count, and one for every reason not to."""
    entries = [
        {"label": "man’s shoe", "hexcode": "1F45E", "emoji": "👞", "tags": ["walk"], "order": 2,
         "group": 1, "subgroup": 0},
        {"label": "red heart", "hexcode": "2764-FE0F", "emoji": "❤️", "order": 1,
         "group": 1, "subgroup": 0, "skins": [SKIN]},
        {"label": "light skin tone", "hexcode": "1F3FB", "emoji": "🏻", "order": 3,
         "group": 2, "subgroup": 0},
        {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "🇦"},
        {"label": "only here", "hexcode": "1F000", "emoji": "🀀", "order": 4, "group": 1,
         "subgroup": 0},
        {"label": "hidden", "hexcode": "1F001", "emoji": "🀁", "order": 5, "group": 1,
         "subgroup": 0},
    ]  # fmt: skip
    messages = {
        "groups": [{"key": "objects", "order": 1}, {"key": "component", "order": 2}],
        "subgroups": [{"key": "clothing", "order": 0}],
    }
    chars = {"1f45e": "mans-shoe", "2764": "red-heart", "1f3fb": "light", "1f001": "hidden"}
    icons = {name: icon() for name in ("light", "red-heart")}
    icons |= {"mans-shoe": icon(32, 33), "hidden": icon(hidden=True)}
    files = {
        "fluent": {"icons.json": {"icons": icons, "width": 32, "height": 32}},
        "flat": {"chars.json": chars | {"1f000": "only-here"}},
        "noto": {
            "icons.json": {"icons": icons, "width": 32, "height": 32},
            "chars.json": chars,
        },
        "emojibase": {"en/data.json": entries, "en/messages.json": messages},
    }
    for package, contents in files.items():
        for name, content in contents.items():
            path = tmp_path / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return {package: tmp_path / package for package in files}


def test_concepts_are_those_of_every_set(tool: ModuleType, packages: dict[str, Path]) -> None:
    files = tool.build(packages, workers=1)
    concepts = json.loads(gzip.decompress(files["index.json.gz"]))["concepts"]
    assert [c["caption"] for c in concepts] == ["red heart", "man's shoe"]
    assert concepts[1]["tags"] == ["walk"] and concepts[0]["tags"] == []
    assert concepts[0] | {"pictures": None, "split": None} == {
        "name": "red-heart", "code_points": "2764", "character": "❤️", "caption": "red heart",
        "tags": [], "group": "objects", "subgroup": "clothing", "pictures": None, "split": None,
    }  # fmt: skip


def test_the_index_leads_to_the_pictures(tool: ModuleType, packages: dict[str, Path]) -> None:
    files = tool.build(packages, workers=1)
    for concept in json.loads(gzip.decompress(files["index.json.gz"]))["concepts"]:
        for style in ("fluent", "noto"):
            offset, length = concept["pictures"][style]
            picture = Image.open(io.BytesIO(files[f"{style}.bin"][offset : offset + length]))
            assert (picture.format, picture.size) == ("WEBP", (128, 128))
            assert picture.convert("RGB").getpixel((64, 64)) == pytest.approx((200, 0, 0), abs=2)


def test_two_builds_are_equal_and_a_difference_is_found(
    tool: ModuleType, packages: dict[str, Path], tmp_path: Path
) -> None:
    files = tool.build(packages, workers=1)
    assert tool.build(packages, workers=2) == files
    place = tmp_path / "built"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    assert tool.differences(files, place) == []
    (place / "noto.bin").write_bytes(b"other")
    (place / "stray").touch()
    assert tool.differences(files, place) == ["noto.bin", "stray"]


def test_a_picture_that_is_not_square_is_padded_on_both_sides(tool: ModuleType) -> None:
    content = tool.rasterise(tool.Icon('<rect width="16" height="32" fill="#00c800"/>', 16, 32))
    covered = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., 3] > 127
    assert covered.sum() == 64 * 128
    assert covered[:, 32:96].all()


def test_the_committed_splits_are_those_of_the_rule(tool: ModuleType) -> None:
    for concept in emoji_concepts():
        assert concept.split == tool.split_of(concept.code_points), concept.name
