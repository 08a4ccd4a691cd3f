"""What a batch is drawn on: its size, and the pictures that it begins from, ready for the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.conditioning.spatial import LowResConditioner, spatial_conditioner
from mezzotint.errors import RequestError
from mezzotint.generation.inputs import (
    InputPictures,
    to_colour,
    to_grey,
    to_pixels,
    to_values,
)
from mezzotint.generation.request import GenerationRequest, InputImage
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = ["Canvas", "back_project", "lay_out"]

_MOST_SIDES = 4  # times the trained size that a picture is taken as it is


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """The size of a batch and its input pictures.

    Attributes:
        height: Of the finished pictures, in pixels.
        width: Of the finished pictures, in pixels.
        drawn_height: What is drawn: ``height``, or what f divides above it.
        drawn_width: What is drawn.
        image: ``(B, 3, drawn_height, drawn_width)`` in -1..1: what the pictures begin from.
        mask: ``(B, 1, drawn_height, drawn_width)`` in 0..1, 1 where to draw.
        low_res: ``(B, 3, h, w)`` in -1..1, for super-resolution.
        maps: ``(B, drawn_height, drawn_width)`` classes of pixels.
    """

    height: int
    width: int
    drawn_height: int
    drawn_width: int
    image: Tensor | None = None
    mask: Tensor | None = None
    low_res: Tensor | None = None
    maps: Tensor | None = None

    def finish(self, pixels: Tensor) -> Tensor:
        """Crop ``(B, 3, H, W)`` uint8 pictures, and put in what was to be kept, exactly."""
        if self.image is not None and self.mask is not None:
            kept = ((self.image + 1.0) * 127.5).round().to(pixels.device)
            share = self.mask.to(pixels.device)
            blended = share * pixels.float() + (1.0 - share) * kept
            pixels = blended.round().clamp(0, 255).to(torch.uint8)
        return pixels[..., : self.height, : self.width]


def lay_out(
    model: LatentDiffusion, requests: Sequence[GenerationRequest], pictures: InputPictures
) -> Canvas:
    """Read the inputs of a batch and bring them to one size.

    Args:
        model: What will draw.
        requests: Of one task and size.
        pictures: Where their inputs are found.

    Raises:
        RequestError: If an input is missing or is another file than it was, or sizes don't fit.
    """
    first = requests[0]
    factor = model.first_stage.factor
    if first.task == "super-resolution":
        return _lay_out_small(model, requests, pictures)
    if first.task == "map-to-image":
        return _lay_out_maps(model, requests, pictures)
    if first.image is None:
        height, width = model.image_size
        height, width = first.height or height, first.width or width
        model.latent_shape(height, width)  # says so if f does not divide it
        return Canvas(height=height, width=width, drawn_height=height, drawn_width=width)
    images, masks = zip(*(_begin(request, pictures) for request in requests), strict=True)
    if len({image.shape for image in images}) > 1:
        raise RequestError("image: the pictures of one batch must be of one size")
    height, width = images[0].shape[-2:]
    _check_area(model, first, height, width)
    if first.tiling:
        model.latent_shape(height, width)  # what is cropped afterwards does not fit together
    drawn = tuple(-(-side // factor) * factor for side in (height, width))
    beyond = (0, drawn[1] - width, 0, drawn[0] - height)
    image = F.pad(torch.stack(images), beyond, mode="replicate")
    mask = None
    if masks[0] is not None:
        mask = F.pad(torch.stack(masks), beyond, mode="replicate")
    return Canvas(
        height=height,
        width=width,
        drawn_height=drawn[0],
        drawn_width=drawn[1],
        image=image,
        mask=mask,
    )


def _check_area(
    model: LatentDiffusion, request: GenerationRequest, height: int, width: int
) -> None:
    """Refuse what was photographed larger than anything that the model was meant for."""
    side = math.isqrt(model.image_size[0] * model.image_size[1])
    asked = request.width is not None or request.height is not None
    if not asked and height * width > (_MOST_SIDES * side) ** 2:
        raise RequestError(
            f"image: is {width}x{height}, and the model was trained at {model.image_size[1]}x"
            f"{model.image_size[0]}; scale it down, or say the size (--size {width}x{height})"
        )


def _begin(request: GenerationRequest, pictures: InputPictures) -> tuple[Tensor, Tensor | None]:
    """The image ``(3, H, W)`` and the mask ``(1, H, W)`` of one request."""
    assert request.image is not None
    picture = pictures.get(request.image)
    mask = pictures.get(request.mask) if request.mask is not None else None
    if mask is not None and mask.size != picture.size:
        raise RequestError(
            f"mask: is {mask.width}x{mask.height}, but the image is"
            f" {picture.width}x{picture.height}; they must be of one size"
        )
    if request.padding is not None:
        return _extend(picture, request.padding)
    picture, mask = to_colour(picture), to_grey(mask) if mask is not None else None
    size = request.width or picture.width, request.height or picture.height
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        mask = mask.resize(size, Image.Resampling.LANCZOS) if mask is not None else None
    if mask is None:
        return to_pixels(picture), None
    shares = np.asarray(mask, dtype=np.float32) / 255.0
    if not (shares >= 0.5).any():
        raise RequestError(
            "mask: is black or dark all over; what is to be drawn must be white, or lighter than"
            " middle grey"
        )
    return to_pixels(picture), torch.from_numpy(shares)[None]


def _extend(
    picture: Image.Image, padding: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """A picture on a larger canvas, its edge drawn out, and what of that is to be drawn."""
    left, above, right, below = padding
    pixels = to_pixels(picture)
    extended = F.pad(pixels[None], (left, right, above, below), mode="replicate")[0]
    mask = torch.ones(1, *extended.shape[-2:])
    mask[:, above : above + picture.height, left : left + picture.width] = 0.0
    return extended, mask


def _lay_out_small(
    model: LatentDiffusion, requests: Sequence[GenerationRequest], pictures: InputPictures
) -> Canvas:
    """Small pictures of the size that the conditioner of super-resolution takes."""
    factor, first = model.first_stage.factor, requests[0]
    spatial = spatial_conditioner(model.conditioner)
    fold = spatial.config.fold if isinstance(spatial, LowResConditioner) else 1
    small: list[Tensor] = []
    for request in requests:
        picture = to_colour(pictures.get(_needed(request.image)))
        own = width, height = tuple(side * factor // fold for side in picture.size)
        width, height = first.width or width, first.height or height
        if (width, height) != own:  # what is its own size may be cut from a larger one
            model.latent_shape(height, width)
            size = width // factor * fold, height // factor * fold
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        small.append(to_pixels(picture))
    if len({item.shape for item in small}) > 1:
        raise RequestError("image: the pictures of one batch must be of one size")
    rows, columns = small[0].shape[-2:]
    beyond = (0, -columns % fold, 0, -rows % fold)  # what is drawn beyond is cut off again
    low_res = F.pad(torch.stack(small), beyond, mode="replicate")
    return Canvas(
        height=rows * factor // fold,
        width=columns * factor // fold,
        drawn_height=low_res.shape[2] * factor // fold,
        drawn_width=low_res.shape[3] * factor // fold,
        low_res=low_res,
    )


def _lay_out_maps(
    model: LatentDiffusion, requests: Sequence[GenerationRequest], pictures: InputPictures
) -> Canvas:
    first, maps = requests[0], list[Tensor]()
    for request in requests:
        picture = pictures.get(_needed(request.semantic_map))
        size = first.width or picture.width, first.height or picture.height
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.NEAREST)
        maps.append(to_values(picture, "semantic_map"))
    if len({item.shape for item in maps}) > 1:
        raise RequestError("semantic_map: the maps of one batch must be of one size")
    height, width = maps[0].shape
    model.latent_shape(height, width)
    return Canvas(
        height=height,
        width=width,
        drawn_height=height,
        drawn_width=width,
        maps=torch.stack(maps),
    )


def _needed(image: InputImage | None) -> InputImage:
    assert image is not None, "the request says that its task needs one"
    return image


def back_project(pixels: Tensor, small: Tensor, times: int) -> Tensor:
    """Bring enlarged pictures into agreement with the small ones (Irani and Peleg 1991).

    What a picture lacks of the small one when it is shrunk is enlarged and added to it.

    Args:
        pixels: ``(B, 3, H, W)``, about -1..1.
        small: ``(B, 3, h, w)`` in -1..1; h divides H and w divides W.
        times: How often.

    Returns:
        ``(B, 3, H, W)`` in -1..1, float32.

    Example:
        >>> small, grey = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 16, 16)
        >>> torch.allclose(back_project(grey, small, 1), torch.tensor(0.5))
        True
    """
    pixels, size = pixels.float().clamp(-1, 1), pixels.shape[-2:]
    for _ in range(times):
        shrunk = F.interpolate(pixels, small.shape[-2:], mode="bicubic", antialias=True)
        pixels = pixels + F.interpolate(small - shrunk, size, mode="bicubic")
        pixels = pixels.clamp(-1, 1)
    return pixels
