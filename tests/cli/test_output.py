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
    assert picture_path(tmp_path / "v1.5", "apple-0") == tmp_path / "v1.5/apple-0.png"
    for name in ("mine.PNG", "mine.jpg", "mine.jpeg", "mine.webp"):
        assert picture_path(tmp_path / name, "apple-0") == tmp_path / name
        (tmp_path / name).touch()
        assert picture_path(tmp_path / name, "apple-0").name == name.replace(".", "-2.")
    (tmp_path / "folder.jpg").mkdir()
    assert picture_path(tmp_path / "folder.jpg", "a") == tmp_path / "folder.jpg/a.png"


def test_other_formats_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        picture_path(Path("apple.gif"), "apple")
    assert str(caught.value) == (
        "--output apple.gif: expected a folder, or a file named *.png, *.jpg, *.jpeg, *.webp"
    )
    with pytest.raises(RequestError, match=r"or a file named \*\.png$"):
        picture_path(Path("apple.jpg"), "apple", suffixes=(".png",))
