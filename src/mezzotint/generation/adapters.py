"""The adapters that a request asks for, by name or in its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.prompts import split_adapters
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.generation.request import AdapterUse, GenerationRequest

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = ["adapters_of"]


def adapters_of(pipeline: Pipeline, request: GenerationRequest) -> tuple[AdapterUse, ...]:
    """Return the adapters of a request: those it names, and those that stand in its prompt."""
    named = request.adapters
    if not isinstance(main_conditioner(pipeline.model.conditioner), ClipConditioner):
        return named
    _, asked = split_adapters(request.prompt or "")
    return named + tuple(AdapterUse(name=item.name, weight=item.weight) for item in asked)
