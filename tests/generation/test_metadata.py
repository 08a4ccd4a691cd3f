"""Pictures that say how they were drawn, ours and those of others, whole and damaged."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mezzotint.errors import RequestError
from mezzotint.generation.infotext import parse_infotext, write_infotext
from mezzotint.generation.metadata import (
    PNG_KEY,
    read_any_request,
    read_infotext,
    read_request,
    write_image,
)
from mezzotint.generation.request import GenerationRequest, HighRes, InputImage

SUFFIXES = ["png", "jpg", "jpeg", "webp"]
TEXT = "猫, 🍎\nNegative prompt: ü\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
FROM_TEXT = GenerationRequest(
    task="text-to-image",
    prompt="猫, 🍎",
    negative_prompt="ü",
    steps=20,
    sampler="euler_ancestral",
    spacing="linspace",
    guidance_scale=7,
    seed=1,
)
EXIF, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286  # tags of EXIF 2.3


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8))


def request(prompt: str = "a red apple") -> GenerationRequest:
    return GenerationRequest(task="text-to-image", prompt=prompt, seed=7)


def picture_with_comment(path: Path, comment: bytes, endian: str = "<") -> Path:
    """Write a picture as other software does, with nothing but a UserComment."""
    exif = Image.Exif()
    exif.endian = endian
    exif.get_ifd(EXIF)[USER_COMMENT] = comment
    picture().save(path, exif=exif.tobytes())
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["a red apple", 'ein Äpfelchen 🍎, "rot"\n{}', ""])
def test_picture_request_and_text_are_round_trips(tmp_path: Path, prompt: str, suffix: str) -> None:
    path = tmp_path / "new" / "folder" / f"a.{suffix}"
    write_image(picture(), request(prompt), path)
    assert read_request(path) == read_any_request(path) == request(prompt)
    assert read_infotext(path) == write_infotext(request(prompt), picture().size)
    with Image.open(path) as image:
        if suffix in ("png", "webp"):
            assert image.tobytes() == picture().tobytes()
        else:  # noise, the worst that JPEG can meet; a quality of 75 differs by 16 in the mean
            before, after = (np.asarray(i, np.float32) for i in (picture(), image))
            assert np.abs(before - after).mean() < 5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_no_words_drew_has_a_request_and_no_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_image(picture(), GenerationRequest(task="unconditional", seed=3), path)
    assert read_request(path).seed == 3
    with pytest.raises(RequestError, match="holds no text of parameters"):
        read_infotext(path)


def test_where_the_two_stand(tmp_path: Path) -> None:
    """As other software looks for them: the tags by their numbers, the text as it is decoded."""
    text = write_infotext(request("猫"), picture().size)
    for suffix in ("jpg", "webp"):
        write_image(picture(), request("猫"), tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as image:
            directory = image.getexif().get_ifd(EXIF)
            # the type 7, UNDEFINED: web UIs don't find a comment of another
            assert struct.pack(">HH", USER_COMMENT, 7) in image.info["exif"]
        assert directory[USER_COMMENT] == b"UNICODE\0" + text.encode("utf-16-be")
        assert directory[MAKER_NOTE].startswith(b'mezzotint\0{"format_version":1,')
    write_image(picture(), request("猫"), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert set(image.info) == {"mezzotint", "parameters"}
        assert image.info["parameters"] == text


def test_the_text_has_the_size_of_the_first_pass(tmp_path: Path) -> None:
    drawn = request().model_copy(update={"width": 16, "height": 24, "high_res": HighRes()})
    write_image(picture(), drawn, tmp_path / "a.png")
    fields = parse_infotext(read_infotext(tmp_path / "a.png")).fields
    assert (fields["Size-1"], fields["Size-2"], fields["Hires upscale"]) == ("16", "24", "2")


def test_quality(tmp_path: Path) -> None:
    sizes: list[int] = []
    for name in ("a.jpg", "a.webp"):
        for quality in (None, 50):
            write_image(picture(), request(), tmp_path / name, quality=quality)
            sizes.append((tmp_path / name).stat().st_size)
            assert read_request(tmp_path / name) == request()
    assert sizes[0] > 1.5 * sizes[1] and sizes[2] > 1.5 * sizes[3]
    for name, quality in (("a.png", 50), ("a.jpg", 0), ("a.webp", 101)):
        with pytest.raises(RequestError, match="JPEG and WebP take 1 to 100, PNG none"):
            write_image(picture(), request(), tmp_path / name, quality=quality)


def test_a_request_that_a_jpeg_cannot_hold(tmp_path: Path) -> None:
    long = request("a red apple " * 4000)
    with pytest.raises(RequestError, match="too long for JPEG; write PNG or WebP"):
        write_image(picture(), long, tmp_path / "a.jpg")
    for name in ("a.png", "a.webp"):
        write_image(picture(), long, tmp_path / name)
        assert read_request(tmp_path / name) == long


@pytest.mark.parametrize(
    ("name", "told"),
    [("a.gif", "pictures are written as *.png, *.jpg, *.jpeg, *.webp"), ("a", "are written as *")],
)
def test_a_format_that_is_not_written(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        write_image(picture(), request(), tmp_path / name)
    assert told in str(caught.value)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="cannot be written"):
        write_image(picture(), request(), tmp_path / "file" / "a.png")


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),  # with a mark of its order
        b"UNICODE\0" + b"\xfe\xff" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode(),
        b"ASCII\0\0\0" + TEXT.encode(),
        bytes(8) + TEXT.encode() + bytes(3),
        TEXT.encode(),
    ],
)
@pytest.mark.parametrize("endian", ["<", ">"])
def test_comments_that_others_write(tmp_path: Path, comment: bytes, endian: str) -> None:
    for name in ("a.jpg", "a.webp", "a.png"):
        path = picture_with_comment(tmp_path / name, comment, endian)
        assert read_infotext(path) == TEXT
        assert read_any_request(path) == FROM_TEXT


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("international", [False, True])
def test_chunks_that_others_write(tmp_path: Path, compressed: bool, international: bool) -> None:
    text = TEXT if international else TEXT.replace("猫, 🍎", "a")
    chunks = PngImagePlugin.PngInfo()
    if international:
        chunks.add_itxt("parameters", text, zip=compressed)
    else:
        chunks.add_text("parameters", text, zip=compressed)
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    assert read_infotext(tmp_path / "a.png") == text
    with pytest.raises(RequestError, match="holds no generation request; only pictures drawn by"):
        read_request(tmp_path / "a.png")


def test_what_others_began_from_a_picture(tmp_path: Path) -> None:
    comment = b"UNICODE\0" + f"{TEXT}, Denoising strength: 0.5".encode("utf-16-be")
    path = picture_with_comment(tmp_path / "a.jpg", comment)
    with pytest.raises(RequestError, match=r"a\.jpg: Denoising strength: this picture was made"):
        read_any_request(path)
    begun = InputImage(sha256="a" * 64)
    told = {"task": "image-to-image", "image": begun, "strength": 0.5}
    assert read_any_request(path, image=begun) == FROM_TEXT.model_copy(update=told)


def test_ours_comes_before_the_text(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", TEXT)
    chunks.add_text(PNG_KEY, '{"task": "unconditional"}')
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    assert read_any_request(tmp_path / "a.png").task == "unconditional"


@pytest.mark.parametrize("name", ["plain.png", "photo.jpg", "photo.webp", "words.png"])
def test_a_picture_that_says_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "words.png":
        path.write_text("not a picture")
    else:
        picture().save(path)
    told = {
        read_request: "holds no generation request; only pictures drawn by Mezzotint can be"
        " replayed",
        read_infotext: "holds no text of parameters, as web UIs write it",
        read_any_request: "holds neither a generation request of Mezzotint's nor a web UI's"
        " parameters",
    }
    for read, message in told.items():
        with pytest.raises(RequestError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("comment", [b"", b"UNICODE\0", b"JIS\0\0\0\0\0\x1b$B", b"ASCII\0\0\0\0"])
def test_a_comment_that_says_nothing(tmp_path: Path, comment: bytes) -> None:
    path = picture_with_comment(tmp_path / "a.jpg", comment)
    with pytest.raises(RequestError, match="holds no text of parameters"):
        read_infotext(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for read in (read_request, read_infotext, read_any_request):
        with pytest.raises(RequestError, match=r"none\.png: no such file$"):
            read(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [20, 60, 700, 1500])
def test_a_truncated_picture_is_refused(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"a.{suffix}"
    write_image(picture(), request(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RequestError, match=rf"a\.{suffix}: (holds|its EXIF)") as caught:
        read_request(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "its generation request is damaged"),
        ("[1]", "its generation request is damaged"),
        ("[" * 100_000, "its generation request is damaged"),
        ('{"seed": ' + "9" * 10_000 + "}", "its generation request is damaged"),
        ('{"task": "unconditional", "format_version": 9}', "format_version 9 is newer"),
        ('{"task": "unconditional", "stepz": 9}', "unknown key 'stepz'; did you mean 'steps'"),
    ],
)
def test_a_damaged_or_newer_request_is_told(tmp_path: Path, text: str, told: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_KEY, text)
    exif = Image.Exif()
    exif.get_ifd(EXIF)[MAKER_NOTE] = b"mezzotint\0" + text.encode()
    options: dict[str, dict[str, Any]] = {"a.png": {"pnginfo": chunks}, "a.webp": {"exif": exif}}
    for name, option in options.items():
        path = tmp_path / name
        picture().save(path, **option)
        for read in (read_request, read_any_request):
            with pytest.raises(RequestError, match=told) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_decompresses_without_end_is_refused(tmp_path: Path, kind: bytes) -> None:
    bomb = zlib.compress(bytes(64 << 20))
    rest = b"parameters\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + bomb
    chunks = PngImagePlugin.PngInfo()
    chunks.add(kind, rest)
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(RequestError, match=r"Decompressed data too large"):
        read_infotext(tmp_path / "a.png")


def test_a_file_of_another_kind_is_not_even_opened(tmp_path: Path) -> None:
    """EPS would start another program to be drawn."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(RequestError, match="holds no text of parameters"):
        read_infotext(tmp_path / "a.png")


@given(st.data())
def test_damaged_exif_is_told(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a caption"
    exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + TEXT.encode("utf-16-be")
    content = bytearray(exif.tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 80))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(6, len(content))) :]
    path = tmp_path_factory.mktemp("exif") / "a.webp"
    Image.new("RGB", (8, 8)).save(path, exif=bytes(content))
    for read in (read_infotext, read_request, read_any_request):
        try:
            read(path)
        except RequestError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
