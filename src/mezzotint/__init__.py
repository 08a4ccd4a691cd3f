"""Latent diffusion: train both stages, draw, and draw the same again.

Importing this package does no work: names are resolved, and torch imported, at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint import checkpoints, models
    from mezzotint.errors import MezzotintError
    from mezzotint.evaluation.evaluate import evaluate
    from mezzotint.generation.generate import generate
    from mezzotint.generation.pipeline import Pipeline, load
    from mezzotint.generation.request import GenerationRequest
    from mezzotint.training.run import train

__version__ = "0.1.0"

__all__ = [
    "GenerationRequest",
    "MezzotintError",
    "Pipeline",
    "__version__",
    "checkpoints",
    "evaluate",
    "generate",
    "load",
    "models",
    "train",
]

_HOME = {
    "GenerationRequest": "mezzotint.generation.request",
    "MezzotintError": "mezzotint.errors",
    "Pipeline": "mezzotint.generation.pipeline",
    "evaluate": "mezzotint.evaluation.evaluate",
    "generate": "mezzotint.generation.generate",
    "load": "mezzotint.generation.pipeline",
    "train": "mezzotint.training.run",
}


def __getattr__(name: str) -> Any:
    if name in ("models", "checkpoints"):
        return importlib.import_module(f"mezzotint.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
