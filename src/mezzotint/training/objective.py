"""What a step of training in latent space minimises, and what is told of it."""

from functools import partial

import torch
from torch import Tensor, nn

from mezzotint.conditioning.base import ConditionInputs
from mezzotint.device import Execution, autocast
from mezzotint.diffusion.loss import diffusion_loss
from mezzotint.diffusion.times import draw_time
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.gauges import latent_gauges, noise_gauges, worse_gauge
from mezzotint.training.recipe import DiffusionRecipe

__all__ = ["DiffusionLoss", "Objective", "told_of"]


class Objective(nn.Module):
    """What a step minimises, as one module: torch's engines wrap modules."""

    def draw(self, generator: torch.Generator) -> tuple[float, ...]:
        """Draw what is drawn for one sample beside its noise: its time first."""
        raise NotImplementedError

    def forward(
        self,
        z: Tensor,
        drawn: Tensor,
        noise: Tensor,
        inputs: ConditionInputs,
        drop: list[Tensor],
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch, a scalar, and gauges of it.

        Args:
            z: ``(B, C, h, w)`` normalised latents.
            drawn: ``(B, k)``, of each sample what `draw` gave.
            noise: Of the shape of ``z``.
            inputs: Of the conditioner.
            drop: For each of its parts, ``(B,)`` whose conditions are replaced by the null.
            weights: ``(B,)``, of the samples.
        """
        raise NotImplementedError


def told_of(
    losses: Tensor, of_zero: Tensor, level: Tensor, z: Tensor, weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of a batch, a scalar, and gauges of it.

    Args:
        losses: ``(B,)``.
        of_zero: ``(B,)``, those of predicting nothing: what there is to explain.
        level: ``(B,)`` in [0, 1), the share of the schedule's times that have less noise.
        z: ``(B, C, h, w)`` normalised latents.
        weights: ``(B,)``, of the samples.
    """
    with torch.no_grad():
        told = noise_gauges(losses, level) | latent_gauges(z)
        told["loss_of_zero"] = of_zero.mean()
        told["worse_than_nothing"] = worse_gauge(losses.mean(), told["loss_of_zero"])
    return (losses if weights is None else losses * weights).mean(), told


class DiffusionLoss(Objective):
    """The error of one prediction a sample (paper, eq. 2 and 3).

    Args:
        model: Around a frozen first stage.
        trained: What of it is trained; the vectors of a new word are no parameters of the model.
        recipe: Says how times are weighed, and how the error is measured.
        execution: Device and precision.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        trained: nn.Module,
        recipe: DiffusionRecipe | FinetuneRecipe,
        execution: Execution,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.execution = model, recipe, execution
        self.trained = trained

    def draw(self, generator: torch.Generator) -> tuple[float, ...]:
        """Draw the time of a sample."""
        return (draw_time(self.recipe.times, self.model.schedule, generator),)

    def forward(
        self,
        z: Tensor,
        drawn: Tensor,
        noise: Tensor,
        inputs: ConditionInputs,
        drop: list[Tensor],
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch and gauges of it; see `Objective.forward`."""
        model, schedule, t = self.model, self.model.schedule, drawn[:, 0]
        weighting, deviation = self.recipe.weighting, self.recipe.deviation
        measure = partial(diffusion_loss, weighting=weighting, deviation=deviation)
        with autocast(self.execution):
            cond = model.conditioner(inputs, *drop)
            losses = measure(model.predict, schedule, z, t, noise, cond)
        with torch.no_grad():
            of_zero = measure(_silent, schedule, z, t, noise, cond)
        return told_of(losses, of_zero, t / schedule.num_train_timesteps, z, weights)


def _silent(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """A network that predicts nothing."""
    return torch.zeros_like(x)
