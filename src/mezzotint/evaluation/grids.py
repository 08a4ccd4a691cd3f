"""Pictures of pictures, for people to look at."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mezzotint.diffusion.samplers import get_sampler
from mezzotint.errors import RequestError
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.request import GenerationRequest
from mezzotint.generation.sampling import decode_latents, sample_latents, to_images
from mezzotint.rng import INITIAL, SampleNoise, slerp

__all__ = [
    "InterpolatedNoise",
    "denoising_strip",
    "image_grid",
    "interpolation_strip",
    "labelled_rows",
    "reconstruction_grid",
    "under",
]

_MARGIN = 4
_LINE = 16
_ERROR_GAIN = 4.0

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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
        labels: A text under each picture, in as many lines as it needs.
        scale: Whole factor by which each picture is enlarged.
    """
    width, height = images[0].width * scale, images[0].height * scale
    font = ImageFont.load_default(size=11)
    texts = [_wrapped(label, font, width) for label in labels or ()]
    below = _LINE * max((len(lines) for lines in texts), default=0)
    cell_w, cell_h = width + _MARGIN, height + below + _MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_w + _MARGIN, rows * cell_h + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        x, y = _MARGIN + k % columns * cell_w, _MARGIN + k // columns * cell_h
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(texts[k] if texts else ()):
            draw.text((x, y + height + 1 + number * _LINE), line, fill="black", font=font)
    return sheet


def labelled_rows(
    rows: Mapping[str, Sequence[Image.Image]],
    *,
    headings: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Lay rows of images of one size out under one another, on white, each named at its left.

    Args:
        rows: The pictures of each row by its name.
        headings: A text above each column, in as many lines as it needs.
        scale: Whole factor by which each picture is enlarged.
    """
    first = next(iter(rows.values()))[0]
    width, height = first.width * scale, first.height * scale
    font = ImageFont.load_default(size=12)
    named = [int(font.getlength(name)) + 2 * _MARGIN for name in rows if name]
    left = _MARGIN + max(named, default=0)
    texts = [_wrapped(heading, font, width) for heading in headings or ()]
    top = _MARGIN + _LINE * max((len(lines) for lines in texts), default=0)
    columns = max(len(images) for images in rows.values())
    sheet = Image.new(
        "RGB",
        (left + columns * (width + _MARGIN), top + len(rows) * (height + _MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for k, lines in enumerate(texts):
        middle = left + k * (width + _MARGIN) + width // 2
        for number, line in enumerate(lines):
            draw.text((middle, _MARGIN + number * _LINE), line, "black", font, anchor="mt")
    for number, (name, images) in enumerate(rows.items()):
        y = top + number * (height + _MARGIN)
        draw.text((left - 2 * _MARGIN, y + height // 2), name, "black", font, anchor="rm")
        for k, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + k * (width + _MARGIN), y))
    return sheet


def under(above: Image.Image, below: Image.Image) -> Image.Image:
    """Put a sheet under another, their right edges in one line."""
    width, gap = max(above.width, below.width), 4 * _MARGIN
    sheet = Image.new("RGB", (width, above.height + gap + below.height), "white")
    sheet.paste(above, (width - above.width, 0))
    sheet.paste(below, (width - below.width, above.height + gap))
    return sheet


def reconstruction_grid(
    originals: Tensor,
    restored: Mapping[str, Tensor],
    *,
    error_maps: bool = False,
    scale: int = 1,
) -> Image.Image:
    """Show what first stages make of pictures: the originals above, and a row for each.

    Args:
        originals: ``(N, 3, H, W)`` uint8.
        restored: The same shape, by the name of what restored them.
        error_maps: Follow each row by its absolute error, mean over the channels and four times
            enlarged: black is none, white is a quarter of the range and more.
        scale: Whole factor by which each picture is enlarged.
    """
    rows = {"original": _pictures(originals)}
    for name, images in restored.items():
        rows[name] = _pictures(images)
        if error_maps:
            error = (images.float() - originals.float()).abs().mean(1, keepdim=True)
            enlarged = (error * _ERROR_GAIN).round().clamp(0, 255).to(torch.uint8)
            rows[f"error of {name}"] = _pictures(enlarged.expand(-1, 3, -1, -1))
    return labelled_rows(rows, scale=scale)


def denoising_strip(
    pipeline: Pipeline,
    request: GenerationRequest,
    columns: int = 8,
    *,
    noisy: bool = False,
    scale: int = 1,
) -> Image.Image:
    """Show how a picture comes about: the estimate of the clean image, from step to step.

    Args:
        pipeline: The model and how it runs.
        request: What to draw; of several images the first.
        columns: How many steps are shown, evenly chosen, the first and the last among them; all
            of them where there are fewer.
        noisy: Show above each estimate what the sampler holds after the step, decoded.
        scale: Whole factor by which each picture is enlarged.

    Raises:
        RequestError: If the model cannot give what is asked, or ``columns`` is below 2.
    """
    _check_columns(columns)
    shown = _evenly(request.steps, columns)
    levels = get_sampler(request.sampler).sigmas(
        pipeline.model.schedule, request.steps, request.spacing
    )
    estimates: list[Tensor] = []
    states: list[Tensor] = []

    def keep(step: int, _total: int, x: Tensor, denoised: Tensor) -> None:
        if step in shown:
            estimates.append(denoised)
            # from x0 + sigma * noise to the variance that the decoder knows
            states.append(x / float(1 + levels[step + 1] ** 2) ** 0.5)

    sample_latents(pipeline, [request], callback=keep)
    rows: dict[str, Sequence[Image.Image]] = {}
    if noisy:
        rows["state"] = to_images(decode_latents(pipeline, torch.cat(states)))
    rows["estimate" if noisy else ""] = to_images(decode_latents(pipeline, torch.cat(estimates)))
    headings = [f"step {step + 1}" for step in shown]
    return labelled_rows(rows, headings=headings, scale=scale)


def interpolation_strip(
    pipeline: Pipeline,
    request: GenerationRequest,
    seeds: tuple[int, int],
    columns: int = 8,
    *,
    scale: int = 1,
) -> Image.Image:
    """Show the way from the picture of one seed to that of another, all else equal.

    All noise goes the way, that of stochastic samplers' steps too; see `InterpolatedNoise`.

    Args:
        pipeline: The model and how it runs.
        request: What to draw; its seed is not used.
        seeds: Those of the first and of the last picture.
        columns: How many pictures, these two among them.
        scale: Whole factor by which each picture is enlarged.

    Raises:
        RequestError: If the model cannot give what is asked, or ``columns`` is below 2.
    """
    _check_columns(columns)
    noise = InterpolatedNoise(seeds, [k / (columns - 1) for k in range(columns)])
    latents = sample_latents(pipeline, [request] * columns, rng=noise)
    images = to_images(decode_latents(pipeline, latents))
    middle = [f"{k / (columns - 1):.2f}" for k in range(1, columns - 1)]
    headings = [f"seed {seeds[0]}", *middle, f"seed {seeds[1]}"]
    return labelled_rows({"": images}, headings=headings, scale=scale)


class InterpolatedNoise:
    """Noise between the streams of two seeds, for as many samples as there are fractions.

    Args:
        seeds: What the fractions 0 and 1 stand for.
        fractions: Where each sample stands between them.
    """

    def __init__(self, seeds: tuple[int, int], fractions: Sequence[float]) -> None:
        self.ends = SampleNoise(seeds)
        self.fractions = tuple(fractions)

    def normal(self, shape: Sequence[int], step: int = INITIAL, draw: int = 0) -> Tensor:
        """Draw ``(B, *shape)``; see `mezzotint.rng.SampleNoise.normal`."""
        first, last = self.ends.normal(shape, step, draw)
        return torch.stack([slerp(first, last, t) for t in self.fractions])


def _check_columns(columns: int) -> None:
    if columns < 2:
        raise RequestError(f"columns: a strip has at least 2 pictures, got {columns}")


def _evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers below ``count``, evenly, the first and last among them."""
    if count == 1:
        return [0]
    wanted = min(wanted, count)
    return [round(k * (count - 1) / (wanted - 1)) for k in range(wanted)]


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(p.permute(1, 2, 0).cpu())) for p in images]


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """The lines of a text that are no wider than that; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(_fit(word, font, width))
        else:
            lines[-1] = _fit(longer, font, width)
    return lines


def _fit(text: str, font: _Font, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
