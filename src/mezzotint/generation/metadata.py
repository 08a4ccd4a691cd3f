"""The request inside the picture, which says how to draw it again.

=========  ==========================  ==========================================
file       the request as JSON         the text that web UIs read
=========  ==========================  ==========================================
PNG        text chunk ``mezzotint``    text chunk ``parameters``
JPEG       EXIF, MakerNote             EXIF, UserComment
WebP       EXIF, MakerNote             EXIF, UserComment
=========  ==========================  ==========================================

MakerNote is EXIF's own place for what a maker wants to note in a form of its own: no viewer shows
it, and programs that keep EXIF keep it whole.
"""

import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import ExifTags, Image, PngImagePlugin

from mezzotint.errors import RequestError
from mezzotint.generation.infotext import write_infotext
from mezzotint.generation.infotext_request import request_from_infotext
from mezzotint.generation.request import GenerationRequest, InputImage

__all__ = [
    "FORMATS",
    "PNG_KEY",
    "read_any_request",
    "read_infotext",
    "read_request",
    "write_image",
]

PNG_KEY, INFOTEXT_KEY = "mezzotint", "parameters"
FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""What is written by the suffix of a file."""

_JPEG_QUALITY = 95
_MOST_EXIF_OF_JPEG = 65533  # bytes: a segment counts them in 16 bits
_MAKER = b"mezzotint\0"  # tells our MakerNote from those of cameras
_LONG, _UNDEFINED = 4, 7  # types of TIFF's values
_UNICODE, _ASCII, _JIS = b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0"


class _Notes(NamedTuple):
    """What a picture says of how it was drawn: a request as JSON, and a web UI's text."""

    request: str | None
    infotext: str | None


def write_image(
    image: Image.Image, request: GenerationRequest, path: Path, *, quality: int | None = None
) -> None:
    """Write a picture with its request, and if it was drawn from a prompt with the web UIs' text.

    Args:
        image: The picture.
        request: What drew it, with ``resolved`` filled in if it shall be redrawn bit for bit.
        path: A file name, ``*.png``, ``*.jpg``, ``*.jpeg`` or ``*.webp``; its folder is made if
            need be.
        quality: From 1 to 100, for JPEG (by default 95, without halving the colours' resolution)
            and WebP (by default without any loss). PNG has none.

    Raises:
        RequestError: If the file cannot be written there or so.
    """
    format_ = FORMATS.get(path.suffix.lower())
    if format_ is None:
        raise RequestError(f"{path}: pictures are written as {', '.join(f'*{s}' for s in FORMATS)}")
    if quality is not None and (format_ == "PNG" or not 1 <= quality <= 100):
        raise RequestError(
            f"quality: {quality} is not for {path.name}; JPEG and WebP take 1 to 100, PNG none"
        )
    try:
        options = _options(request, _infotext(image, request), format_, quality)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format=format_, **options)
    # Pillow's word for a size or metadata that a format cannot hold is ValueError
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be written: {reason}") from None


def _options(
    request: GenerationRequest, infotext: str | None, format_: str, quality: int | None
) -> dict[str, Any]:
    if format_ == "PNG":
        return {"pnginfo": _png_chunks(request, infotext)}
    exif = _exif(request, infotext)
    if format_ == "JPEG":
        if len(exif) > _MOST_EXIF_OF_JPEG:
            raise ValueError("its prompt is too long for JPEG; write PNG or WebP")
        return {"quality": quality or _JPEG_QUALITY, "subsampling": "4:4:4", "exif": exif}
    return {"exif": exif, **({"quality": quality} if quality else {"lossless": True})}


def _infotext(image: Image.Image, request: GenerationRequest) -> str | None:
    if request.prompt is None:
        return None
    # after two passes the request has the size of the first, as the text should
    return write_infotext(request, None if request.high_res else image.size)


def _png_chunks(request: GenerationRequest, infotext: str | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_KEY, json.dumps(request.to_dict(), ensure_ascii=False))
    if infotext is not None:
        chunks.add_text(INFOTEXT_KEY, infotext)
    return chunks


def _exif(request: GenerationRequest, infotext: str | None) -> bytes:
    note = json.dumps(request.to_dict(), ensure_ascii=False, separators=(",", ":"))
    fields: dict[int, bytes] = {
        ExifTags.Base.ExifVersion: b"0232",
        ExifTags.Base.MakerNote: _MAKER + note.encode(),
    }
    if infotext is not None:
        # big-endian whatever the order of the rest: so web UIs write it, and so they read it
        fields[ExifTags.Base.UserComment] = _UNICODE + infotext.encode("utf-16-be")
    return _lay_out_exif(fields)


def _lay_out_exif(fields: Mapping[int, bytes]) -> bytes:
    """Lay fields of the type UNDEFINED out as EXIF 2.32 has them, in TIFF 6.0's directories.

    Pillow would write them as BYTE, and then web UIs don't find the comment.
    """
    exif_at = 8 + 2 + 12 + 4  # after the header and a directory of one entry
    values_at = exif_at + 2 + 12 * len(fields) + 4
    head = struct.pack(">2sHI", b"MM", 42, 8)
    head += struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, exif_at, 0)
    entries, values = struct.pack(">H", len(fields)), b""
    for tag, value in sorted(fields.items()):
        entries += struct.pack(">HHI", tag, _UNDEFINED, len(value))
        if len(value) <= 4:
            entries += value.ljust(4, b"\0")
        else:
            entries += struct.pack(">I", values_at + len(values))
            values += value + bytes(len(value) % 2)
    return b"Exif\0\0" + head + entries + bytes(4) + values


def read_request(path: Path) -> GenerationRequest:
    """Read the request back from a picture that Mezzotint drew.

    Raises:
        RequestError: If there is no such file, it is damaged, or it holds no request.
    """
    text = _read(path).request
    if text is None:
        raise RequestError(
            f"{path}: holds no generation request; only pictures drawn by Mezzotint can be replayed"
        )
    return _parse_request(text, path)


def read_infotext(path: Path) -> str:
    """Read the text that web UIs write, from a picture of whomever.

    Raises:
        RequestError: If there is no such file, it is damaged, or it holds no such text.
    """
    text = _read(path).infotext
    if text is None:
        raise RequestError(f"{path}: holds no text of parameters, as web UIs write it")
    return text


def read_any_request(
    path: Path,
    *,
    image: InputImage | None = None,
    mask: InputImage | None = None,
    sampler: str | None = None,
) -> GenerationRequest:
    """Read how a picture was drawn, from Mezzotint's request or else from a web UI's text.

    Args:
        path: The picture.
        image: The picture that it was made from, which a web UI's text does not have.
        mask: Of that picture, what was drawn anew.
        sampler: In place of the one that a web UI's text names.

    Raises:
        RequestError: If there is no such file, it is damaged, it holds neither, or what it holds
            cannot be drawn; see `request_from_infotext`.
    """
    notes = _read(path)
    if notes.request is not None:
        return _parse_request(notes.request, path)
    if notes.infotext is None:
        raise RequestError(
            f"{path}: holds neither a generation request of Mezzotint's nor a web UI's parameters"
        )
    return request_from_infotext(
        notes.infotext, image=image, mask=mask, sampler=sampler, source=str(path)
    )


def _parse_request(text: str, path: Path) -> GenerationRequest:
    try:
        data = json.loads(text)
    # an integer of thousands of digits is a ValueError, thousands of brackets a RecursionError
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise RequestError(f"{path}: its generation request is damaged; draw the picture again")
    return GenerationRequest.from_dict(cast(dict[str, Any], data), source=str(path))


def _read(path: Path) -> _Notes:
    """Read what a picture says; a file that is no picture says nothing.

    Pillow bounds what it decompresses, of text as of pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of EXIF that it cannot read, which we tell in our own words
            warnings.simplefilter("ignore")
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
                # load() reads to the end: a truncated file is refused, late chunks are found
                image.load()
                info = cast(dict[str, Any], image.info)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        return _Notes(None, None)
    # what Pillow raises on damaged files, by format and place of the damage
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: holds nothing that can be read ({reason})") from None
    request, infotext = info.get(PNG_KEY), info.get(INFOTEXT_KEY)
    if "exif" in info and not isinstance(infotext, str):
        noted = _read_exif(info["exif"], path)
        request, infotext = request or noted.request, noted.infotext
    return _Notes(
        request if isinstance(request, str) else None,
        infotext if isinstance(infotext, str) else None,
    )


def _read_exif(data: bytes, path: Path) -> _Notes:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exif.load(data)
            directory = dict(exif.get_ifd(ExifTags.IFD.Exif))
    # the parser raises what it pleases on damaged data
    except Exception as error:
        raise RequestError(f"{path}: its EXIF data are damaged ({error})") from None
    note = directory.get(ExifTags.Base.MakerNote)
    comment = directory.get(ExifTags.Base.UserComment)
    request = infotext = None
    if isinstance(note, bytes) and note.startswith(_MAKER):
        request = note.removeprefix(_MAKER).decode("utf-8", "replace")
    if isinstance(comment, bytes):
        infotext = _comment(comment, little_endian=exif.endian == "<")
    elif isinstance(comment, str):  # of the type ASCII, which the standard does not give it
        infotext = comment
    if caught and not request and not infotext:
        raise RequestError(f"{path}: its EXIF data are damaged ({caught[0].message})")
    return _Notes(request, infotext or None)


def _comment(data: bytes, *, little_endian: bool) -> str | None:
    """Decode a UserComment: 8 bytes that name an encoding, and the text in it."""
    head, body = data[:8], data[8:]
    if head == _JIS:
        return None
    if head == _UNICODE:
        text = _utf16(body, little_endian=little_endian)
    else:
        # some write UTF-8 where the standard wants ASCII, and some name no encoding
        named = head in (_ASCII, bytes(8))
        text = (body if named else data).decode("utf-8", "replace")
    return text.strip("\0 ")


def _utf16(data: bytes, *, little_endian: bool) -> str:
    """Decode UTF-16, whose order of bytes the standard leaves open."""
    if 0 not in data:  # every letter of ASCII has one in UTF-16: some write UTF-8 here too
        return data.decode("utf-8", "replace")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    orders = ("utf-16-le", "utf-16-be") if little_endian else ("utf-16-be", "utf-16-le")
    # the names of parameters are ASCII, and in the wrong order they are not
    texts = (data.decode(order, "replace") for order in orders)
    return max(texts, key=lambda text: sum(letter.isascii() for letter in text))
