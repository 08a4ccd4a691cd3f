"""Training a network that makes pictures, on pictures: what autoencoders and decoders share."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.device import Execution
from mezzotint.evaluation.grids import image_grid
from mezzotint.generation.sampling import to_images
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.small_decoder import SmallDecoder
from mezzotint.rng import keyed_generator, mix
from mezzotint.training.adversary import Adversary
from mezzotint.training.batches import Batches
from mezzotint.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    restore_optimizer,
    restore_or_begin,
)
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.health import Sample
from mezzotint.training.optimizer import (
    apply_gradients,
    build_optimizer,
    learning_rate_factor,
    loss_scaler,
    use_channels_last,
)
from mezzotint.training.orders import (
    TrainingData,
    build_order,
    load_stream_state,
    spread,
    stream_state,
)
from mezzotint.training.parallel import Parallel
from mezzotint.training.ranks import Ranks, positions_of
from mezzotint.training.recipe import AutoencoderRecipe
from mezzotint.training.snapshots import save_if_due

__all__ = ["Made", "Opponent", "PixelObjective", "PixelTask", "to_pixels"]

_PREVIEWS = 8

R = TypeVar("R", bound=AutoencoderRecipe | DecoderRecipe)
M = TypeVar("M", bound=AutoencoderKL | VQModel | SmallDecoder)

# of pictures and their loss: the adversarial term and its adaptive weight
Opponent = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images ``(B, 3, H, W)`` into float32 in [-1, 1] on a device."""
    return images.to(device).float() / 127.5 - 1.0


class Made(NamedTuple):
    """What the network made of a part of a step."""

    loss: Tensor  # a scalar
    fake: Tensor  # (B, 3, H, W), detached
    z: Tensor  # (B, C, h, w), detached
    told: dict[str, Tensor]  # for the log


class PixelObjective(nn.Module):
    """What a step minimises, as one module: torch's engines wrap modules."""

    def forward(self, images: Tensor, seeds: Sequence[int], opponent: Opponent | None) -> Made:
        """Return the loss of images, the pictures made of them, their latents, and gauges.

        Args:
            images: ``(B, 3, H, W)`` in -1..1.
            seeds: Of the posterior's noise, one for each.
            opponent: The discriminator, from when on it takes part.
        """
        raise NotImplementedError


class PixelTask(Generic[R, M]):
    """Trains a network on pixels, and beside it a discriminator if the recipe has one.

    Args:
        recipe: What to train.
        model: The network, with its first weights.
        objective: Makes what a step minimises, once there is a discriminator: what each of the two
            draws from torch's random numbers, the other's first weights would depend on.
        data: The images.
        execution: Device and precision.
        ranks: This process among the others of the run.

    Attributes:
        group: What a checkpoint calls the network's weights.
    """

    group: ClassVar[str]

    def __init__(
        self,
        recipe: R,
        model: M,
        objective: Callable[[], PixelObjective],
        data: TrainingData,
        execution: Execution,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.data, self.execution, self.ranks = recipe, data, execution, ranks
        device, dtype = execution.device, execution.weights
        self.model = model
        self.model.to(device, dtype)
        if recipe.channels_last:
            use_channels_last(self.model)
        self.optimizer = build_optimizer(
            [{"params": list(self.model.parameters()), "lr": recipe.optimizer.learning_rate}],
            recipe.optimizer,
        )
        adversarial = recipe.loss.adversarial
        self.adversary = Adversary(recipe, execution, ranks) if adversarial else None
        average = recipe.average
        self.ema = None if average is None else ExponentialMovingAverage(self.model, average)
        self.loss = Parallel(objective().to(device, dtype), ranks)
        self.scaler = loss_scaler(execution)
        self.order = build_order(data, recipe.batch_size, recipe.seed)
        self.batches = Batches(self._make_batch)
        self.steps = self.begun = 0
        self.rate = 1.0

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees."""
        return self.recipe.batch_size * self.recipe.accumulate

    def _positions(self, step: int) -> list[int]:
        return positions_of(step, self.recipe.batch_size, self.recipe.accumulate, self.ranks)

    def _make_batch(self, step: int) -> Tensor:
        return torch.stack([self._view(position) for position in self._positions(step)])

    def _view(self, position: int) -> Tensor:
        """The image at a position of the data's order, or a square of it."""
        generator = keyed_generator(self.recipe.seed, 0xDA7A, position)
        image = self.data.load(self.order.index(position), generator).image
        side = self.recipe.patch
        if side is None:
            return image
        top, left = (
            int(torch.randint(size - side + 1, (1,), generator=generator))
            for size in image.shape[1:]
        )
        return image[:, top : top + side, left : left + side]

    def _pixels(self, images: Tensor) -> Tensor:
        return to_pixels(images, self.execution.device).to(self.execution.weights)

    def _samples(self, step: int) -> tuple[Tensor, list[int]]:
        """The images ``(B, 3, H, W)`` of a step and the seeds of their posteriors' noise."""
        images = self._pixels(self.batches.get(step))
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seed = self.recipe.seed
        return images, [mix(seed, 0x5A3, position) for position in self._positions(step)]

    def train_step(self, step: int, progress: float) -> Mapping[str, Tensor | float]:
        """Do one step of the network, and one of the discriminator where it takes part."""
        recipe, adversary = self.recipe, self.adversary
        torch.manual_seed(self.ranks.own_seed(mix(recipe.seed, step)))  # dropout
        factor = self.rate * learning_rate_factor(recipe.optimizer, step, progress, self.begun)
        self.model.train()
        images, seeds = self._samples(step)
        each = recipe.batch_size // self.ranks.world
        latents: list[Tensor] = []
        values: dict[str, Tensor | float] = {}
        for number in range(recipe.accumulate):
            part, last = slice(number * each, (number + 1) * each), number == recipe.accumulate - 1
            made = self._backward(images[part], seeds[part], step, last=last)
            latents.append(made.z)
            for name, value in {"loss": made.loss, **made.told}.items():
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
            if adversary is not None and adversary.learns_at(step):
                judged = adversary.backward(images[part], made.fake, self.scaler, last=last)
                for name, value in judged.items():
                    values[name] = values.get(name, 0.0) + value
        values |= apply_gradients(self.optimizer, recipe.optimizer, factor, self.scaler)
        values["learning_rate"] = recipe.optimizer.learning_rate * factor
        if adversary is not None and adversary.learns_at(step):
            apply_gradients(adversary.optimizer, recipe.optimizer, factor, self.scaler)
        self.scaler.update()
        if self.ema is not None and not values.get("skipped_steps"):
            self.ema.update()
        self.steps = step + 1
        return values | self._after_step(step, latents)

    def _backward(self, images: Tensor, seeds: list[int], step: int, *, last: bool) -> Made:
        """Accumulate the network's gradients of a part of a step."""
        opponent: Opponent | None = None
        if self.adversary is not None and self.adversary.speaks_at(step):
            term, scale = self.adversary.generator_term, self.scaler.get_scale()
            opponent = partial(term, last_layer=self.model.last_layer, scale=scale)
        with self.loss.part(last=last):
            made: Made = self.loss(images, seeds, opponent)
            self.scaler.scale(made.loss / self.recipe.accumulate).backward()
        return made._replace(loss=made.loss.detach())

    def _after_step(self, step: int, latents: list[Tensor]) -> dict[str, Tensor | float]:
        """Do what follows a step, of whose parts these are the latents, and return gauges of it."""
        return {}

    @torch.no_grad()
    def faulty_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step whose loss is no number with the weights now."""
        self.model.eval()
        images, seeds = self._samples(step)
        faulty: list[Sample] = []
        for k, position in enumerate(self._positions(step)):
            made: Made = self.loss(images[k : k + 1], seeds[k : k + 1], None)
            if not torch.isfinite(made.loss):
                index = self.order.index(position)
                faulty.append((index, self.data.load(index).name))
        return faulty

    def gauges(self) -> dict[str, float]:
        """Return what is worth a look at intervals; all ranks must ask."""
        return {} if self.ema is None else {"ema_distance": self.ema.distance()}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors = {
            self.group: dict(self.model.state_dict()),
            "optimizer": flatten_optimizer(self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.adversary is not None:
            tensors["discriminator"] = dict(self.adversary.network.state_dict())
            tensors["discriminator_optimizer"] = flatten_optimizer(self.adversary.optimizer)
        position = self.steps * self.images_per_step
        values: dict[str, Any] = {"scaler": self.scaler.state_dict(), "begun": self.begun}
        return tensors, values | stream_state(self.data, position, self.ranks)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If what is trained on is not that of the checkpoint.
        """
        self.steps = checkpoint.step
        load_stream_state(self.data, checkpoint.values)
        tensors = checkpoint.tensors
        self.model.load_state_dict(tensors[self.group])
        self.begun = restore_or_begin(self.optimizer, checkpoint)
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            # which may have been left out with the other moments: then it begins anew
            if moments := tensors.get("discriminator_optimizer"):
                restore_optimizer(self.adversary.optimizer, moments)
        if saved_scaler := checkpoint.values.get("scaler"):
            self.scaler.load_state_dict(saved_scaler)

    @cached_property
    def _previews(self) -> Tensor:
        """Images ``(B, 3, H, W)``, kept: a stream is not to go back to its beginning for them."""
        return torch.stack([self.data.load(k).image for k in spread(self.data, _PREVIEWS)])

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        """Draw originals above what the network makes of them."""
        if not self.ranks.is_first:
            return
        images = self._previews
        with self._averaged():
            self.model.eval()
            made = self._drawn(self._pixels(images))
        pictures = [picture for row in (images, *made) for picture in to_images(row)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(pictures, columns=len(images)).save(path)

    def _drawn(self, pixels: Tensor) -> Sequence[Tensor]:
        """Rows of pictures, each ``(B, 3, H, W)`` in about -1..1 like the pixels they are of."""
        raise NotImplementedError

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Store the averages if the recipe says so at this step."""
        if self.ema is not None:
            save_if_due(self.ema, folder, last=last)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()
