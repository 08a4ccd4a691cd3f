from pathlib import Path

import pytest

from mezzotint.cli.output import free, picture_path, slug
from mezzotint.errors import RequestError


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("A red apple!", "a-red-apple"),
        ("  ../../etc/passwd ", "etc-passwd"),
        ("grüner Apfel 🍏", "grüner-apfel"),
        ("🍏", "image"),
        ("", "image"),
        ("x" * 100, "x" * 48),
    ],
)
def test_words_become_file_names(words: str, name: str) -> None:
    assert slug(words) == name


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "a.png"
    for expected in ("a.png", "a-2.png", "a-3.png"):
        path = free(wanted)
        assert path.name == expected
        path.touch()


def test_where_pictures_go(tmp_path: Path) -> None:
    assert picture_path(None, "apple-0") == Path("outputs/apple-0.png")
    assert picture_path(tmp_path / "new", "apple-0") == tmp_path / "new/apple-0.png"
    assert picture_path(tmp_path / "mine.PNG", "apple-0") == tmp_path / "mine.PNG"
    (tmp_path / "folder.png").mkdir()
    assert picture_path(tmp_path / "folder.png", "a").parent == tmp_path / "folder.png"


def test_other_formats_are_refused() -> None:
    with pytest.raises(RequestError, match="pictures are written as PNG"):
        picture_path(Path("apple.jpg"), "apple")
