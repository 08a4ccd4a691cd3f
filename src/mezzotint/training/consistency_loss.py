"""What a step of latent consistency distillation minimises."""

import torch
from torch import Tensor
from torch.func import functional_call

from mezzotint.conditioning.base import Conditioning, ConditionInputs
from mezzotint.device import Execution, autocast
from mezzotint.diffusion.consistency import ConsistencyFunction
from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.loss import pseudo_huber
from mezzotint.latent_diffusion import LatentDiffusion, run_unet
from mezzotint.models.unet import UNet
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.objective import Objective, told_of

__all__ = ["ConsistencyLoss"]


class ConsistencyLoss(Objective):
    """How far the student's end of the path is from the target network's, one step further down it.

    Algorithm 1 of Luo et al. (arXiv 2310.04378): from a time t of the distillation, the guided
    teacher takes one step of DDIM to the time before it, and the average of the student says from
    there where the path ends. No gradient passes through teacher and average.

    Args:
        model: The student, around the teacher's autoencoder and conditioner.
        average: Of the student's weights: the target network.
        teacher: A frozen UNet.
        recipe: Says how far the teacher is guided, and how deviations are weighed.
        execution: Device and precision.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        average: ExponentialMovingAverage,
        teacher: UNet,
        recipe: DistillRecipe,
        execution: Execution,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.execution = model, recipe, execution
        self.teacher = teacher.eval().requires_grad_(False)
        self.average = average
        self.guided = model.conditioner.wants is not None
        self.times = model.schedule.distilled_times()

    def draw(self, generator: torch.Generator) -> tuple[float, ...]:
        """Draw the place of a time among those of the distillation, and a scale of guidance."""
        place = int(torch.randint(1, len(self.times), (1,), generator=generator))
        low, high = self.recipe.guidance_range
        return place, low + (high - low) * float(torch.rand(1, generator=generator))

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
        schedule = self.model.schedule
        places, scale = drawn[:, 0].long(), drawn[:, 1].to(z.dtype)
        t, before = (self.times.to(z.device)[places - k] for k in (0, 1))
        sigma, lower = schedule.t_to_sigma(t), schedule.t_to_sigma(before)
        x = z + _column(sigma, z) * noise
        with autocast(self.execution):
            with torch.no_grad():
                cond = self.model.conditioner(inputs, *drop)
                below = self._step(x, sigma, lower, scale, cond, inputs, drop)
                wanted = self._end(self._averaged, below, lower, scale, cond)
            found = self._end(self.model.unet, x, sigma, scale, cond)
        losses = pseudo_huber(found, wanted, self.recipe.huber_c)
        of_zero = pseudo_huber(torch.zeros_like(wanted), wanted, self.recipe.huber_c)
        return told_of(losses, of_zero, t / schedule.num_train_timesteps, z, weights)

    def _end(
        self,
        unet: "UNet | _Averaged",
        x: Tensor,
        sigma: Tensor,
        scale: Tensor,
        cond: Conditioning,
    ) -> Tensor:
        """Where the path through a point ends, in the student's opinion or its average's."""
        told = scale if self.guided else None

        def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return run_unet(unet, x, t, cond, guidance=told)

        denoiser = Denoiser(network, self.model.schedule)
        end = ConsistencyFunction(lambda x, sigma: denoiser(x, sigma, cond), self.model.schedule)
        return end(x, sigma)

    @property
    def _averaged(self) -> "_Averaged":
        weights = {
            name.removeprefix("unet."): tensor for name, tensor in self.average.average.items()
        }
        return _Averaged(self.model.unet, weights)

    def _step(
        self,
        x: Tensor,
        sigma: Tensor,
        lower: Tensor,
        scale: Tensor,
        cond: Conditioning,
        inputs: ConditionInputs,
        drop: list[Tensor],
    ) -> Tensor:
        """One step of DDIM by the guided teacher, which in these coordinates is Euler's."""

        def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return run_unet(self.teacher, x, t, cond)

        denoiser = Denoiser(network, self.model.schedule)
        if self.guided:
            null = self.model.conditioner(inputs, torch.ones_like(drop[0]), *drop[1:])
            twice = torch.cat([x, x]), torch.cat([sigma, sigma]), cond.cat(null)
            with_it, without = denoiser(*twice).chunk(2)
            image = without + _column(scale, x) * (with_it - without)
        else:
            image = denoiser(x, sigma, cond)
        return image + _column(lower / sigma, x) * (x - image)


class _Averaged:
    """A UNet with other weights than its own, for the length of a call."""

    def __init__(self, unet: UNet, weights: dict[str, Tensor]) -> None:
        self._unet, self._weights = unet, weights

    def __call__(self, *inputs: Tensor, **conditions: Tensor | None) -> Tensor:
        return functional_call(self._unet, self._weights, inputs, conditions)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
