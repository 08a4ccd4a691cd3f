"""Small pictures from clean ones, as super-resolution learns to undo (paper, section 4.4, D.6)."""

import io
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mezzotint.config import Config
from mezzotint.data.chance import Chance
from mezzotint.errors import DataError

__all__ = ["DegradationConfig", "bicubic_down", "degrade"]

_SECOND_STEP = 0.5  # how often a picture is shrunk in two steps
_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX)


class DegradationConfig(Config):
    """How a clean picture becomes a small one.

    ``bicubic`` only shrinks. ``bsrgan`` is a chain in the spirit of Zhang et al. 2021 (arXiv
    2103.14006): blurs, shrinking, noise and JPEG in random order, and a last JPEG. The paper has
    it in a more moderate form (appendix D.6.1), as the defaults are; Zhang et al. go up to
    ``blur: [0.1, 2]``, ``noise: [2, 25]`` and ``jpeg: [30, 95]``.

    Attributes:
        factor: By how much height and width shrink.
        blur: Standard deviations of the two Gaussian blurs, in pixels of the small picture: they
            are wider where a blur comes before the shrinking.
        anisotropic: Share of blurs that are wider in one direction than in the other.
        noise: Standard deviations of the Gaussian noise, in levels of 0 to 255.
        jpeg: Qualities of JPEG compression, from 1 to 95.
        jpeg_twice: Share of pictures that are compressed along the way too.
    """

    kind: Literal["bicubic", "bsrgan"] = "bicubic"
    factor: int = Field(default=4, ge=2, le=8)
    blur: tuple[float, float] = (0.1, 0.8)
    anisotropic: float = Field(default=0.5, ge=0, le=1)
    noise: tuple[float, float] = (1.0, 5.0)
    jpeg: tuple[int, int] = (70, 95)
    jpeg_twice: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, least, most in (("blur", 0.01, 8.0), ("noise", 0.0, 128.0), ("jpeg", 1, 95)):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name}: expected two numbers from {least} to {most}, the smaller first,"
                    f" got {[low, high]}"
                )
        return self


def bicubic_down(x: Tensor, factor: int) -> Tensor:
    """Shrink pictures by a bicubic filter that averages, differentiably.

    Args:
        x: ``(B, C, H, W)`` of any range; -1..1 as models have it. Not clipped: the filter
            overshoots at edges.
        factor: By how much height and width shrink; divides both.

    Returns:
        ``(B, C, H / factor, W / factor)``.

    Raises:
        DataError: If a side is no multiple of the factor.
    """
    height, width = _small_size(x, factor)
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def degrade(image: Tensor, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Make the small picture of a clean one.

    Args:
        image: ``(3, H, W)`` uint8.
        config: How it is degraded.
        generator: Decides everything random, alone; ``bicubic`` draws nothing from it.

    Returns:
        ``(3, H / factor, W / factor)`` uint8. With ``bicubic`` it is `bicubic_down`, clipped and
        rounded.

    Raises:
        DataError: If a side is no multiple of the factor.

    Example:
        >>> image = torch.full((3, 64, 32), 100, dtype=torch.uint8)
        >>> small = degrade(image, DegradationConfig(factor=4), torch.Generator())
        >>> tuple(small.shape), small.unique().tolist()
        ((3, 16, 8), [100])
    """
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
    size = _small_size(image, config.factor)
    if config.kind == "bicubic":
        return _to_bytes(bicubic_down(image[None].float(), config.factor)[0])
    return _chain(image, size, config, Chance(generator))


def _chain(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, chance: Chance
) -> Tensor:
    steps = ["blur", "blur", "shrink", "noise"]
    if chance.happens(config.jpeg_twice):
        steps.append("jpeg")
    if two := chance.happens(_SECOND_STEP):
        steps.append("shrink")
    steps = chance.order(steps)
    left = 1 + two  # how often it is still to be shrunk
    for step in steps:
        match step:
            case "blur":
                image = _blur(image, image.shape[1] / size[0], config, chance)
            case "noise":
                image = _add_noise(image, config, chance)
            case "jpeg":
                image = _compress(image, config, chance)
            case _:
                left -= 1
                image = _shrink(image, size if not left else _between(image, size, chance), chance)
    return _compress(image, config, chance)


def _between(image: Tensor, size: tuple[int, int], chance: Chance) -> tuple[int, int]:
    """A size between a picture's and the last, ``(h, w)``."""
    scale = chance.ratio(size[0] / image.shape[1], 1.0)
    return max(size[0], round(image.shape[1] * scale)), max(size[1], round(image.shape[2] * scale))


def _shrink(image: Tensor, size: tuple[int, int], chance: Chance) -> Tensor:
    # Pillow's filters widen as they shrink, so none of them aliases
    height, width = size
    return _from_pillow(_to_pillow(image).resize((width, height), chance.choose(_FILTERS)))


def _blur(image: Tensor, scale: float, config: DegradationConfig, chance: Chance) -> Tensor:
    """Gaussian blur: ``exp(-x^T S^-1 x / 2)``, S with two variances and a turn."""
    first = second = scale * chance.uniform(*config.blur)
    angle = 0.0
    if chance.happens(config.anisotropic):
        second = scale * chance.uniform(*config.blur)
        angle = chance.uniform(0.0, torch.pi)
    radius = int(3.0 * max(first, second) + 0.5)
    if radius == 0:
        return image
    line = torch.arange(-radius, radius + 1, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    turn = torch.tensor(angle, dtype=torch.float64)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    kernel = (-0.5 * ((along / first) ** 2 + (across / second) ** 2)).exp()
    kernel = (kernel / kernel.sum()).float().expand(3, 1, -1, -1)
    padded = F.pad(image[None].float(), (radius,) * 4, mode="replicate")
    return _to_bytes(F.conv2d(padded, kernel, groups=3)[0])


def _add_noise(image: Tensor, config: DegradationConfig, chance: Chance) -> Tensor:
    """Gaussian noise that is grey, of every channel for itself, or correlated between them."""
    deviation = chance.uniform(*config.noise)
    kind = chance.choose(("grey", "colour", "correlated"))
    if kind == "grey":
        noise = torch.randn((1, *image.shape[1:]), generator=chance.generator)
    else:
        noise = torch.randn(tuple(image.shape), generator=chance.generator)
    if kind == "correlated":
        axes, _ = torch.linalg.qr(torch.randn((3, 3), generator=chance.generator))
        variances = torch.rand(3, generator=chance.generator)
        noise = torch.einsum("ij,jhw->ihw", axes * variances.sqrt(), noise)
    return _to_bytes(image.float() + deviation * noise)


def _compress(image: Tensor, config: DegradationConfig, chance: Chance) -> Tensor:
    file = io.BytesIO()
    _to_pillow(image).save(file, "JPEG", quality=chance.whole(*config.jpeg))
    with Image.open(file) as picture:
        return _from_pillow(picture.convert("RGB"))


def _small_size(x: Tensor, factor: int) -> tuple[int, int]:
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise DataError(
            f"an image of {width}x{height} cannot be shrunk by {factor}: expected sides that are"
            f" multiples of {factor}"
        )
    return height // factor, width // factor


def _to_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _from_pillow(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
