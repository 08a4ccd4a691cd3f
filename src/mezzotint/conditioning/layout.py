"""Layouts, boxes with labels, as tokens of coordinates (paper, section 4.3.1 and appendix E.2.1).

The tokens are those that the paper's layout-to-image models read, which follow Jahn et al.
(arXiv 2105.06458): an object is its class, its top left and its bottom right corner.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mezzotint.conditioning.base import Box, Conditioner, Conditioning, ConditionInputs
from mezzotint.conditioning.bert import BertLayer, BertTransformer, TransformerShape, unread_logits
from mezzotint.conditioning.classes import class_index
from mezzotint.config import Width
from mezzotint.errors import RequestError

__all__ = ["LayoutConditioner", "LayoutConditionerConfig", "read_layout"]

_PER_OBJECT = 3  # tokens: class, top left, bottom right
_CROP = 2  # tokens: top left, bottom right of what the image shows of the scene


class LayoutConditionerConfig(TransformerShape):
    """The layout encoder of the paper's layout-to-image models; see `TransformerShape`.

    Attributes:
        vocab_size: Classes, coordinates and the token of no object share these numbers.
        max_length: Three tokens for each object that there may be, and two more.
        class_names: The classes by index; without them a class is its number.
    """

    kind: Literal["layout"] = "layout"
    vocab_size: int = Field(default=8192, ge=4, le=1 << 24)
    width: Width = 512
    layers: int = Field(default=16, ge=0, le=64)
    ffn_dim: Width = 2048
    max_length: int = Field(default=92, ge=_PER_OBJECT + _CROP, le=1 << 16)
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "LayoutConditionerConfig":
        if (self.max_length - _CROP) % _PER_OBJECT:
            raise ValueError(
                f"max_length: expected {_PER_OBJECT} for each object and {_CROP} more,"
                f" got {self.max_length}"
            )
        if len(self.class_names) >= self.vocab_size:
            raise ValueError(
                f"class_names: {len(self.class_names)} classes are too many for a vocab_size of"
                f" {self.vocab_size}, whose last token is for no object"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names: a name stands there twice")
        return self


class LayoutConditioner(Conditioner):
    """Layouts to ``(B, max_length, d)`` tokens; the null is a layout of which nothing is known.

    Args:
        config: The transformer's shape and the classes.
    """

    wants = "layout"
    description = "a layout (--layout, boxes with labels)"

    def __init__(self, config: LayoutConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BertTransformer(config)
        embed_corners(self.model.embed_tokens.weight, classes=len(config.class_names))
        bind_objects(self.model)
        self.to_logits = unread_logits(config)

    @property
    def max_objects(self) -> int:
        """How many boxes a layout may have."""
        return (self.config.max_length - _CROP) // _PER_OBJECT

    @property
    def class_count(self) -> int:
        """How many classes there are, as far as is known."""
        return len(self.config.class_names) or self.config.vocab_size - 1

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def index_of(self, label: str | int) -> int:
        """Return the index of a class given by name or index.

        Raises:
            RequestError: If there is no such class; it names the nearest.
        """
        return class_index(label, self.config.class_names, self.class_count)

    def tokenize(self, layouts: Sequence[Sequence[Box]]) -> Tensor:
        """Return the tokens of layouts, ``(B, max_length)``.

        Args:
            layouts: The boxes of each sample; their order is kept.

        Raises:
            RequestError: If there are too many boxes, or one is none, or its class is unknown.

        Example:
            >>> config = LayoutConditionerConfig(vocab_size=17, width=8, layers=0, max_length=8)
            >>> LayoutConditioner(config).tokenize([[Box(5, 0.0, 0.0, 1.0, 0.5)]]).tolist()
            [[5, 0, 11, 16, 16, 16, 0, 15]]
        """
        return torch.tensor([self._row(boxes) for boxes in layouts])

    def _row(self, boxes: Sequence[Box]) -> list[int]:
        if len(boxes) > self.max_objects:
            raise RequestError(
                f"layout: has {len(boxes)} boxes; the model takes {self.max_objects} at most"
            )
        row: list[int] = []
        for number, box in enumerate(boxes):
            _check(box, f"layout[{number}].box")
            if not 0 <= box.label < self.class_count:
                raise RequestError(
                    f"layout[{number}].label: expected a class from 0 to {self.class_count - 1},"
                    f" got {box.label}"
                )
            row += [box.label, self._corner(box.left, box.top), self._corner(box.right, box.bottom)]
        row += [self._none] * (_PER_OBJECT * (self.max_objects - len(boxes)))
        # a request says where things are in the image, so that the image is the whole scene
        return [*row, self._corner(0.0, 0.0), self._corner(1.0, 1.0)]

    @property
    def _none(self) -> int:
        return self.config.vocab_size - 1

    def _corner(self, x: float, y: float) -> int:
        """The token of a point: its cell in a square grid, counted row by row."""
        side = math.isqrt(self.config.vocab_size)
        return round(y * (side - 1)) * side + round(x * (side - 1))

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.layouts``; see `Conditioner.forward`."""
        self.require(inputs.layouts, inputs)
        ids = self.tokenize(inputs.layouts or ())
        if drop is not None:
            ids = ids.masked_fill(drop.to(ids.device)[:, None], self._none)
        return Conditioning(crossattn=self.model(ids.to(self.model.embed_tokens.weight.device)))

    def null(self, count: int) -> Conditioning:
        """Return the layout of which nothing is known, not even the crop, ``count`` times."""
        device = self.model.embed_tokens.weight.device
        ids = torch.full((1, self.config.max_length), self._none, device=device)
        return Conditioning(crossattn=self.model(ids)).repeat(count)


@torch.no_grad()
def bind_objects(model: BertTransformer) -> None:
    """Begin with a first layer in which the three tokens of an object look at one another.

    Nothing else than its position says which corners belong to which class. So the positions of an
    object begin with a part in common, which queries and keys of the first layer compare: without
    that a model learns what is drawn, and where something is, long before it learns what is where.

    Args:
        model: Of a layout conditioner; its positions, and the first layer's queries and keys, are
            replaced.
    """
    weight = model.embed_positions.weight
    place = torch.arange(len(weight))  # the crop, of two tokens, counts as an object that lacks one
    place[-_CROP:] += _PER_OBJECT - _CROP
    objects = torch.randn(len(weight) // _PER_OBJECT + 2, weight.shape[1]) * 0.03
    roles = torch.randn(_PER_OBJECT, weight.shape[1]) * 0.015
    weight.copy_(objects[place // _PER_OBJECT] + roles[place % _PER_OBJECT])
    for layer in model.layers[:1]:
        assert isinstance(layer, BertLayer)
        nn.init.eye_(layer.self_attn.q_proj.weight)
        nn.init.eye_(layer.self_attn.k_proj.weight)


@torch.no_grad()
def embed_corners(weight: Tensor, *, classes: int) -> None:
    """Begin with embeddings in which neighbouring corners are alike.

    A corner is a token of its own, so that from random embeddings the neighbourhood of a thousand
    of them would have to be learned one by one. In place of these stand sines and cosines of both
    coordinates, as in Vaswani et al. 2017, section 3.5, with wavelengths from four times the side
    down to two cells.

    Args:
        weight: ``(vocab_size, d)`` of a standard deviation of 0.02; rows of corners are replaced.
        classes: The first rows are those of classes too, which are not alike; they stay.
    """
    side, count = math.isqrt(len(weight)), weight.shape[1] // 4
    cells = torch.arange(side * side)
    x, y = (part / max(side - 1, 1) for part in (cells % side, cells // side))
    waves = math.pi * torch.logspace(math.log2(0.5), math.log2(max(side - 1, 1)), count, base=2.0)
    angles = torch.stack([x, y])[..., None] * waves  # (2, cells, d / 4)
    parts = [angles.sin(), angles.cos()]
    features = torch.cat([part[axis] for axis in range(2) for part in parts], dim=1)
    corners = slice(classes, side * side)
    weight[corners, : features.shape[1]] = features[corners] * 0.02 * math.sqrt(2)


def read_layout(conditioner: LayoutConditioner, data: object, source: str = "layout") -> list[Box]:
    """Read a layout from plain values, as JSON and YAML hold them.

    Args:
        conditioner: Knows the classes.
        data: A list of ``{"label": name or index, "box": [left, top, right, bottom]}``, the box in
            shares of the image's width and height, 0 to 1.
        source: What messages call the origin of ``data``.

    Raises:
        RequestError: Naming everything that is wrong with it at once.
    """
    if not isinstance(data, list | tuple):
        raise RequestError(f"{source}: expected a list of {{label, box}}, got {data!r}")
    boxes: list[Box] = []
    mistakes: list[str] = []
    for number, item in enumerate(data):
        try:
            boxes.append(_read_box(conditioner, item, f"{source}[{number}]"))
        except RequestError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RequestError("\n".join(mistakes))
    return boxes


def _read_box(conditioner: LayoutConditioner, item: object, where: str) -> Box:
    if not isinstance(item, dict) or set(item) != {"label", "box"}:
        raise RequestError(f"{where}: expected label and box, got {item!r}")
    label, edges = item["label"], item["box"]
    if not isinstance(label, str | int):
        raise RequestError(f"{where}.label: expected a name or an index, got {label!r}")
    match edges:
        case [int() | float(), int() | float(), int() | float(), int() | float()]:
            left, top, right, bottom = map(float, edges)
        case _:
            raise RequestError(
                f"{where}.box: expected [left, top, right, bottom], four numbers from 0 to 1,"
                f" got {edges!r}"
            )
    try:
        index = conditioner.index_of(label)
    except RequestError as error:
        raise RequestError(f"{where}.label: {error}") from None
    box = Box(index, left, top, right, bottom)
    _check(box, f"{where}.box")
    return box


def _check(box: Box, where: str) -> None:
    """Refuse a box that is none."""
    for name in ("left", "top", "right", "bottom"):
        if not 0.0 <= getattr(box, name) <= 1.0:
            raise RequestError(
                f"{where}: {name} is {getattr(box, name)}; expected a share of the image, 0 to 1"
            )
    for less, more in (("left", "right"), ("top", "bottom")):
        if getattr(box, less) >= getattr(box, more):
            raise RequestError(
                f"{where}: {less} is {getattr(box, less)}; expected less than {more},"
                f" which is {getattr(box, more)}"
            )
