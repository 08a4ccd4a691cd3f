"""Training the first stage: reconstruction, perceptual, regulariser and adversarial terms."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.first_stages import save_first_stage
from mezzotint.device import Execution, autocast, widened
from mezzotint.latent_diffusion import LatentNormalization, encode_moments
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.checkpoint import Checkpoint, refuse_changed
from mezzotint.training.gauges import picture_gauges, usage_gauges
from mezzotint.training.orders import TrainingData, drawn, epoch_length
from mezzotint.training.pixel_task import Made, Opponent, PixelObjective, PixelTask
from mezzotint.training.ranks import ALONE, Ranks
from mezzotint.training.recipe import AutoencoderRecipe

__all__ = ["AutoencoderTask"]

_VECTORS_PER_CODE = 4
_MEASURED = 4096  # images over which the latent scale is measured; a scalar needs no more


class _Loss(PixelObjective):
    """What the autoencoder minimises (paper, eq. 25)."""

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

    def forward(self, images: Tensor, seeds: Sequence[int], opponent: Opponent | None) -> Made:
        """Return the loss of images, and their reconstruction; see `PixelObjective.forward`."""
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
        values = {**terms, "regularizer": regularizer, **picture_gauges(fake, images, images, z)}
        if opponent is not None:
            adversarial, weight = opponent(fake, reconstruction)
            loss = loss + adversarial
            values |= {"adversarial": adversarial, "adaptive_weight": weight}
        told = {name: value.detach() for name, value in values.items()}
        return Made(loss, fake.detach(), z.detach(), told)


class AutoencoderTask(PixelTask[AutoencoderRecipe, AutoencoderKL | VQModel]):
    """Trains E, D and the discriminator D_psi (paper, section 3.1 and eq. 25).

    Args:
        recipe: What to train.
        data: The images.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    group = "autoencoder"

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        data: TrainingData,
        execution: Execution,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(mix(recipe.seed, 0x1217))
        config, loss = recipe.model, recipe.loss
        model = AutoencoderKL(config) if config.kind == "kl" else VQModel(config)
        if recipe.run.compile:
            for part in model.children():
                part.compile()
        perceptual = build_perceptual(loss.perceptual_network) if loss.perceptual else None
        objective = partial(_Loss, model, perceptual, recipe, execution)
        super().__init__(recipe, model, objective, data, execution, ranks)

    def gauges(self) -> dict[str, float]:
        """Return what is worth a look at intervals; all ranks must ask."""
        told: dict[str, float] = {}
        if isinstance(self.model, VQModel):
            told |= usage_gauges(self.ranks.sum(self.model.quantize.usage))
        return told | super().gauges()

    def _after_step(self, step: int, latents: list[Tensor]) -> dict[str, Tensor | float]:
        return self._end_epoch(self.model, step, latents) if isinstance(self.model, VQModel) else {}

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
        tensors, values = super().state()
        if isinstance(self.model, VQModel):
            tensors["code_usage"] = {"usage": self.ranks.sum(self.model.quantize.usage)}
        return tensors, values | {"data": self.data.fingerprint}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the data are not those of the checkpoint.
        """
        now = {"data": self.data.fingerprint}
        refuse_changed(checkpoint, now | checkpoint.values, now, {"data": "the images"})
        super().load_state(checkpoint)
        if isinstance(self.model, VQModel):
            # the count of all ranks goes on in the first
            usage = self.model.quantize.usage.copy_(checkpoint.tensors["code_usage"]["usage"])
            usage.mul_(int(self.ranks.is_first))

    def _drawn(self, pixels: Tensor) -> Sequence[Tensor]:
        encoded = self.model.encode(pixels)
        z = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
        return [self.model.decode(z)]

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
        ranks = self.ranks
        left_out = self.order.excluded
        chosen = [k for k in drawn(self.data, _MEASURED, self.recipe.seed) if k not in left_out]
        batches = [chosen[start : start + 32] for start in range(0, len(chosen), 32)]
        mine: list[Tensor] = []
        for indices in batches[ranks.rank :: ranks.world]:
            images = torch.stack([self.data.load(k).image for k in indices])
            mine.append(widened(encode_moments(self.model, self._pixels(images))).cpu())
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
