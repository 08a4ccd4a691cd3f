"""What of a diffusion model is trained, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import CLASS, save_model
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.registry import INDEX, resolve_model
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.base_model import BaseModelConfig
from mezzotint.training.recipe import DiffusionRecipe

__all__ = ["Export", "Trained", "jointly", "stored_like"]

Export = Callable[[LatentDiffusion, Path], None]
"""Writes a model, of averaged weights, into a folder."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What of a model is trained, and what is written in the end.

    Attributes:
        module: Its parameters are trained, averaged and saved; they are parameters of the model.
        groups: Some of them, and the peak of their learning rate.
        export: Writes the whole model.
        sampler: Draws the sample grids.
    """

    module: nn.Module
    groups: tuple[tuple[tuple[nn.Parameter, ...], float], ...]
    export: Export
    sampler: str = "ddim"


def jointly(model: LatentDiffusion, recipe: DiffusionRecipe) -> Trained:
    """The UNet and the conditioner (paper, eq. 2 and 3)."""
    rate = recipe.optimizer.learning_rate
    groups = [(tuple(model.unet.parameters()), rate)]
    if conditioner := tuple(model.conditioner.parameters()):
        groups.append((conditioner, recipe.conditioner_learning_rate or rate))
    module = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
    return Trained(module, tuple(groups), save_model)


def stored_like(base: BaseModelConfig, defaults: SamplingDefaults) -> Export:
    """Return what writes a model as the one that it goes on from lies on the disk.

    Args:
        base: The model that it goes on from: a folder of ours, or of diffusers'.
        defaults: How it is best drawn from.
    """
    index = resolve_model(Path(base.model).expanduser()) / INDEX
    own = index.is_file() and read_json(index).get("_class_name") == CLASS

    def export(model: LatentDiffusion, folder: Path) -> None:
        (save_model if own else save_pipeline)(model, folder, defaults=defaults)

    return export
