"""What pictures can be led to without a model that was trained for it.

Each guide is an energy of decoded pictures, ``(B, 3, H, W)`` in -1..1 to ``(B,)``: -log p(y |
picture) up to a constant (Rombach et al., arXiv 2112.10752, appendix C). `EnergyGuidance`
says how they act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

import torch
from PIL import Image, ImageColor
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import ConfigError, RequestError
from mezzotint.generation.inputs import InputPictures, to_grey, to_pixels
from mezzotint.generation.request import GenerationRequest, GuideUse

__all__ = [
    "Guide",
    "ImageEnergy",
    "classifier_guide",
    "colour_energy",
    "energy_of",
    "guide_uses",
    "known_pixels_energy",
    "low_res_energy",
    "refuse_unknown",
]

ImageEnergy = Callable[[Tensor], Tensor]
"""``energy(images (B,3,H,W) in -1..1) -> (B,)``: differentiable, lower is better, each value from
its own picture alone."""

# deviations in -1..1 that are allowed at scale 1. A PSNR of 32 dB of the small picture is 0.05; a
# mean over many pixels hardly moves in the eyes of a model of independent ones, so it needs more
_LOW_RES, _COLOUR, _KNOWN = 0.05, 0.005, 0.1
_NO_FUNCTIONS: Mapping[str, ImageEnergy] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """A guide that a request can hold, by files or pictures in memory; see `GuideUse`.

    Attributes:
        kind: ``low-res``, ``colour`` or ``known-pixels``.
        image: The small picture, or the picture of which pixels are known.
        mask: For ``colour``, white where the colour is meant; for ``known-pixels``, white where to
            draw and black where the pixels are known.
        colour: Such as ``"#ff8800"``.
        scale: How strongly it acts; 1 allows a deviation of a few steps of 255.
        filter: What makes pictures small for ``low-res``.
    """

    kind: Literal["low-res", "colour", "known-pixels"]
    image: str | Path | Image.Image | None = None
    mask: str | Path | Image.Image | None = None
    colour: str | None = None
    scale: float = 1.0
    filter: Literal["area", "bicubic"] | None = None


def guide_uses(
    guides: Guide | ImageEnergy | Sequence[Guide | ImageEnergy], pictures: InputPictures
) -> tuple[tuple[GuideUse, ...], dict[str, ImageEnergy]]:
    """Say in a request's words what guides it.

    Args:
        guides: One or more; functions are named, not held.
        pictures: Take the guides' pictures in.

    Returns:
        What the request holds, and the functions by their names.

    Raises:
        RequestError: If a guide is wrong, or its picture cannot be read.
    """
    several = cast(
        "Sequence[Guide | ImageEnergy]", guides if isinstance(guides, list | tuple) else [guides]
    )
    uses: list[GuideUse] = []
    functions: dict[str, ImageEnergy] = {}
    for guide in several:
        if isinstance(guide, Guide):
            fields = {
                "kind": guide.kind,
                "image": pictures.add(guide.image) if guide.image is not None else None,
                "mask": pictures.add(guide.mask) if guide.mask is not None else None,
                "colour": guide.colour,
                "scale": guide.scale,
                "filter": guide.filter,
            }
        elif callable(guide):
            name = base = str(getattr(guide, "__qualname__", type(guide).__qualname__))
            while name in functions:
                name = f"{base} ({len(functions) + 1})"
            functions[name] = guide
            fields = {"kind": "function", "name": name}
        else:
            raise RequestError(
                "guide: expected a Guide or a function of images (B, 3, H, W) in -1..1, not a"
                f" {type(guide).__name__}"
            )
        uses.append(_use(fields))
    return tuple(uses), functions


def _use(fields: Mapping[str, object]) -> GuideUse:
    try:
        return GuideUse.from_dict(fields, "guide")
    except ConfigError as error:
        raise RequestError(str(error)) from None


def refuse_unknown(
    request: GenerationRequest, functions: Mapping[str, ImageEnergy] = _NO_FUNCTIONS
) -> None:
    """Refuse a request that was guided by a function which is not at hand.

    Raises:
        RequestError: Naming the function.
    """
    for use in request.guides:
        if use.kind == "function" and use.name not in functions:
            raise RequestError(
                f"guides: the Python function {use.name!r} guided this request, and a request"
                " holds only its name; draw it from Python, with generate(guide=…)"
            )


def energy_of(
    request: GenerationRequest,
    pictures: InputPictures,
    functions: Mapping[str, ImageEnergy],
    device: torch.device,
) -> ImageEnergy | None:
    """Return the sum of a request's guides, each at its scale; nothing if there is none.

    Raises:
        RequestError: If a picture is missing or another than it was, or a function is not at hand.
    """
    refuse_unknown(request, functions)
    parts = [(use.scale, _energy(use, pictures, functions, device)) for use in request.guides]
    if not parts:
        return None

    def total(images: Tensor) -> Tensor:
        return sum((s * _checked(e, images) for s, e in parts), images.new_zeros(len(images)))

    return total


def _energy(
    use: GuideUse,
    pictures: InputPictures,
    functions: Mapping[str, ImageEnergy],
    device: torch.device,
) -> ImageEnergy:
    if use.kind == "function":
        return functions[str(use.name)]
    image = to_pixels(pictures.get(use.image)).to(device) if use.image is not None else None
    mask = None
    if use.mask is not None:
        grey = to_grey(pictures.get(use.mask)).convert("RGB")
        mask = ((to_pixels(grey)[:1] + 1) / 2).to(device)
    if use.kind == "colour":
        rgb = torch.tensor(ImageColor.getrgb(str(use.colour)), dtype=torch.float32, device=device)
        return colour_energy(rgb / 127.5 - 1.0, mask)
    assert image is not None, "the request says that these guides have pictures"
    if use.kind == "low-res":
        return low_res_energy(image, use.filter or "area")
    assert mask is not None, "the request says that this guide has a mask"
    return known_pixels_energy(image, mask)


def _checked(energy: ImageEnergy, images: Tensor) -> Tensor:
    """The values of an energy that somebody else may have written."""
    values = energy(images)
    name = getattr(energy, "__qualname__", type(energy).__qualname__)
    if not isinstance(cast(object, values), Tensor) or values.shape != images.shape[:1]:
        got = tuple(values.shape) if isinstance(cast(object, values), Tensor) else type(values)
        raise RequestError(
            f"guide {name}: expected one energy for each of {len(images)} images, a tensor of shape"
            f" ({len(images)},), got {got}"
        )
    if images.requires_grad and not values.requires_grad:
        raise RequestError(f"guide {name}: its energy is not differentiable in the images")
    if not bool(values.isfinite().all()):
        raise RequestError(
            f"guide {name}: its energy, or before that its gradient, is infinite or not a number"
        )
    return values.float()


def low_res_energy(target: Tensor, filter: Literal["area", "bicubic"] = "area") -> ImageEnergy:
    """How far images are from a small one when made as small.

    Args:
        target: ``(3, h, w)`` in -1..1.
        filter: ``area`` averages; ``bicubic`` is torch's with antialiasing.

    Returns:
        Half the sum of squared deviations from the target over 0.05 squared. It raises
        `RequestError` where images are smaller than the target.
    """
    size = target.shape[-2], target.shape[-1]

    def energy(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height < size[0] or width < size[1]:
            raise RequestError(
                f"guide low-res: its picture is {size[1]}x{size[0]}, larger than the {width}x"
                f"{height} that is drawn; give a smaller one"
            )
        if filter == "area":
            small = F.adaptive_avg_pool2d(images, size)
        else:
            small = F.interpolate(images, size, mode="bicubic", antialias=True)
        return _squares(small - target.to(small), _LOW_RES)

    return energy


def colour_energy(colour: Tensor, region: Tensor | None = None) -> ImageEnergy:
    """How far the mean colour of images is from another.

    Args:
        colour: ``(3,)`` in -1..1.
        region: ``(1, H, W)`` in 0..1, 1 where the colour is meant; all of the image if ``None``.

    Returns:
        Half the sum of squared deviations over 0.005 squared.

    Raises:
        RequestError: If the region is empty.
    """
    if region is not None and not bool((region > 0).any()):
        raise RequestError("guide colour: its mask is black all over; white is where it is meant")

    def energy(images: Tensor) -> Tensor:
        if region is None:
            mean = images.mean((2, 3))
        else:
            share = _sized(region, images)
            mean = (images * share).sum((2, 3)) / share.sum()
        return _squares(mean - colour.to(mean), _COLOUR)

    return energy


def known_pixels_energy(target: Tensor, mask: Tensor) -> ImageEnergy:
    """How far images are from one that is known in part.

    Args:
        target: ``(3, H, W)`` in -1..1.
        mask: ``(1, H, W)`` in 0..1, 1 where to draw and 0 where the target is known.

    Returns:
        Half the sum of squared deviations over 0.1 squared.

    Raises:
        RequestError: If target and mask differ in size.
    """
    if target.shape[-2:] != mask.shape[-2:]:
        height, width = mask.shape[-2:]
        raise RequestError(
            f"guide known-pixels: its mask is {width}x{height}, but its picture is"
            f" {target.shape[-1]}x{target.shape[-2]}; they must be of one size"
        )

    def energy(images: Tensor) -> Tensor:
        known = (1.0 - _sized(mask, images)).sqrt()
        return _squares(known * (images - _sized(target, images)), _KNOWN)

    return energy


def classifier_guide(classifier: nn.Module, label: int) -> ImageEnergy:
    """Lead to a class: the energy is ``-log p(label | image)`` (arXiv 2105.05233).

    Args:
        classifier: ``(B, 3, H, W)`` in -1..1 to logits ``(B, classes)``; set to evaluation. One
            that wants other ranges or sizes goes into a module or function that brings them there.
        label: The index of the class.
    """
    classifier = classifier.eval().requires_grad_(False)

    def classifier_energy(images: Tensor) -> Tensor:
        return -classifier(images).float().log_softmax(dim=1)[:, label]

    return classifier_energy


def _squares(deviation: Tensor, allowed: float) -> Tensor:
    return deviation.square().flatten(1).sum(1) / (2 * allowed**2)


def _sized(values: Tensor, images: Tensor) -> Tensor:
    """Bring ``(C, H, W)`` to the size of images, ``(1, C, h, w)``."""
    values, size = values[None].to(images), images.shape[-2:]
    if values.shape[-2:] == size:
        return values
    return F.interpolate(values, size, mode="bilinear", antialias=True)
