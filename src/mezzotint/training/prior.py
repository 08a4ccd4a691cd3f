"""The pictures of prior preservation: drawn by the base model before it is trained further."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from mezzotint.checkpoints.loaded import LoadedModel
from mezzotint.device import Execution
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import Pipeline
from mezzotint.rng import mix
from mezzotint.training.finetune_recipe import FinetuneRecipe, PriorConfig
from mezzotint.training.log import RunLog
from mezzotint.training.ranks import Ranks

__all__ = ["draw_prior"]

_AT_ONCE = 8
_SEEDS = 1 << 31


def draw_prior(
    prior: PriorConfig,
    recipe: FinetuneRecipe,
    loaded: LoadedModel,
    base: str,
    folder: Path,
    execution: Execution,
    ranks: Ranks,
    log: RunLog,
) -> list[Path]:
    """Draw the pictures that are not there yet, each rank its share.

    Picture k depends on the recipe's seed and k alone, so that drawing can be stopped and gone on
    with. Those of another model, prompt or way of drawing are never taken for these.

    Args:
        prior: What to draw, and how many.
        recipe: Says their size and seed.
        loaded: The base model, as it was read.
        base: Its hash.
        folder: Of the pictures.
        execution: Device and precision.
        ranks: This process among the others of the run.
        log: Where it is said.

    Returns:
        A PNG for each.
    """
    side = recipe.data.resolution
    drawn_by = [base, prior.to_dict() | {"count": None, "weight": None}, side, recipe.seed]
    key = hashlib.sha256(json.dumps(drawn_by, sort_keys=True).encode()).hexdigest()[:12]
    folder = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k:05d}.png" for k in range(prior.count)]
    missing = [k for k, path in enumerate(paths) if not path.is_file()]
    if missing:
        log.event(f"drawing {len(missing):,} of {prior.count:,} pictures of {prior.prompt!r}")
    ranks.wait()  # until all have seen what is missing
    mine = missing[ranks.rank :: ranks.world]
    if execution.weights is torch.float64:  # which is for training alone
        execution = replace(execution, precision=torch.float32)
    pipeline = Pipeline(loaded.model, execution, recipe.name, loaded) if mine else None
    for start in range(0, len(mine), _AT_ONCE):
        assert pipeline is not None
        pipeline.model_hash = base
        part = mine[start : start + _AT_ONCE]
        fields = {
            "prompt": prior.prompt,
            "steps": prior.steps,
            "guidance_scale": prior.guidance_scale,
            "spacing": loaded.defaults.spacing or "trailing",
            "width": side,
            "height": side,
        }
        seeds = [mix(recipe.seed, 0x9210, k) % _SEEDS for k in part]
        requests = [pipeline.request(**fields, seed=seed) for seed in seeds]
        for k, item in zip(part, generate_each(pipeline, requests), strict=True):
            temporary = paths[k].with_suffix(f".{os.getpid()}.tmp")
            item.image.save(temporary, format="PNG")
            temporary.replace(paths[k])
    ranks.wait()
    return paths
