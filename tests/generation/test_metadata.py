from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mezzotint.errors import RequestError
from mezzotint.generation.metadata import PNG_KEY, read_request, write_png
from mezzotint.generation.request import GenerationRequest


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8))


def request(prompt: str = "a red apple") -> GenerationRequest:
    return GenerationRequest(task="text-to-image", prompt=prompt, seed=7)


@pytest.mark.parametrize("prompt", ["a red apple", 'ein Äpfelchen 🍎, "rot"\n{}', ""])
def test_picture_and_request_are_round_trips(tmp_path: Path, prompt: str) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    write_png(picture(), request(prompt), path)
    assert read_request(path) == request(prompt)
    assert Image.open(path).tobytes() == picture().tobytes()


@pytest.mark.parametrize("name", ["plain.png", "photo.jpg", "words.png"])
def test_a_picture_without_a_request_is_told_from_ours(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "words.png":
        path.write_text("not a picture")
    else:
        picture().save(path)
    with pytest.raises(RequestError) as caught:
        read_request(path)
    assert str(caught.value) == (
        f"{path}: holds no generation request; only PNGs drawn by Mezzotint can be replayed"
    )


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.png: no such file$"):
        read_request(tmp_path / "none.png")


@pytest.mark.parametrize("kept", [20, 60, 700, 2000])
def test_a_truncated_picture_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.png"
    write_png(picture(), request(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RequestError, match="only PNGs drawn by Mezzotint") as caught:
        read_request(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "its generation request is damaged"),
        ("[1]", "its generation request is damaged"),
        ('{"task": "unconditional", "format_version": 9}', "format_version 9 is newer"),
        ('{"task": "unconditional", "stepz": 9}', "unknown key 'stepz'; did you mean 'steps'"),
    ],
)
def test_a_damaged_or_newer_request_is_told(tmp_path: Path, text: str, told: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_KEY, text)
    path = tmp_path / "a.png"
    picture().save(path, pnginfo=chunks)
    with pytest.raises(RequestError, match=told) as caught:
        read_request(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="cannot be written"):
        write_png(picture(), request(), tmp_path / "file" / "a.png")
