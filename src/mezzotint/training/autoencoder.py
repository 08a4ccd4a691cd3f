"""Training the first stage: reconstruction, perceptual, regulariser and adversarial terms."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.model import save_first_stage
from mezzotint.device import Execution, autocast, widened
from mezzotint.errors import TrainingError
from mezzotint.evaluation.grids import image_grid
from mezzotint.latent_diffusion import LatentNormalization, encode_moments
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.adversary import Adversary
from mezzotint.training.batches import Batches
from mezzotint.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    restore_optimizer,
    restore_or_begin,
)
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.gauges import latent_gauges, usage_gauges, worse_gauge
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
    drawn,
    epoch_length,
    load_stream_state,
    spread,
    stream_state,
)
from mezzotint.training.parallel import Parallel
from mezzotint.training.ranks import ALONE, Ranks, positions_of
from mezzotint.training.recipe import AutoencoderRecipe
from mezzotint.training.snapshots import save_if_due

__all__ = ["AutoencoderTask", "Opponent", "to_pixels"]

_PREVIEWS = 8
_VECTORS_PER_CODE = 4
_MEASURED = 4096  # images over which the latent scale is measured; a scalar needs no more


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images ``(B, 3, H, W)`` into float32 in [-1, 1] on a device."""
    return images.to(device).float() / 127.5 - 1.0


@dataclass(frozen=True, eq=False)
class _Reconstructed:
    """What the autoencoder made of a part of a step."""

    loss: Tensor
    fake: Tensor  # (B, 3, H, W), detached
    z: Tensor  # (B, C, h, w), detached
    values: dict[str, Tensor]


# of a reconstruction and its loss: the adversarial term and its adaptive weight
Opponent = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Loss(nn.Module):
    """What the autoencoder minimises (paper, eq. 25): torch's engines wrap modules."""

    def __init__(
        self,
        model: AutoencoderKL | VQModel,
        perceptual: nn.Module | None,
        recipe: AutoencoderRecipe,
        execution: Execution,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.execution = model, recipe, execution
        self.perceptual = perceptual

    def forward(
        self, images: Tensor, seeds: Sequence[int], opponent: Opponent | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of images, their reconstruction, their latents and the loss's terms.

        Args:
            images: ``(B, 3, H, W)``.
            seeds: Of the posterior's noise, one for each.
            opponent: The discriminator, from when on it takes part.
        """
        config, model = self.recipe.loss, self.model
        with autocast(self.execution):
            if isinstance(model, VQModel):
                z = model.encode(images)
                quantized = model.quantize(z)
                regularizer = config.codebook * quantized.loss
                fake = model.decode_quantized(quantized.z_q)
            else:
                posterior = model.encode(images)
                z = posterior.sample(SampleNoise(seeds))
                regularizer = config.kl * posterior.kl().mean() / images[0].numel()
                fake = model.decode(z)
        fake = widened(fake)
        terms = _reconstruction_terms(images, fake, config.l1, config.l2, config.pooled_l1)
        if self.perceptual is not None:
            with autocast(self.execution):
                distance = self.perceptual(images, fake)
            terms["perceptual"] = config.perceptual * widened(distance).mean()
        reconstruction = torch.stack(list(terms.values())).sum()
        loss = reconstruction + regularizer
        values = {**terms, "regularizer": regularizer}
        with torch.no_grad():
            values["error"], values["power"] = F.mse_loss(fake, images), images.square().mean()
            values["worse_than_nothing"] = worse_gauge(values["error"], values["power"])
            values["psnr"] = -10.0 * torch.log10(values["error"] / 4.0)
            values |= latent_gauges(z)
        if opponent is not None:
            adversarial, weight = opponent(fake, reconstruction)
            loss = loss + adversarial
            values |= {"adversarial": adversarial, "adaptive_weight": weight}
        told = {name: value.detach() for name, value in values.items()}
        return loss, fake.detach(), z.detach(), told


class AutoencoderTask:
    """Trains E, D and the discriminator D_psi (paper, section 3.1 and eq. 25).

    Args:
        recipe: What to train.
        data: The images.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        data: TrainingData,
        execution: Execution,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.data, self.execution, self.ranks = recipe, data, execution, ranks
        device, dtype = execution.device, execution.weights
        torch.manual_seed(mix(recipe.seed, 0x1217))
        config = recipe.model
        model = AutoencoderKL(config) if config.kind == "kl" else VQModel(config)
        self.model: AutoencoderKL | VQModel = model.to(device, dtype)
        if recipe.channels_last:
            use_channels_last(self.model)
        loss = recipe.loss
        perceptual = build_perceptual(loss.perceptual_network) if loss.perceptual else None
        if perceptual is not None:
            perceptual.to(device, dtype)
        if recipe.run.compile:
            for part in self.model.children():
                part.compile()
        self.optimizer = build_optimizer(
            [{"params": list(self.model.parameters()), "lr": recipe.optimizer.learning_rate}],
            recipe.optimizer,
        )
        self.adversary = Adversary(recipe, execution, ranks) if loss.adversarial else None
        average = recipe.average
        self.ema = None if average is None else ExponentialMovingAverage(self.model, average)
        self.loss = Parallel(_Loss(self.model, perceptual, recipe, execution), ranks)
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

    def train_step(self, step: int, progress: float) -> Mapping[str, Tensor | float]:
        """Do one step of the autoencoder, and one of the discriminator where it takes part."""
        recipe = self.recipe
        torch.manual_seed(self.ranks.own_seed(mix(recipe.seed, step)))  # dropout
        factor = self.rate * learning_rate_factor(recipe.optimizer, step, progress, self.begun)
        self.model.train()
        images, seeds = self._samples(step)
        self.steps = step + 1
        each = recipe.batch_size // self.ranks.world
        adversary, latents = self.adversary, list[Tensor]()
        values: dict[str, Tensor | float] = {}
        for number in range(recipe.accumulate):
            part, last = slice(number * each, (number + 1) * each), number == recipe.accumulate - 1
            made = self._backward(images[part], seeds[part], step, last=last)
            latents.append(made.z)
            for name, value in {"loss": made.loss, **made.values}.items():
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
            if adversary is not None and adversary.learns_at(step):
                told = adversary.backward(images[part], made.fake, self.scaler, last=last)
                for name, value in told.items():
                    values[name] = values.get(name, 0.0) + value
        optimizer = recipe.optimizer
        values |= apply_gradients(self.optimizer, optimizer, factor, self.scaler)
        values["learning_rate"] = optimizer.learning_rate * factor
        if adversary is not None and adversary.learns_at(step):
            apply_gradients(adversary.optimizer, optimizer, factor, self.scaler)
        self.scaler.update()
        if self.ema is not None and not values.get("skipped_steps"):
            self.ema.update()
        if isinstance(self.model, VQModel):
            values |= self._end_epoch(self.model, step, latents)
        return values

    def _samples(self, step: int) -> tuple[Tensor, list[int]]:
        """The images ``(B, 3, H, W)`` of a step and the seeds of their posteriors' noise."""
        images = to_pixels(self.batches.get(step), self.execution.device)
        images = images.to(self.execution.weights)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seed = self.recipe.seed
        return images, [mix(seed, 0x5A3, position) for position in self._positions(step)]

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
        told: dict[str, float] = {}
        if isinstance(self.model, VQModel):
            told |= usage_gauges(self.ranks.sum(self.model.quantize.usage))
        if self.ema is not None:
            told["ema_distance"] = self.ema.distance()
        return told

    def _backward(
        self, images: Tensor, seeds: list[int], step: int, *, last: bool
    ) -> _Reconstructed:
        """Accumulate the autoencoder's gradients of a part of a step."""
        opponent: Opponent | None = None
        if self.adversary is not None and self.adversary.speaks_at(step):
            last_layer = self.model.last_layer
            term, scale = self.adversary.generator_term, self.scaler.get_scale()
            opponent = partial(term, last_layer=last_layer, scale=scale)
        with self.loss.part(last=last):
            loss, fake, z, values = self.loss(images, seeds, opponent)
            self.scaler.scale(loss / self.recipe.accumulate).backward()
        return _Reconstructed(loss.detach(), fake, z, values)

    def _end_epoch(
        self, model: VQModel, step: int, latents: list[Tensor]
    ) -> dict[str, Tensor | float]:
        """At the end of an epoch: report code usage, and re-seed the codes that nobody chose.

        Where an epoch has hardly more vectors than there are codes, a code that nobody chose says
        nothing: the count then goes on over several epochs.
        """
        seen = (step + 1) * self.images_per_step
        quantizer, ranks = model.quantize, self.ranks
        epoch = epoch_length(self.data)
        if seen // epoch == (seen - self.images_per_step) // epoch:
            return {}
        usage = ranks.sum(quantizer.usage)
        if int(usage.sum()) < _VECTORS_PER_CODE * usage.numel():
            return {}
        dead = usage == 0
        used = 1.0 - dead.float().mean()
        # part by part and rank by rank: the order in which one process alone would have them
        z = torch.cat([each for part in latents for each in ranks.gather(part)])
        quantizer.usage.copy_(usage)
        quantizer.reseed_dead(z, keyed_generator(self.recipe.seed, 0xDEAD, step))
        quantizer.reset_usage()
        # what was averaged and estimated for the old codes says nothing of the new ones
        codes = quantizer.embedding.weight
        for key in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[codes][key][dead] = 0.0
        if self.ema is not None:
            self.ema.overwrite("quantize.embedding.weight", dead)
        return {"code_usage": used}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors = {
            "autoencoder": dict(self.model.state_dict()),
            "optimizer": flatten_optimizer(self.optimizer),
        }
        if isinstance(self.model, VQModel):
            tensors["code_usage"] = {"usage": self.ranks.sum(self.model.quantize.usage)}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.adversary is not None:
            tensors["discriminator"] = dict(self.adversary.network.state_dict())
            tensors["discriminator_optimizer"] = flatten_optimizer(self.adversary.optimizer)
        position = self.steps * self.images_per_step
        values: dict[str, Any] = {
            "data": self.data.fingerprint,
            "scaler": self.scaler.state_dict(),
            "begun": self.begun,
        }
        return tensors, values | stream_state(self.data, position, self.ranks)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the data are not those of the checkpoint.
        """
        if checkpoint.values.get("data", self.data.fingerprint) != self.data.fingerprint:
            raise TrainingError(
                f"{checkpoint.path}: the images changed since this checkpoint was saved; put them"
                " back as they were, or start anew with another --output"
            )
        self.steps = checkpoint.step
        load_stream_state(self.data, checkpoint.values)
        tensors = checkpoint.tensors
        self.model.load_state_dict(tensors["autoencoder"])
        self.begun = restore_or_begin(self.optimizer, checkpoint)
        if isinstance(self.model, VQModel):
            # the count of all ranks goes on in the first
            usage = self.model.quantize.usage.copy_(tensors["code_usage"]["usage"])
            usage.mul_(int(self.ranks.is_first))
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
        """Draw originals above their reconstructions."""
        if not self.ranks.is_first:
            return
        images = self._previews
        with self._averaged():
            self.model.eval()
            pixels = to_pixels(images, self.execution.device).to(self.execution.weights)
            encoded = self.model.encode(pixels)
            z = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
            fake = self.model.decode(z)
        restored = ((fake.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        rows = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in (*images, *restored)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(rows, columns=len(images)).save(path)

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Store the averages if the recipe says so at this step."""
        if self.ema is not None:
            save_if_due(self.ema, folder, last=last)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Measure the latents over the data and write ``vae/``."""
        self.batches.close()
        with self._averaged():
            self.model.eval()
            measured = LatentNormalization.measure(
                self._moments(),
                self.model.latent_channels,
                per_channel=self.recipe.normalization == "channel",
            )
            if self.ranks.is_first:
                save_first_stage(self.model, measured, folder / "vae", torch.float32)

    def _moments(self) -> Tensor:
        """Moments of all images, or of as many drawn from the whole: the same in every rank."""
        ranks, execution = self.ranks, self.execution
        left_out = self.order.excluded
        chosen = [k for k in drawn(self.data, _MEASURED, self.recipe.seed) if k not in left_out]
        batches = [chosen[start : start + 32] for start in range(0, len(chosen), 32)]
        mine: list[Tensor] = []
        for indices in batches[ranks.rank :: ranks.world]:
            images = torch.stack([self.data.load(k).image for k in indices])
            pixels = to_pixels(images, execution.device).to(execution.weights)
            mine.append(widened(encode_moments(self.model, pixels)).cpu())
        everyone = ranks.gather_values(mine)
        return torch.cat([everyone[k % ranks.world][k // ranks.world] for k in range(len(batches))])


def _reconstruction_terms(
    images: Tensor, fake: Tensor, l1: float, l2: float, pooled_l1: float
) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    if l1:
        terms["l1"] = l1 * F.l1_loss(fake, images)
    if l2:
        terms["l2"] = l2 * F.mse_loss(fake, images)
    if pooled_l1:
        pooled = F.avg_pool2d(fake, 4), F.avg_pool2d(images, 4)
        terms["pooled_l1"] = pooled_l1 * F.l1_loss(*pooled)
    return terms
