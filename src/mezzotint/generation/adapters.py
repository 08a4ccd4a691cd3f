"""The adapters that a request asks for, by name or in its prompt."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.prompts import split_adapters
from mezzotint.generation.conditions import main_part
from mezzotint.generation.request import AdapterUse, GenerationRequest
from mezzotint.latent_diffusion import LatentDiffusion

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = ["adapted", "adapters_of"]


def adapters_of(pipeline: Pipeline, request: GenerationRequest) -> tuple[AdapterUse, ...]:
    """Return the adapters of a request: those it names, and those that stand in its prompt."""
    named = request.adapters
    if not isinstance(main_part(pipeline.model.conditioner), ClipConditioner):
        return named
    _, asked = split_adapters(request.prompt or "")
    return named + tuple(AdapterUse(name=item.name, weight=item.weight) for item in asked)


@contextmanager
def adapted(
    model: LatentDiffusion, uses: Sequence[AdapterUse], folders: Sequence[Path] | None
) -> Generator[dict[str, str]]:
    if uses:
        raise NotImplementedError
    yield {}
