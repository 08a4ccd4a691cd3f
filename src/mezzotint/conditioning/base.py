"""What a diffusion model is told, as one value: the paper's switch (section 3.3, figure 3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import RequestError

__all__ = [
    "Box",
    "ConditionInputs",
    "Conditioner",
    "Conditioning",
    "Emphasis",
    "Region",
    "TextOptions",
    "Unconditional",
]

Emphasis = Literal["original", "no_norm", "ignore", "none"]
"""How ``(x:1.3)`` acts: on the tokens, with their mean kept or not; read but without effect; or as
plain characters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """The conditions of a batch; whatever is absent is ``None``.

    Attributes:
        crossattn: ``(B, M, d)`` tokens tau_theta(y), attended to by every cross-attention layer.
        crossattn_mask: ``(B, M)`` bool, true where a token is real; absent means all are.
        crossattn_boxes: ``(B, M, 4)`` left, top, right and bottom of the part of the picture that
            attends to a token, as shares; absent means all of it does.
        concat: ``(B, C, h, w)`` concatenated to the noisy latent, never scaled by c_in.
        vector: ``(B, d)`` float, added to the time embedding, or ``(B,)`` integer class labels,
            embedded by the network.
    """

    crossattn: Tensor | None = None
    crossattn_mask: Tensor | None = None
    crossattn_boxes: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None

    def cat(self, *others: "Conditioning") -> "Conditioning":
        """Join batches along the batch dimension; token sequences are padded to one length."""
        parts = (self, *others)
        if self.crossattn is not None:
            length = max(p.crossattn.shape[1] for p in parts if p.crossattn is not None)
            parts = tuple(p.pad(length) for p in parts)
            if any(p.crossattn_mask is not None for p in parts):
                parts = tuple(p.with_mask() for p in parts)
            if any(p.crossattn_boxes is not None for p in parts):
                parts = tuple(p.with_boxes() for p in parts)
        return Conditioning(
            **{f.name: _cat([getattr(p, f.name) for p in parts], f.name) for f in fields(self)}
        )

    def pad(self, length: int) -> "Conditioning":
        """Pad the token sequence to ``length`` with masked zeros."""
        if self.crossattn is None or self.crossattn.shape[1] == length:
            return self
        extra = length - self.crossattn.shape[1]
        masked, boxes = self.with_mask(), self.crossattn_boxes
        assert masked.crossattn_mask is not None
        return replace(
            self,
            crossattn=F.pad(self.crossattn, (0, 0, 0, extra)),
            crossattn_mask=F.pad(masked.crossattn_mask, (0, extra), value=False),
            crossattn_boxes=None if boxes is None else F.pad(boxes, (0, 0, 0, extra)),
        )

    def with_mask(self) -> "Conditioning":
        """Return the same value with an explicit mask."""
        if self.crossattn is None or self.crossattn_mask is not None:
            return self
        ones = torch.ones(self.crossattn.shape[:2], dtype=torch.bool, device=self.crossattn.device)
        return replace(self, crossattn_mask=ones)

    def with_boxes(self) -> "Conditioning":
        """Return the same value with the whole picture as the box of each token."""
        if self.crossattn is None or self.crossattn_boxes is not None:
            return self
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=self.crossattn.device)
        return replace(self, crossattn_boxes=whole.repeat(*self.crossattn.shape[:2], 1))

    def repeat(self, count: int) -> "Conditioning":
        """Repeat a batch of one ``count`` times."""
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def crop(self, rows: slice, columns: slice) -> "Conditioning":
        """Return the same value with ``concat`` of a part of the latents only."""
        if self.concat is None:
            return self
        return replace(self, concat=self.concat[..., rows, columns])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(
            **{name: None if value is None else function(value) for name, value in values.items()}
        )


def _cat(values: Sequence[Tensor | None], name: str) -> Tensor | None:
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values)), f"some conditions of the batch lack {name}"
    return torch.cat(present) if present else None


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How captions are read by conditioners that know more than one way.

    Attributes:
        emphasis: How brackets act.
        clip_skip: Which of the text encoder's layers is the last, counted from its end as web UIs
            do: 1 is the model's own, 2 the one before it.
    """

    emphasis: Emphasis = "original"
    clip_skip: int = 1


@dataclass(frozen=True)
class Box:
    """An object of a layout.

    Attributes:
        label: The index of its class.
        left: Of the box, as a share of the image's width, from 0 to 1.
        top: As a share of its height.
        right: As a share of its width, above ``left``.
        bottom: As a share of its height, above ``top``.
    """

    label: int
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Region:
    """A part of the picture, and words for what it shows.

    Attributes:
        words: Such as ``"a red apple"``.
        left: Of the box, as a share of the image's width, from 0 to 1.
        top: As a share of its height.
        right: As a share of its width, above ``left``.
        bottom: As a share of its height, above ``top``.
    """

    words: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True, kw_only=True)
class ConditionInputs:
    """What a user or a data set says of a batch, before any conditioner has read it.

    Attributes:
        count: The number of samples, B.
        captions: One text a sample.
        text: How the captions are read.
        tokens: ``(M, d)`` of every caption that may stand there and of the empty one, where a text
            encoder that stays as it is gave them before, reading as ``text`` says; then it is not
            asked again.
        labels: One class index a sample.
        layouts: The boxes of each sample.
        regions: The same with words in place of classes.
        unnamed: Whether the words of regions are left out, as in the half of a guided batch that
            is told nothing, and their places are not.
        latent_size: Height and width of the latents, for regions.
        maps: ``(B, H, W)`` integer class of every pixel.
        low_res: ``(B, 3, h, w)`` small images in -1..1; see `LowResConditionerConfig`.
        masked_latents: ``(B, C, h, w)`` normalised latents of the images without what is to be
            drawn.
        mask: ``(B, 1, h, w)``, 1 where to draw and 0 where to keep.
    """

    count: int
    captions: Sequence[str] | None = None
    text: TextOptions = TextOptions()
    tokens: Mapping[str, Tensor] | None = None
    labels: Sequence[int] | None = None
    layouts: Sequence[Sequence[Box]] | None = None
    regions: Sequence[Sequence[Region]] | None = None
    unnamed: bool = False
    latent_size: tuple[int, int] | None = None
    maps: Tensor | None = None
    low_res: Tensor | None = None
    masked_latents: Tensor | None = None
    mask: Tensor | None = None


class Conditioner(nn.Module):
    """Turns inputs into a `Conditioning`, and knows its own null: tau_theta of the paper, eq. 3.

    Attributes:
        wants: The input that it reads for cross-attention: ``"caption"``, ``"label"``,
            ``"layout"`` or nothing.
        wants_concat: The input that it reads for concatenation: ``"map"``, ``"low_res"``,
            ``"inpainting"``, ``"regions"`` or nothing.
        concat_channels: How many channels it concatenates.
        description: For messages, what it wants, in words.
    """

    wants: Literal["caption", "label", "layout"] | None = None
    wants_concat: Literal["map", "low_res", "inpainting", "regions"] | None = None
    concat_channels: int = 0
    description: str = "nothing: it is unconditional"

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on a batch.

        Args:
            inputs: What the samples are to be.
            drop: ``(B,)`` bool, true where the condition is replaced by the null.

        Raises:
            RequestError: If the inputs lack what this conditioner wants.
        """
        raise NotImplementedError

    def null(self, count: int) -> Conditioning:
        """Return the condition that says nothing, for ``count`` samples."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return all that decides its output beside the weights, as plain values."""
        return {}

    def require(self, value: object, inputs: ConditionInputs) -> None:
        """Raise a RequestError that says what this model wants, unless ``value`` is given."""
        if value is None:
            given = "a prompt" if inputs.captions is not None else "no condition"
            given = "a class" if inputs.labels is not None else given
            raise RequestError(f"the model wants {self.description}, but was given {given}")

    def captions(self, inputs: ConditionInputs, drop: Tensor | None = None) -> list[str]:
        """Return the captions of a batch; the null of one is the empty caption.

        Args:
            inputs: What the samples are to be.
            drop: ``(B,)`` bool, true where a caption is replaced by the null.

        Raises:
            RequestError: If there are none.
        """
        self.require(inputs.captions, inputs)
        captions = list(inputs.captions or ())
        if drop is None:
            return captions
        return ["" if dropped else text for text, dropped in zip(captions, drop, strict=True)]

    def known(
        self, captions: Sequence[str], tokens: Mapping[str, Tensor], like: Tensor
    ) -> Conditioning:
        """Return the condition of captions whose tokens are known.

        Args:
            captions: Of a batch.
            tokens: ``(M, d)`` of each.
            like: Of the device and the type that are wanted, such as a weight.
        """
        rows = (tokens[caption].to(like.device, like.dtype)[None] for caption in captions)
        first, *others = (Conditioning(crossattn=row) for row in rows)
        return first.cat(*others)


class Unconditional(Conditioner):
    """The conditioner of a model that is told nothing."""

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Return the empty condition; a prompt or a class is refused."""
        if inputs.captions is not None or inputs.labels is not None:
            given = "a prompt" if inputs.captions is not None else "a class"
            raise RequestError(f"the model is unconditional: it cannot take {given}")
        return Conditioning()

    def null(self, count: int) -> Conditioning:
        """Return the empty condition."""
        return Conditioning()
