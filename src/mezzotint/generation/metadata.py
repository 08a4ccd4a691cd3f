"""The request inside the picture: a PNG text chunk that says how to draw it again."""

import json
from pathlib import Path
from typing import Any, cast

from PIL import Image, PngImagePlugin

from mezzotint.errors import RequestError
from mezzotint.generation.infotext import write_infotext
from mezzotint.generation.request import GenerationRequest

__all__ = ["PNG_KEY", "read_request", "write_png"]

PNG_KEY, INFOTEXT_KEY = "mezzotint", "parameters"


def write_png(image: Image.Image, request: GenerationRequest, path: Path) -> None:
    """Write a picture as PNG with its request as JSON in the text chunk ``mezzotint``.

    What was drawn from a prompt has the text that web UIs read in the chunk ``parameters`` as well.

    Args:
        image: The picture.
        request: What drew it, with ``resolved`` filled in if it shall be redrawn bit for bit.
        path: A file name; its folder is made if need be.

    Raises:
        RequestError: If the file cannot be written there.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_KEY, json.dumps(request.to_dict(), ensure_ascii=False))
    if request.prompt is not None:
        chunks.add_text(INFOTEXT_KEY, write_infotext(request, image.size))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


def read_request(path: Path) -> GenerationRequest:
    """Read the request back from a picture.

    Raises:
        RequestError: If there is no such file, it is damaged, or it holds no request.
    """
    try:
        with Image.open(path) as image:
            # load() reads to the end: a truncated file is refused, late chunks are found
            image.load()
            text = image.info.get(PNG_KEY) if image.format == "PNG" else None
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        text = None
    # what Pillow raises on damaged files, by format and place of the damage
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"{path}: holds no generation request that can be read ({reason});"
            " only PNGs drawn by Mezzotint can be replayed"
        ) from None
    if not isinstance(text, str):
        raise RequestError(
            f"{path}: holds no generation request; only PNGs drawn by Mezzotint can be replayed"
        )
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise RequestError(f"{path}: its generation request is damaged; draw the picture again")
    return GenerationRequest.from_dict(cast(dict[str, Any], data), source=str(path))
