"""A model as it was found, and what its files say beyond it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mezzotint.diffusion.schedule import Spacing
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = ["LoadedModel", "SamplingDefaults", "Weights", "content_hash", "file_sha256"]

Weights = Literal["auto", "ema", "raw"]
"""Which of two sets of weights: ``auto`` is the averaged one where there is one."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request for this model takes where it says nothing; None leaves the program's own.

    Attributes:
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
        spacing: Of the noise levels.
        guidance_scale: Of classifier-free guidance.
    """

    sampler: str | None = None
    spacing: Spacing | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model read from the disk.

    Attributes:
        model: Ready to run, on the CPU.
        defaults: What its files say of sampling.
        files: All that decides what it draws; none if its own state says it all.
        notes: Sentences that a user should read: what was guessed, what was left out.
    """

    model: LatentDiffusion
    defaults: SamplingDefaults = SamplingDefaults()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def content_hash(self) -> str:
        """Identify the model: the sha256 of its one file, or one over those of several."""
        if not self.files:
            return self.model.weights_hash()
        return content_hash(self.files)


def content_hash(files: Iterable[Path]) -> str:
    """Return the sha256 of one file, or for several that of their names and sums, hexadecimal."""
    paths = sorted(files)
    if len(paths) == 1:
        return file_sha256(paths[0])
    sums = [[path.parent.name, path.name, file_sha256(path)] for path in paths]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
