"""The trained model that a recipe goes on from."""

from pathlib import Path
from typing import Any

from pydantic import Field

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import LoadedModel, Weights
from mezzotint.config import Config

__all__ = ["BaseModelConfig", "base_of", "load_base"]


class BaseModelConfig(Config):
    """A trained model to go on from: any that `mezzotint.checkpoints.load.load_any` reads.

    In a recipe ``PATH`` is short for ``{model: PATH}``.

    Attributes:
        model: A folder of Mezzotint's or of diffusers', a finished run, or a single file.
        config: The YAML of a single file, if it does not lie beside it.
        family: What a single file is, if it is recognised wrongly.
        prediction: What a single file predicts, if that is guessed wrongly.
        weights: Of a single file with averaged weights, which to take.
    """

    model: str = Field(min_length=1)
    config: str | None = None
    family: str | None = None
    prediction: str | None = None
    weights: Weights = "auto"


def base_of(value: Any) -> Any:
    """Return what a recipe says of a model in full."""
    return {"model": value} if isinstance(value, str) else value


def load_base(base: BaseModelConfig) -> LoadedModel:
    """Read the model that a recipe names.

    Raises:
        CheckpointError: If there is no such model, or it is damaged.
    """
    return load_any(
        Path(base.model).expanduser(),
        config=None if base.config is None else Path(base.config).expanduser(),
        family=base.family,
        prediction=base.prediction,
        weights=base.weights,
    )
