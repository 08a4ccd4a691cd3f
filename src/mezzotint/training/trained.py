"""What of a diffusion model is trained, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mezzotint.checkpoints.model import save_model
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.recipe import DiffusionRecipe

__all__ = ["Trained", "jointly"]


@dataclass(frozen=True, eq=False)
class Trained:
    """What of a model is trained, and what is written in the end.

    Attributes:
        module: Its parameters are trained, averaged and saved; they are parameters of the model.
        groups: Some of them, and the peak of their learning rate.
        export: Called with the model, of averaged weights, and the folder to write into.
        sampler: Draws the sample grids.
    """

    module: nn.Module
    groups: tuple[tuple[tuple[nn.Parameter, ...], float], ...]
    export: Callable[[LatentDiffusion, Path], None]
    sampler: str = "ddim"


def jointly(model: LatentDiffusion, recipe: DiffusionRecipe) -> Trained:
    """The UNet and the conditioner (paper, eq. 2 and 3)."""
    rate = recipe.optimizer.learning_rate
    groups = [(tuple(model.unet.parameters()), rate)]
    if conditioner := tuple(model.conditioner.parameters()):
        groups.append((conditioner, recipe.conditioner_learning_rate or rate))
    module = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
    return Trained(module, tuple(groups), save_model)
