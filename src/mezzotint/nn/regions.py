"""Tokens that only a part of the picture attends to, as a mask of cross-attention at any size."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Regions"]


@dataclass(frozen=True, eq=False)
class Regions:
    """Where each token of a context counts.

    Attributes:
        boxes: ``(B, M, 4)`` left, top, right and bottom, as shares of width and height.
        mask: ``(B, M)`` bool, true where a token is real; absent means all are.
    """

    boxes: Tensor
    mask: Tensor | None = None

    def at(self, height: int, width: int) -> Tensor:
        """Return ``(B, 1, HW, M)`` bool for features of a size: a cell sees what it overlaps.

        Example:
            >>> left = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
            >>> Regions(left).at(1, 4).flatten().tolist()
            [True, True, False, False]
        """
        left, top, right, bottom = self.boxes.float().unbind(-1)  # each (B, M)
        across = _overlaps(left, right, width)  # (B, W, M)
        down = _overlaps(top, bottom, height)
        seen = (down[:, :, None] & across[:, None]).flatten(1, 2)  # (B, HW, M)
        if self.mask is not None:
            seen = seen & self.mask[:, None]
        return seen[:, None]


def _overlaps(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """``(B, cells, M)``: which of so many cells in a row an interval has a part of."""
    starts = torch.arange(cells, device=low.device)[:, None] / cells
    # a share such as 1/3 is not exact: what only touches a cell has no part of it
    near = 1e-4 / cells
    return (low[:, None] < starts + 1 / cells - near) & (high[:, None] > starts + near)
