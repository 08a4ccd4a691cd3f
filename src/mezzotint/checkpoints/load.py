"""Any model that lies on the disk, in whichever layout."""

from dataclasses import replace
from pathlib import Path

import torch

from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.loaded import LoadedModel, Weights
from mezzotint.checkpoints.model import CLASS, read_model
from mezzotint.checkpoints.pipelines import load_pipeline
from mezzotint.checkpoints.registry import INDEX, resolve_model
from mezzotint.checkpoints.single_file import load_single_file
from mezzotint.errors import CheckpointError

__all__ = ["load_any"]


def load_any(
    name: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    config: Path | None = None,
    family: str | None = None,
    prediction: str | None = None,
    weights: Weights = "auto",
) -> LoadedModel:
    """Read a model: a folder of Mezzotint's or of diffusers', a finished run, or a single file.

    Args:
        name: A path, or the name of a shipped model.
        dtype: Of the floating-point weights of public checkpoints in memory; None keeps each as it
            is on the disk. Mezzotint's own are float32, and run in other precisions from there,
            so that a picture is drawn again as it was; None keeps them as they are too.
        config: The YAML of a single file, if it does not lie beside it.
        family: What a single file is, if it is recognised wrongly.
        prediction: ``epsilon`` or ``v_prediction``, if that of a single file is guessed wrongly.
        weights: Of a single file with averaged weights, which to take.

    Raises:
        CheckpointError: If there is no such model, it is damaged or of an unknown kind, or a folder
            is told what only single files need.
        MissingExtraError: If it reads CLIP's text, and ``transformers`` is not installed.
    """
    told = {"config": config, "family": family, "prediction": prediction, "weights": weights}
    given = {option: str(value) for option, value in told.items() if value not in (None, "auto")}
    path = resolve_model(name)
    if path.is_file():
        found = load_single_file(
            path, dtype=dtype, config=config, family=family, prediction=prediction, weights=weights
        )
        return replace(found, read_as=given)
    if given:
        raise CheckpointError(
            f"{path}: a folder says itself what it is; {', '.join(given)} is for single files"
        )
    if read_json(path / INDEX).get("_class_name") == CLASS:
        return read_model(path, dtype if dtype is None else torch.float32)
    return load_pipeline(path, dtype=dtype)
