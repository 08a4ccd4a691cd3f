"""The opponent of the first stage, which tells its reconstructions from real images."""

import torch
from torch import Tensor, nn

from mezzotint.device import Execution, autocast, widened
from mezzotint.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.optimizer import build_optimizer
from mezzotint.training.parallel import Parallel
from mezzotint.training.ranks import Ranks
from mezzotint.training.recipe import AutoencoderRecipe

__all__ = ["Adversary"]


class _Loss(nn.Module):
    """What the discriminator minimises."""

    def __init__(self, network: PatchDiscriminator, execution: Execution) -> None:
        super().__init__()
        self.network, self.execution = network, execution

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.execution):
            logits = self.network(torch.cat([real, fake]))
        means = widened(logits.detach()).unflatten(0, (2, -1)).flatten(1).mean(1)
        return hinge_discriminator_loss(*logits.chunk(2)), means


class Adversary:
    """The discriminator D_psi, its optimizer, and when it learns and speaks (VQGAN, eq. 6 and 7).

    Args:
        recipe: With an adversarial loss.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    def __init__(
        self, recipe: AutoencoderRecipe | DecoderRecipe, execution: Execution, ranks: Ranks
    ) -> None:
        assert recipe.loss.adversarial is not None
        self.config, self.execution, self.ranks = recipe.loss.adversarial, execution, ranks
        self.parts = recipe.accumulate
        network = PatchDiscriminator(self.config.discriminator)
        self.network = network.to(execution.device, execution.weights)
        rate = self.config.learning_rate or recipe.optimizer.learning_rate
        self.optimizer = build_optimizer(
            [{"params": list(self.network.parameters()), "lr": rate}], recipe.optimizer
        )
        self.loss = Parallel(_Loss(self.network, execution), ranks)

    def learns_at(self, step: int) -> bool:
        """Whether the discriminator is trained in a step."""
        return step >= self.config.start_step - self.config.pretrain_steps

    def speaks_at(self, step: int) -> bool:
        """Whether the autoencoder sees its loss in a step."""
        return step >= self.config.start_step

    def generator_term(
        self, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the adversarial term of the autoencoder, a scalar, and its adaptive weight.

        The discriminator's parameters take no gradient here: they are the adversary's to move.
        """
        self.network.requires_grad_(False)
        with autocast(self.execution):
            logits = self.network(fake)
        self.network.requires_grad_(True)
        term = generator_loss(logits)
        weight = adaptive_weight(
            reconstruction, term, last_layer, reduce=self.ranks.mean, scale=scale
        )
        return self.config.weight * weight * term, weight

    def backward(
        self, real: Tensor, fake: Tensor, scaler: torch.amp.GradScaler, *, last: bool
    ) -> dict[str, Tensor]:
        """Accumulate the discriminator's gradients of a part of a step.

        Args:
            real: ``(B, 3, H, W)`` in -1..1.
            fake: Their reconstructions, detached.
            scaler: Scales the loss.
            last: Whether it is the last part.

        Returns:
            The part's share of the loss, and of the mean logits of both.
        """
        with self.loss.part(last=last):
            loss, logits = self.loss(real, fake)
            scaler.scale(loss / self.parts).backward()
        told = {"discriminator_loss": loss.detach(), "logits_real": logits[0]}
        told["logits_fake"] = logits[1]
        return {name: value / self.parts for name, value in told.items()}
