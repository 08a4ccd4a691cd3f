"""A model as it was found, and what its files say beyond it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath, commonprefix
from pathlib import Path
from typing import Literal

from mezzotint.diffusion.schedule import Spacing
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = ["LoadedModel", "SamplingDefaults", "Weights", "content_hash", "file_sha256", "listed"]

Weights = Literal["auto", "ema", "raw"]
"""Which of two sets of weights: ``auto`` is the averaged one where there is one."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request for this model takes where it says nothing; None leaves the program's own.

    Attributes:
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
        spacing: Of the noise levels.
        guidance_scale: Of classifier-free guidance.
        steps: How many noise levels the sampler visits.
    """

    sampler: str | None = None
    spacing: Spacing | None = None
    guidance_scale: float | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model read from the disk.

    Attributes:
        model: Ready to run, on the CPU.
        defaults: What its files say of sampling.
        files: All that decides what it draws; none if its own state says it all.
        notes: Sentences that a user should read: what was guessed, what was left out.
        left_out: Names of the tensors that were not read, and of what stood beside them, but for
            what the notes name.
        read_as: What was said of it in place of a guess: ``family``, ``prediction``, ``weights``,
            ``config``.
    """

    model: LatentDiffusion
    defaults: SamplingDefaults = SamplingDefaults()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = ()
    read_as: Mapping[str, str] = field(default_factory=dict[str, str])

    def content_hash(self) -> str:
        """Identify the model: the sha256 of its one file, or one over those of several.

        A file that was not read as it would have been by itself is another model.
        """
        if not self.files:
            return self.model.weights_hash()
        found = content_hash(self.files)
        # what a YAML file says is in its own sum
        told = {name: value for name, value in self.read_as.items() if name != "config"}
        if not told:
            return found
        return hashlib.sha256(json.dumps([found, told], sort_keys=True).encode()).hexdigest()


def listed(names: Iterable[str], most: int = 16) -> str:
    """Return names for a sentence; more than so many that begin alike are counted.

    Args:
        names: With dots between their parts.
        most: How many of one beginning are named one by one.

    Example:
        >>> listed(["alpha", "ema.0", "ema.1", "ema.2"], most=2)
        'alpha, ema.… (3)'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(
        ", ".join(group) if len(group) <= most else f"{_beginning(group)}… ({len(group)})"
        for group in groups.values()
    )


def _beginning(names: Sequence[str]) -> str:
    """The parts that all of them begin with."""
    same = commonprefix(names)
    return same[: same.rfind(".") + 1] or same


def content_hash(files: Iterable[Path]) -> str:
    """Return the sha256 of one file, or for several that of their names and sums, hexadecimal.

    Names are those in the folder that holds all of them, whose own may change.
    """
    paths = sorted(path.absolute() for path in files)
    if len(paths) == 1:
        return file_sha256(paths[0])
    folder = commonpath([path.parent for path in paths])
    sums = [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in paths]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
