"""Training a model for another task by changes of a low rank alone, so that they are small to keep.

W + B A stands in place of W (Hu et al. 2021, arXiv 2106.09685). The product is added to the weight
before the layer computes, rather than beside the layer: a convolution with so few channels takes a
processor longer than making the weight. Written is an ordinary model;
`mezzotint.checkpoints.changes` keeps it as what it changes of the one that it began from.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mezzotint.checkpoints.lora_fit import Changeable
from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.spatial import spatial_conditioner
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.unet import UNet
from mezzotint.rng import keyed_generator
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.trained import Trained

__all__ = ["LowRank", "train_changes"]


class LowRank(nn.Module):
    """A change of a weight; it begins as none.

    Args:
        weight: ``(out, in)`` or ``(out, in, h, w)``.
        rank: r, the rows of A and the columns of B.
        generator: Of the processor; decides A, whatever the weight's device and type.

    Attributes:
        down: A, ``(r, in h w)``.
        up: B, ``(out, r)``.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inputs = weight[0].numel()
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def train_changes(model: LatentDiffusion, recipe: DiffusionRecipe) -> Trained:
    """Freeze a model but for changes of its UNet's layers, and for what is new.

    New is what the model that was begun from was not told: the UNet's first layer is trained
    wholly, and so is what reads pictures that are concatenated.

    Args:
        model: On its device, with the weights that it begins from.
        recipe: With ``lora_rank``.
    """
    assert recipe.lora_rank is not None
    model.requires_grad_(False)
    first, unet = model.unet.conv_in, model.unet
    changes: dict[str, LowRank] = {}
    for number, (name, layer) in enumerate(_layers(unet)):
        generator = keyed_generator(recipe.seed, 0x10A, number)
        changes[name] = LowRank(layer.weight.detach(), recipe.lora_rank, generator)
    for name, change in changes.items():
        parametrize.register_parametrization(unet.get_submodule(name), "weight", change)
    # a module's parts have no dots in their names
    factors = nn.ModuleDict({name.replace(".", "/"): change for name, change in changes.items()})
    module = nn.ModuleDict({"changes": factors, "conv_in": first})
    if model.conditioner.wants_concat is not None:
        module["spatial"] = spatial_conditioner(model.conditioner)
    module.requires_grad_(True)
    groups = ((tuple(module.parameters()), recipe.optimizer.learning_rate),)
    return Trained(module, groups, _save)


def _layers(unet: UNet) -> list[tuple[str, Changeable]]:
    found = [(name, m) for name, m in unet.named_modules() if isinstance(m, Changeable)]
    return [(name, module) for name, module in found if module is not unet.conv_in]


@torch.no_grad()
def _save(model: LatentDiffusion, folder: Path) -> None:
    """Write the model with its changes in its weights."""
    unet = UNet(model.unet.config)
    state = {n: t for n, t in model.unet.state_dict().items() if ".parametrizations." not in n}
    state |= {f"{name}.weight": layer.weight for name, layer in _layers(model.unet)}
    unet.load_state_dict(state)
    schedule, normalization = model.schedule_config, model.normalization
    first_stage, conditioner = model.first_stage, model.conditioner
    plain = LatentDiffusion(
        first_stage, unet, conditioner, schedule, normalization, model.image_size
    )
    save_model(plain, folder)
