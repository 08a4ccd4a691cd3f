"""Class labels as one learned token for cross-attention (paper, appendix E.2.1)."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from mezzotint.conditioning.base import Conditioner, Conditioning, ConditionInputs
from mezzotint.config import Config, Width
from mezzotint.errors import RequestError, nearest

__all__ = ["ClassConditioner", "ClassConditionerConfig", "class_index"]

_LISTED = 40  # a message that lists more names than these is read by nobody


class ClassConditionerConfig(Config):
    """A learned embedding per class.

    Attributes:
        width: Width d of the token; the UNet's ``cross_attention_dim``.
        class_names: The classes by index; taken from the data set if left empty in a recipe.
    """

    kind: Literal["class"] = "class"
    width: Width = 512
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> "ClassConditionerConfig":
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names: a name stands there twice")
        return self


class ClassConditioner(Conditioner):
    """Embeds a class index as ``(B, 1, d)``; the null is one more class, learned by dropout."""

    wants = "label"

    def __init__(self, config: ClassConditionerConfig) -> None:
        super().__init__()
        assert config.class_names, "the classes are filled in from the data before this is built"
        self.config = config
        self.embedding = nn.Embedding(len(config.class_names) + 1, config.width)
        names = ", ".join(config.class_names[:8])
        more = ", …" if len(config.class_names) > 8 else ""
        self.description = f"a class (--class, one of: {names}{more})"

    def settings(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config.to_dict()

    def index_of(self, label: str | int) -> int:
        """Return the index of a class given by name or index.

        Raises:
            RequestError: If there is no such class; it names the nearest.
        """
        return class_index(label, self.config.class_names, len(self.config.class_names))

    def forward(self, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning:
        """Condition on ``inputs.labels``; see `Conditioner.forward`."""
        self.require(inputs.labels, inputs)
        labels = torch.as_tensor(inputs.labels, device=self.embedding.weight.device)
        if drop is not None:
            labels = torch.where(drop.to(labels.device), len(self.config.class_names), labels)
        return Conditioning(crossattn=self.embedding(labels)[:, None])

    def null(self, count: int) -> Conditioning:
        """Return the null class, ``count`` times."""
        index = torch.full((count,), len(self.config.class_names))
        return Conditioning(
            crossattn=self.embedding(index.to(self.embedding.weight.device))[:, None]
        )


def class_index(label: str | int, names: Sequence[str], count: int) -> int:
    """Return the index of a class given by name or index.

    Args:
        label: What the user wrote.
        names: The classes by index; empty if they have none.
        count: How many classes there are.

    Raises:
        RequestError: If there is no such class; it names the nearest.
    """
    if label in names:
        return names.index(str(label))
    if str(label).isdecimal() and int(label) < count:
        return int(label)
    if not names:
        raise RequestError(f"unknown class {label!r}; expected a number from 0 to {count - 1}")
    if len(names) <= _LISTED:
        raise RequestError(f"unknown class {label!r}; {nearest(str(label), names)}")
    close = get_close_matches(str(label), names, n=8, cutoff=0.0)
    raise RequestError(
        f"unknown class {label!r}; {nearest(str(label), close)}, … ({count} classes in all)"
    )
