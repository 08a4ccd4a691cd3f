"""From one layout to another: diffusers' folders, and single files of the original code."""

import secrets
import shutil
from pathlib import Path
from typing import Literal

import torch

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import Weights, listed
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.errors import CheckpointError

__all__ = ["Layout", "convert"]

Layout = Literal["diffusers", "compvis"]
SUFFIXES = (".safetensors", ".ckpt")


def convert(
    source: Path,
    target: Path,
    to: Layout,
    *,
    dtype: torch.dtype | None = None,
    weights: Weights = "auto",
    config: Path | None = None,
    family: str | None = None,
    prediction: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model in another layout; every tensor that both can hold stays equal.

    Args:
        source: Any model that `mezzotint.checkpoints.load.load_any` reads.
        target: A folder for ``diffusers``; a ``.safetensors`` or ``.ckpt`` file for ``compvis``.
        to: The layout.
        dtype: Of the floating-point weights; None leaves each as it is.
        weights: Of a file with averaged weights, which to take.
        config: The YAML of a single file.
        family: What a single file is, if it is recognised wrongly.
        prediction: What it predicts, if that is guessed wrongly.
        overwrite: Whether what stands at ``target`` may be replaced.

    Returns:
        Sentences on what was guessed, on all of the source that is not in the target, and on what
        the layout could not hold.

    Raises:
        CheckpointError: If the source cannot be read, the target not be written, or ``dtype`` not
            hold a weight; in each case nothing of the target is written.
    """
    if to == "compvis" and target.suffix not in SUFFIXES:
        raise CheckpointError(f"{target}: a single file is named *.safetensors or *.ckpt")
    if to == "diffusers" and target.suffix in SUFFIXES:
        raise CheckpointError(f"{target}: a diffusers model is a folder; name it without a suffix")
    beside = [target.with_suffix(".yaml")] if to == "compvis" else []
    for path in (target, *beside):
        there = path.is_file() or (path.is_dir() and any(path.iterdir()))
        if there and not overwrite:
            raise CheckpointError(f"{path}: is there already; choose another name, or --overwrite")
    filled = target.is_dir() and any(target.iterdir())
    if to == "diffusers" and filled and not (target / INDEX).is_file():
        raise CheckpointError(f"{target}: holds something else than a model; not overwritten")
    loaded = load_any(
        source, dtype=None, family=family, prediction=prediction, weights=weights, config=config
    )
    if to == "compvis":
        lost = save_single_file(loaded.model, target, dtype=dtype, defaults=loaded.defaults)
    else:
        # into a new folder: what an old one has besides would be read with it
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            lost = save_pipeline(loaded.model, fresh, dtype=dtype, defaults=loaded.defaults)
            if target.exists():
                shutil.rmtree(target)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    left = [f"left out: {listed(loaded.left_out)}"] if loaded.left_out else []
    return [*loaded.notes, *left, *lost]
