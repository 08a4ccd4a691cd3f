"""Pictures of pictures, for people to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["image_grid"]

_MARGIN = 4


def image_grid(
    images: Sequence[Image.Image],
    *,
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Lay images of one size out in rows, on white.

    Args:
        images: The pictures, row by row.
        columns: Pictures in a row.
        labels: A line of text under each picture; what is too long is cut.
        scale: Whole factor by which each picture is enlarged.
    """
    width, height = images[0].width * scale, images[0].height * scale
    font = ImageFont.load_default(size=11)
    line = 16 if labels is not None else 0
    cell_w, cell_h = width + _MARGIN, height + line + _MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_w + _MARGIN, rows * cell_h + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        x, y = _MARGIN + k % columns * cell_w, _MARGIN + k // columns * cell_h
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if labels is not None:
            draw.text((x, y + height + 1), _fit(labels[k], font, width), fill="black", font=font)
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
