"""Words for parts of the picture: a layout whose boxes say in words what stands there.

The words of a box are read by the text encoder of the caption, and only what lies in the box
attends to them (as regions of attention are bound in Multi-region and layout guidance of text
models, see GLIGEN, Li et al. 2023, arXiv 2301.07093, for the task). A text model that knows the
words so knows them of a box too. What the boxes cover is concatenated to the noisy latent besides,
because attention is at coarse levels alone.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mezzotint.conditioning.base import Conditioner, Conditioning, ConditionInputs, Region
from mezzotint.config import Config
from mezzotint.errors import RequestError

__all__ = ["RegionsConditioner", "RegionsConditionerConfig"]


_THINNEST = 1e-3  # of the picture's side: a box below it could fall between two cells


class RegionsConditionerConfig(Config):
    """Boxes with words.

    Attributes:
        max_objects: Boxes at most; as many channels are concatenated.
        phrase_length: Tokens that are taken of the words of a box, at most.
    """

    kind: Literal["regions"] = "regions"
    max_objects: int = Field(default=4, ge=1, le=32)
    phrase_length: int = Field(default=8, ge=3, le=77)


class RegionsConditioner(Conditioner):
    """Boxes as ``(B, max_objects, h, w)``, the share of each latent that a box covers.

    Args:
        config: How many there may be, and how long their words.
    """

    wants_concat = "regions"
    description = "boxes with words (--layout)"

    def __init__(self, config: RegionsConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.concat_channels = config.max_objects

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.regions``; see `Conditioner.forward`."""
        self.require(inputs.regions, inputs)
        assert inputs.regions is not None and inputs.latent_size is not None
        height, width = inputs.latent_size
        covered = torch.zeros(inputs.count, self.config.max_objects, height, width)
        for sample, regions in enumerate(inputs.regions):
            self.check(regions)
            if drop is not None and bool(drop[sample]):
                continue
            for k, region in enumerate(regions):
                down = _shares(region.top, region.bottom, height)
                covered[sample, k] = down[:, None] * _shares(region.left, region.right, width)
        return Conditioning(concat=covered)

    def null(self, count: int) -> Conditioning:
        """Return the empty condition."""
        return Conditioning()

    def check(self, regions: Sequence[Region]) -> None:
        """Refuse what is no layout for this model.

        Raises:
            RequestError: If there are too many boxes, or one is none.
        """
        if len(regions) > self.config.max_objects:
            raise RequestError(
                f"layout: has {len(regions)} boxes; the model takes {self.config.max_objects} at"
                " most"
            )
        for number, region in enumerate(regions):
            for less, more in (("left", "right"), ("top", "bottom")):
                if getattr(region, more) - getattr(region, less) < _THINNEST:
                    raise RequestError(
                        f"layout[{number}].box: {less} is {getattr(region, less)}; expected less"
                        f" than {more}, which is {getattr(region, more)}, by {_THINNEST} at least"
                    )

    def with_phrases(
        self, main: Conditioner, told: Conditioning, inputs: ConditionInputs, drop: Tensor | None
    ) -> Conditioning:
        """Add to the tokens of captions those of the boxes' words.

        Args:
            main: Reads captions.
            told: What it said of the captions of a batch, ``(B, M, d)``.
            inputs: Of the batch.
            drop: ``(B,)`` bool, true where the words of boxes are left out too.

        Returns:
            ``(B, M + max_objects phrase_length, d)`` tokens, with the box of each.
        """
        assert inputs.regions is not None
        config, whole = self.config, told.with_mask().with_boxes()
        assert whole.crossattn is not None and whole.crossattn_mask is not None
        assert whole.crossattn_boxes is not None
        dropped = [False] * inputs.count if drop is None else drop.tolist()
        chosen = [
            () if out or inputs.unnamed else tuple(regions)
            for regions, out in zip(inputs.regions, dropped, strict=True)
        ]
        words = sorted({region.words for regions in chosen for region in regions})
        place = {text: k for k, text in enumerate(words)}
        like, length = whole.crossattn, config.phrase_length
        shape = (inputs.count, config.max_objects)
        tokens = like.new_zeros(*shape, length, like.shape[-1])
        mask = whole.crossattn_mask.new_zeros(*shape, length)
        boxes = torch.zeros(*shape, 4)
        if words:
            # of one length whatever the others are, so that a sample does not depend on them
            said = main(ConditionInputs(count=len(words), captions=words, text=inputs.text))
            said = said.pad(max(length, said.crossattn.shape[1])).with_mask()
            assert said.crossattn is not None and said.crossattn_mask is not None
            for sample, regions in enumerate(chosen):
                for k, region in enumerate(regions):
                    row = place[region.words]
                    tokens[sample, k] = said.crossattn[row, :length]
                    mask[sample, k] = said.crossattn_mask[row, :length]
                    boxes[sample, k] = torch.tensor(region.box)
        own = boxes.repeat_interleave(length, dim=1).to(like.device)
        return Conditioning(
            crossattn=torch.cat([like, tokens.flatten(1, 2)], dim=1),
            crossattn_mask=torch.cat([whole.crossattn_mask, mask.flatten(1, 2)], dim=1),
            crossattn_boxes=torch.cat([whole.crossattn_boxes, own], dim=1),
        )


def _shares(low: float, high: float, cells: int) -> Tensor:
    """``(cells,)``: the share of each of so many cells in a row that an interval covers."""
    starts = torch.arange(cells) / cells
    covered = (high - starts).clamp(max=1 / cells) - (low - starts).clamp(min=0.0)
    return (covered * cells).clamp(0.0, 1.0)
