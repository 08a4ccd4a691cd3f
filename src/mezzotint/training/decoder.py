"""Training a small decoder beside an autoencoder that stays as it is."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.decoders import probe_colours, save_decoder
from mezzotint.device import Execution, autocast, widened
from mezzotint.latent_diffusion import FirstStage, LatentNormalization, fingerprint
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.models.small_decoder import SmallDecoder
from mezzotint.rng import SampleNoise, mix
from mezzotint.training.checkpoint import Checkpoint, refuse_changed
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.gauges import picture_gauges
from mezzotint.training.orders import TrainingData
from mezzotint.training.pixel_task import Made, Opponent, PixelObjective, PixelTask
from mezzotint.training.ranks import ALONE, Ranks

__all__ = ["DecoderTask"]


class _Teacher(nn.Module):
    """The autoencoder: it gives the latents, and the pictures that its own decoder makes of them.

    Args:
        first_stage: Becomes frozen.
        normalization: The statistics of its latents.
    """

    def __init__(self, first_stage: FirstStage, normalization: LatentNormalization) -> None:
        super().__init__()
        self.first_stage = first_stage.eval().requires_grad_(False)
        self.normalization = normalization

    def latents(self, images: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Normalised latents: posterior samples, or without seeds means, for KL."""
        encoded = self.first_stage.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            encoded = encoded.mode() if seeds is None else encoded.sample(SampleNoise(seeds))
        return self.normalization.normalize(encoded)

    def forward(self, z: Tensor) -> Tensor:
        """Decode normalised latents ``(B, C, h, w)``."""
        return self.first_stage.decode(self.normalization.denormalize(z))


class _Loss(PixelObjective):
    """How far the small decoder's pictures are from the images and from the full decoder's."""

    def __init__(
        self, decoder: SmallDecoder, teacher: _Teacher, recipe: DecoderRecipe, execution: Execution
    ) -> None:
        super().__init__()
        self.decoder, self.recipe, self.execution = decoder, recipe, execution
        self.teacher = teacher
        loss = recipe.loss
        self.perceptual = build_perceptual(loss.perceptual_network) if loss.perceptual else None

    def forward(self, images: Tensor, seeds: Sequence[int], opponent: Opponent | None) -> Made:
        """Return the loss, and the pictures made of images; see `PixelObjective.forward`."""
        share = self.recipe.loss.of_images
        with torch.no_grad(), autocast(self.execution):
            z = self.teacher.latents(images, seeds)
            full = self.teacher(z)
        with autocast(self.execution):
            fake = self.decoder(z)
        fake, full = widened(fake), widened(full)
        loss = fake.new_zeros(())
        if share:
            loss = loss + share * self._distance(fake, images)
        if share < 1:
            loss = loss + (1 - share) * self._distance(fake, full)
        told = picture_gauges(fake, full, images, z)
        if opponent is not None:
            adversarial, weight = opponent(fake, loss)
            loss = loss + adversarial
            told |= {"adversarial": adversarial.detach(), "adaptive_weight": weight.detach()}
        return Made(loss, fake.detach(), z, told)

    def _distance(self, fake: Tensor, wanted: Tensor) -> Tensor:
        config = self.recipe.loss
        total = config.l1 * F.l1_loss(fake, wanted) + config.l2 * F.mse_loss(fake, wanted)
        if self.perceptual is not None:
            with autocast(self.execution):
                distance = self.perceptual(wanted, fake)
            total = total + config.perceptual * widened(distance).mean()
        return total


class DecoderTask(PixelTask[DecoderRecipe, SmallDecoder]):
    """Trains a `SmallDecoder` to make of latents what the full decoder and the images show.

    Args:
        recipe: What to train.
        first_stage: The autoencoder; frozen.
        normalization: The statistics of its latents.
        data: The images.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    group = "decoder"

    def __init__(
        self,
        recipe: DecoderRecipe,
        first_stage: FirstStage,
        normalization: LatentNormalization,
        data: TrainingData,
        execution: Execution,
        ranks: Ranks = ALONE,
    ) -> None:
        tensors = [*first_stage.state_dict().items(), *normalization.state_dict().items()]
        self.inputs = {"first_stage": fingerprint(tensors), "data": data.fingerprint}
        self.colours = probe_colours(first_stage, normalization)
        torch.manual_seed(mix(recipe.seed, 0x1217))
        model = SmallDecoder(recipe.shape(first_stage.latent_channels, first_stage.factor))
        if recipe.run.compile:
            model.compile()
        self.teacher = _Teacher(first_stage, normalization)
        objective = partial(_Loss, model, self.teacher, recipe, execution)
        super().__init__(recipe, model, objective, data, execution, ranks)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors, values = super().state()
        return tensors, values | {"inputs": self.inputs}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the autoencoder or the data are not those of the checkpoint.
        """
        words = {"first_stage": "the autoencoder", "data": "the images"}
        refuse_changed(checkpoint, checkpoint.values["inputs"], self.inputs, words)
        super().load_state(checkpoint)

    def _drawn(self, pixels: Tensor) -> Sequence[Tensor]:
        z = self.teacher.latents(pixels, None)
        return [self.teacher(z), self.model(z)]

    def export(self, folder: Path) -> None:
        """Write the small decoder with the averaged weights."""
        self.batches.close()
        with self._averaged():
            if self.ranks.is_first:
                save_decoder(self.model, self.colours, folder / "decoder")
