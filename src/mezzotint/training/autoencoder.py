"""Training the first stage: reconstruction, perceptual, regulariser and adversarial terms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.checkpoints.model import save_first_stage
from mezzotint.data.base import ImageData
from mezzotint.device import Execution, autocast
from mezzotint.evaluation.grids import image_grid
from mezzotint.latent_diffusion import LatentNormalization, encode_moments
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.batches import Batches, DataOrder
from mezzotint.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.optimizer import (
    apply_gradients,
    build_optimizer,
    learning_rate_factor,
    use_channels_last,
)
from mezzotint.training.recipe import AutoencoderRecipe
from mezzotint.training.snapshots import save_if_due

__all__ = ["AutoencoderTask", "to_pixels"]

_PREVIEWS = 8
_VECTORS_PER_CODE = 4
_MEASURED = 4096  # images over which the latent scale is measured; a scalar needs no more


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images ``(B, 3, H, W)`` into float32 in [-1, 1] on a device."""
    return images.to(device).float() / 127.5 - 1.0


class AutoencoderTask:
    """Trains E, D and the discriminator D_psi (paper, section 3.1 and eq. 25).

    Args:
        recipe: What to train.
        data: The images.
        execution: Device and precision.
    """

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        data: ImageData,
        execution: Execution,
    ) -> None:
        self.recipe, self.data, self.execution = recipe, data, execution
        device = execution.device
        torch.manual_seed(mix(recipe.seed, 0x1217))
        config = recipe.model
        model = AutoencoderKL(config) if config.kind == "kl" else VQModel(config)
        self.model: AutoencoderKL | VQModel = model.to(device)
        if recipe.channels_last:
            use_channels_last(self.model)
        loss = recipe.loss
        self.perceptual = build_perceptual(loss.perceptual_network) if loss.perceptual else None
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.optimizer = build_optimizer(
            [{"params": list(self.model.parameters()), "lr": recipe.optimizer.learning_rate}],
            recipe.optimizer,
        )
        self.adversary = _Adversary(recipe, device) if loss.adversarial else None
        average = recipe.average
        self.ema = None if average is None else ExponentialMovingAverage(self.model, average)
        self.order = DataOrder(len(data), recipe.seed)
        self.batches = Batches(self._make_batch)

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees."""
        return self.recipe.batch_size * self.recipe.accumulate

    def _make_batch(self, step: int) -> Tensor:
        first = step * self.images_per_step
        positions = range(first, first + self.images_per_step)
        return torch.stack([self._view(position) for position in positions])

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
        torch.manual_seed(mix(recipe.seed, step))  # dropout
        factor = learning_rate_factor(recipe.optimizer, step, progress)
        self.model.train()
        images = to_pixels(self.batches.get(step), self.execution.device)
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        parts = images.chunk(recipe.accumulate)
        values: dict[str, Tensor | float] = {}
        latents: list[Tensor] = []
        for number, part in enumerate(parts):
            fake, z, part_values = self._backward(part, step, number)
            latents.append(z)
            for name, value in part_values.items():
                values[name] = values.get(name, 0.0) + value.detach() / len(parts)
            if self.adversary is not None and self.adversary.learns_at(step):
                loss = self.adversary.backward(part, fake, self.execution, len(parts))
                values["discriminator_loss"] = values.get("discriminator_loss", 0.0) + loss
        values["gradient_norm"] = apply_gradients(self.optimizer, recipe.optimizer, factor)
        values["learning_rate"] = recipe.optimizer.learning_rate * factor
        if self.adversary is not None and self.adversary.learns_at(step):
            apply_gradients(self.adversary.optimizer, recipe.optimizer, factor)
        if self.ema is not None:
            self.ema.update()
        if isinstance(self.model, VQModel):
            values |= self._end_epoch(self.model, step, torch.cat(latents))
        return values

    def _backward(
        self, images: Tensor, step: int, number: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Accumulate the autoencoder's gradients; returns reconstruction, latent and terms."""
        config, model = self.recipe.loss, self.model
        with autocast(self.execution):
            if isinstance(model, VQModel):
                z = model.encode(images)
                quantized = model.quantize(z)
                regularizer = config.codebook * quantized.loss
                fake = model.decode_quantized(quantized.z_q)
            else:
                posterior = model.encode(images)
                z = posterior.sample(SampleNoise(self._noise_seeds(step, number, len(images))))
                regularizer = config.kl * posterior.kl().mean() / images[0].numel()
                fake = model.decode(z)
        fake = fake.float()
        terms = _reconstruction_terms(images, fake, config.l1, config.l2, config.pooled_l1)
        if self.perceptual is not None:
            with autocast(self.execution):
                distance = self.perceptual(images, fake)
            terms["perceptual"] = config.perceptual * distance.float().mean()
        reconstruction = torch.stack(list(terms.values())).sum()
        loss = reconstruction + regularizer
        values = {**terms, "regularizer": regularizer}
        with torch.no_grad():
            values["psnr"] = -10.0 * torch.log10(F.mse_loss(fake, images) / 4.0)
        if self.adversary is not None and self.adversary.speaks_at(step):
            adversarial, weight = self.adversary.generator_term(
                fake, reconstruction, self.model.last_layer, self.execution
            )
            loss = loss + adversarial
            values |= {"adversarial": adversarial, "adaptive_weight": weight}
        (loss / self.recipe.accumulate).backward()
        return fake.detach(), z.detach(), {"loss": loss, **values}

    def _noise_seeds(self, step: int, number: int, count: int) -> list[int]:
        first = step * self.images_per_step + number * count
        return [mix(self.recipe.seed, 0x5A3, first + k) for k in range(count)]

    def _end_epoch(self, model: VQModel, step: int, z: Tensor) -> dict[str, Tensor | float]:
        """At the end of an epoch: report code usage, and re-seed the codes that nobody chose.

        Where an epoch has hardly more vectors than there are codes, a code that nobody chose says
        nothing: the count then goes on over several epochs.
        """
        seen = (step + 1) * self.images_per_step
        quantizer = model.quantize
        if seen // len(self.data) == (seen - self.images_per_step) // len(self.data):
            return {}
        if int(quantizer.usage.sum()) < _VECTORS_PER_CODE * quantizer.usage.numel():
            return {}
        dead = quantizer.usage == 0
        used = 1.0 - dead.float().mean()
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
            tensors["code_usage"] = {"usage": self.model.quantize.usage}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.adversary is not None:
            tensors["discriminator"] = dict(self.adversary.network.state_dict())
            tensors["discriminator_optimizer"] = flatten_optimizer(self.adversary.optimizer)
        return tensors, {}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave."""
        tensors = checkpoint.tensors
        self.model.load_state_dict(tensors["autoencoder"])
        restore_optimizer(self.optimizer, tensors["optimizer"])
        if isinstance(self.model, VQModel):
            self.model.quantize.usage.copy_(tensors["code_usage"]["usage"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            restore_optimizer(self.adversary.optimizer, tensors["discriminator_optimizer"])

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        """Draw originals above their reconstructions."""
        count = min(_PREVIEWS, len(self.data))
        # spread over the data: a folder's first images are all of one class
        places = [k * len(self.data) // count for k in range(count)]
        images = torch.stack([self.data.load(k).image for k in places])
        with self._averaged():
            self.model.eval()
            pixels = to_pixels(images, self.execution.device)
            encoded = self.model.encode(pixels)
            z = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
            fake = self.model.decode(z)
        restored = ((fake.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        rows = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in (*images, *restored)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(rows, columns=count).save(path)

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Store the averages if the recipe says so at this step."""
        if self.ema is not None:
            save_if_due(self.ema, folder, last=last)

    def _averaged(self) -> Any:
        return torch.no_grad() if self.ema is None else self.ema.applied()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Measure the latents over the data and write ``vae/``."""
        self.batches.close()
        with self._averaged():
            self.model.eval()
            moments: list[Tensor] = []
            # all images, or as many drawn from the whole: a folder's first are all of one class
            order = torch.randperm(len(self.data), generator=keyed_generator(self.recipe.seed))
            for indices in order[:_MEASURED].split(32):
                images = torch.stack([self.data.load(k).image for k in indices.tolist()])
                pixels = to_pixels(images, self.execution.device)
                moments.append(encode_moments(self.model, pixels).float().cpu())
            measured = LatentNormalization.measure(
                torch.cat(moments),
                self.model.latent_channels,
                per_channel=self.recipe.normalization == "channel",
            )
            save_first_stage(self.model, measured, folder / "vae")


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


class _Adversary:
    """The discriminator, its optimizer, and when it learns and speaks."""

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device) -> None:
        assert recipe.loss.adversarial is not None
        self.config = recipe.loss.adversarial
        self.network = PatchDiscriminator(self.config.discriminator).to(device)
        rate = self.config.learning_rate or recipe.optimizer.learning_rate
        self.optimizer = build_optimizer(
            [{"params": list(self.network.parameters()), "lr": rate}], recipe.optimizer
        )

    def learns_at(self, step: int) -> bool:
        return step >= self.config.start_step - self.config.pretrain_steps

    def speaks_at(self, step: int) -> bool:
        return step >= self.config.start_step

    def generator_term(
        self, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, execution: Execution
    ) -> tuple[Tensor, Tensor]:
        """The adversarial term of the autoencoder and its adaptive weight.

        The discriminator's parameters take no gradient here: they are the adversary's to move.
        """
        self.network.requires_grad_(False)
        with autocast(execution):
            logits = self.network(fake)
        self.network.requires_grad_(True)
        term = generator_loss(logits)
        weight = adaptive_weight(reconstruction, term, last_layer)
        return self.config.weight * weight * term, weight

    def backward(self, real: Tensor, fake: Tensor, execution: Execution, parts: int) -> Tensor:
        """Accumulate the discriminator's gradients on real and reconstructed images."""
        with autocast(execution):
            logits = self.network(torch.cat([real, fake]))
        loss = hinge_discriminator_loss(*logits.chunk(2)) / parts
        loss.backward()
        return loss.detach()
