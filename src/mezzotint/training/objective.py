"""What a step of training in latent space minimises, and what is told of it."""

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

__all__ = ["DiffusionLoss", "Objective"]


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
        """Return the mean loss of a batch and gauges of it; ``drawn`` are times ``(B, 1)``."""
        model, recipe, t = self.model, self.recipe, drawn[:, 0]
        with autocast(self.execution):
            cond = model.conditioner(inputs, *drop)
            losses = diffusion_loss(
                model.predict,
                model.schedule,
                z,
                t,
                noise,
                cond,
                weighting=recipe.weighting,
                deviation=recipe.deviation,
            )
        loss = losses.mean() if weights is None else (losses * weights).mean()
        with torch.no_grad():
            silent = diffusion_loss(
                _silent,
                model.schedule,
                z,
                t,
                noise,
                cond,
                weighting=recipe.weighting,
                deviation=recipe.deviation,
            )
            told = noise_gauges(losses, t / model.schedule.num_train_timesteps)
            told |= latent_gauges(z)
            told["loss_of_zero"] = silent.mean()
            told["worse_than_nothing"] = worse_gauge(losses.mean(), told["loss_of_zero"])
        return loss, told


def _silent(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """A network that predicts nothing: its loss is what there is to explain."""
    return torch.zeros_like(x)
