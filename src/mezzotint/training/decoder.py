"""Training a small decoder beside an autoencoder that stays as it is."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.decoders import probe_colours, save_decoder
from mezzotint.device import Execution, autocast, widened
from mezzotint.errors import TrainingError
from mezzotint.evaluation.grids import image_grid
from mezzotint.generation.sampling import to_images
from mezzotint.latent_diffusion import FirstStage, LatentNormalization, fingerprint
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.models.small_decoder import SmallDecoder
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.adversary import Adversary
from mezzotint.training.autoencoder import Opponent, to_pixels
from mezzotint.training.batches import Batches
from mezzotint.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.gauges import latent_gauges, worse_gauge
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
from mezzotint.training.ranks import ALONE, Ranks, positions_of

__all__ = ["DecoderTask"]

_PREVIEWS = 8


class _Loss(nn.Module):
    """How far the small decoder's pictures are from the images and from the full decoder's."""

    def __init__(
        self,
        decoder: SmallDecoder,
        first_stage: FirstStage,
        normalization: LatentNormalization,
        recipe: DecoderRecipe,
        execution: Execution,
    ) -> None:
        super().__init__()
        self.decoder, self.recipe, self.execution = decoder, recipe, execution
        self.first_stage, self.normalization = first_stage, normalization
        loss = recipe.loss
        self.perceptual = build_perceptual(loss.perceptual_network) if loss.perceptual else None

    def latents(self, images: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Normalised latents: posterior samples, or without seeds means, for KL."""
        encoded = self.first_stage.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            encoded = encoded.mode() if seeds is None else encoded.sample(SampleNoise(seeds))
        return self.normalization.normalize(encoded)

    def forward(
        self, images: Tensor, seeds: Sequence[int], opponent: Opponent | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of images ``(B, 3, H, W)``, the pictures made of them, and gauges."""
        share = self.recipe.loss.of_images
        with torch.no_grad(), autocast(self.execution):
            z = self.latents(images, seeds)
            full = self.first_stage.decode(self.normalization.denormalize(z))
        with autocast(self.execution):
            fake = self.decoder(z)
        fake, full = widened(fake), widened(full)
        loss = fake.new_zeros(())
        if share:
            loss = loss + share * self._distance(fake, images)
        if share < 1:
            loss = loss + (1 - share) * self._distance(fake, full)
        with torch.no_grad():
            told = {"error": F.mse_loss(fake, full), "power": images.square().mean()}
            told["worse_than_nothing"] = worse_gauge(told["error"], told["power"])
            told["psnr"] = -10.0 * torch.log10(told["error"] / 4.0)
            told |= latent_gauges(z)
        if opponent is not None:
            adversarial, weight = opponent(fake, loss)
            loss = loss + adversarial
            told |= {"adversarial": adversarial.detach(), "adaptive_weight": weight.detach()}
        return loss, fake.detach(), told

    def _distance(self, fake: Tensor, wanted: Tensor) -> Tensor:
        config = self.recipe.loss
        total = config.l1 * F.l1_loss(fake, wanted) + config.l2 * F.mse_loss(fake, wanted)
        if self.perceptual is not None:
            with autocast(self.execution):
                distance = self.perceptual(wanted, fake)
            total = total + config.perceptual * widened(distance).mean()
        return total


class DecoderTask:
    """Trains a `SmallDecoder` to make of latents what the full decoder and the images show.

    Args:
        recipe: What to train.
        first_stage: The autoencoder; frozen.
        normalization: The statistics of its latents.
        data: The images.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    def __init__(
        self,
        recipe: DecoderRecipe,
        first_stage: FirstStage,
        normalization: LatentNormalization,
        data: TrainingData,
        execution: Execution,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.data, self.execution, self.ranks = recipe, data, execution, ranks
        device, dtype = execution.device, execution.weights
        tensors = [*first_stage.state_dict().items(), *normalization.state_dict().items()]
        self.inputs = {"first_stage": fingerprint(tensors), "data": data.fingerprint}
        self.colours = probe_colours(first_stage, normalization)
        torch.manual_seed(mix(recipe.seed, 0x1217))
        self.model = SmallDecoder(recipe.shape(first_stage.latent_channels, first_stage.factor))
        self.model.to(device, dtype)
        if recipe.channels_last:
            use_channels_last(self.model)
        if recipe.run.compile:
            self.model.compile()
        self.optimizer = build_optimizer(
            [{"params": list(self.model.parameters()), "lr": recipe.optimizer.learning_rate}],
            recipe.optimizer,
        )
        adversarial = recipe.loss.adversarial
        self.adversary = Adversary(recipe, execution, ranks) if adversarial else None
        average = recipe.average
        self.ema = None if average is None else ExponentialMovingAverage(self.model, average)
        first_stage.eval().requires_grad_(False)
        self.objective = _Loss(self.model, first_stage, normalization, recipe, execution)
        self.objective.to(device, dtype)
        self.loss = Parallel(self.objective, ranks)
        self.scaler = loss_scaler(execution)
        self.order = build_order(data, recipe.batch_size, recipe.seed)
        self.batches = Batches(self._make_batch)
        self.steps = 0
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
        side = self.recipe.side
        top, left = (
            int(torch.randint(size - side + 1, (1,), generator=generator))
            for size in image.shape[1:]
        )
        return image[:, top : top + side, left : left + side]

    def _samples(self, step: int) -> tuple[Tensor, list[int]]:
        """The images ``(B, 3, H, W)`` of a step and the seeds of their posteriors' noise."""
        images = to_pixels(self.batches.get(step), self.execution.device)
        seed = self.recipe.seed
        seeds = [mix(seed, 0x5A3, position) for position in self._positions(step)]
        return images.to(self.execution.weights), seeds

    def train_step(self, step: int, progress: float) -> Mapping[str, Tensor | float]:
        """Do one step of the decoder, and one of the discriminator where it takes part."""
        recipe, adversary = self.recipe, self.adversary
        factor = self.rate * learning_rate_factor(recipe.optimizer, step, progress)
        self.model.train()
        images, seeds = self._samples(step)
        each = recipe.batch_size // self.ranks.world
        values: dict[str, Tensor | float] = {}
        for number in range(recipe.accumulate):
            part, last = slice(number * each, (number + 1) * each), number == recipe.accumulate - 1
            with self.loss.part(last=last):
                loss, fake, told = self.loss(images[part], seeds[part], self._opponent(step))
                self.scaler.scale(loss / recipe.accumulate).backward()
            for name, value in {"loss": loss.detach(), **told}.items():
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
            if adversary is not None and adversary.learns_at(step):
                judged = adversary.backward(images[part], fake, self.scaler, last=last)
                for name, value in judged.items():
                    values[name] = values.get(name, 0.0) + value
        values |= apply_gradients(self.optimizer, recipe.optimizer, factor, self.scaler)
        if adversary is not None and adversary.learns_at(step):
            apply_gradients(adversary.optimizer, recipe.optimizer, factor, self.scaler)
        self.scaler.update()
        if self.ema is not None and not values.get("skipped_steps"):
            self.ema.update()
        self.steps = step + 1
        return {**values, "learning_rate": recipe.optimizer.learning_rate * factor}

    def _opponent(self, step: int) -> Opponent | None:
        if self.adversary is None or not self.adversary.speaks_at(step):
            return None
        last_layer = self.model.layers[-1].weight
        assert isinstance(last_layer, Tensor)
        scale = self.scaler.get_scale()
        return partial(self.adversary.generator_term, last_layer=last_layer, scale=scale)

    @torch.no_grad()
    def faulty_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step whose loss is no number with the weights now."""
        self.model.eval()
        images, seeds = self._samples(step)
        faulty: list[Sample] = []
        for k, position in enumerate(self._positions(step)):
            loss = self.loss(images[k : k + 1], seeds[k : k + 1], None)[0]
            if not torch.isfinite(loss):
                index = self.order.index(position)
                faulty.append((index, self.data.load(index).name))
        return faulty

    def gauges(self) -> dict[str, float]:
        """Return what is worth a look at intervals; all ranks must ask."""
        return {} if self.ema is None else {"ema_distance": self.ema.distance()}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors = {
            "decoder": dict(self.model.state_dict()),
            "optimizer": flatten_optimizer(self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.adversary is not None:
            tensors["discriminator"] = dict(self.adversary.network.state_dict())
            tensors["discriminator_optimizer"] = flatten_optimizer(self.adversary.optimizer)
        position = self.steps * self.images_per_step
        values = {"inputs": self.inputs, "scaler": self.scaler.state_dict()}
        return tensors, values | stream_state(self.data, position, self.ranks)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the autoencoder or the data are not those of the checkpoint.
        """
        for name, words in (("first_stage", "the autoencoder"), ("data", "the images")):
            if checkpoint.values["inputs"].get(name) != self.inputs[name]:
                raise TrainingError(
                    f"{checkpoint.path}: {words} changed since this checkpoint was saved; put it"
                    " back as it was, or start anew with another --output"
                )
        self.steps = checkpoint.step
        load_stream_state(self.data, checkpoint.values)
        tensors = checkpoint.tensors
        self.model.load_state_dict(tensors["decoder"])
        restore_optimizer(self.optimizer, tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            restore_optimizer(self.adversary.optimizer, tensors["discriminator_optimizer"])
        if saved_scaler := checkpoint.values.get("scaler"):
            self.scaler.load_state_dict(saved_scaler)

    @cached_property
    def _previews(self) -> Tensor:
        """Images ``(B, 3, H, W)``, kept: a stream is not to go back to its beginning for them."""
        return torch.stack([self.data.load(k).image for k in spread(self.data, _PREVIEWS)])

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        """Draw originals above the full decoder's pictures above those of the small one."""
        if not self.ranks.is_first:
            return
        images, objective = self._previews, self.objective
        with self._averaged():
            self.model.eval()
            pixels = to_pixels(images, self.execution.device).to(self.execution.weights)
            z = objective.latents(pixels, None)
            full = objective.first_stage.decode(objective.normalization.denormalize(z))
            small = self.model(z)
        rows = [*to_images(images), *to_images(full), *to_images(small)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(rows, columns=len(images)).save(path)

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Nothing: the recipe refuses averages that are stored."""

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def export(self, folder: Path) -> None:
        """Write the small decoder with the averaged weights."""
        self.batches.close()
        with self._averaged():
            if self.ranks.is_first:
                save_decoder(self.model, self.colours, folder / "decoder")
