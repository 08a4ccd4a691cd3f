"""The peers' side of `benchmarks.training_step`: their networks in plain loops."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.compvis import first_stage_map
from mezzotint.checkpoints.folder import save_component
from mezzotint.device import widened
from mezzotint.models.autoencoder import AutoencoderKL
from mezzotint.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from mezzotint.models.perceptual import build_perceptual
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.models.unet import UNet
from mezzotint.training.recipe import AutoencoderRecipe, OptimizerConfig

__all__ = ["PlainAutoencoder", "PlainDiffusion", "original_autoencoder", "peer_of"]


def peer_of(network: UNet | AutoencoderKL) -> nn.Module:
    """Return diffusers' network of the same shape and weights, read from the folder of ours."""
    import diffusers

    name = "UNet2DModel" if isinstance(network, UNet) else "AutoencoderKL"
    with tempfile.TemporaryDirectory() as folder:
        save_component(network, Path(folder) / "network")
        return getattr(diffusers, name).from_pretrained(Path(folder) / "network")


def original_autoencoder(ours: AutoencoderKL) -> nn.Module:
    """Return the original network of the same shape and weights."""
    from ldm.modules.diffusionmodules.model import Decoder, Encoder

    config = ours.config
    widths = config.block_out_channels
    options: dict[str, Any] = {
        "ch": widths[0],
        "out_ch": config.out_channels,
        "ch_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": (),
        "in_channels": config.in_channels,
        "resolution": 256,
        "z_channels": config.latent_channels,
        "double_z": True,
    }
    channels = config.latent_channels
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its attention
        parts = {"encoder": Encoder(**options), "decoder": Decoder(**options)}
    theirs = nn.ModuleDict(
        {
            **parts,
            "quant_conv": nn.Conv2d(2 * channels, 2 * channels, 1),
            "post_quant_conv": nn.Conv2d(channels, channels, 1),
        }
    )
    theirs.load_state_dict(first_stage_map(ours).to_compvis(ours.state_dict()))
    return theirs


def _optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Torch's, as it comes, with a recipe's numbers."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


class PlainDiffusion:
    """The loop of diffusers' own example, without an average of the weights.

    Args:
        unet: Diffusers'.
        latents: ``(B, C, h, w)``.
        optimizer: Its numbers.
        half: Whether to compute in bfloat16 by autocast.
    """

    def __init__(
        self, unet: nn.Module, latents: Tensor, optimizer: OptimizerConfig, *, half: bool
    ) -> None:
        import diffusers

        self.unet, self.latents, self.half = unet.train(), latents, half
        self.scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
        self.optimizer = _optimizer(unet, optimizer)

    def step(self) -> None:
        """Train one step."""
        z = self.latents
        noise = torch.randn_like(z)
        t = torch.randint(1000, (z.shape[0],), device=z.device)
        noisy = self.scheduler.add_noise(z, noise, t)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.half):
            loss = F.mse_loss(self.unet(noisy, t).sample.float(), noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainAutoencoder:
    """The adversarial loop of the original code, with one forward pass for both optimizers.

    Args:
        network: The original's, or diffusers'.
        images: ``(B, 3, H, W)`` in -1..1.
        recipe: Says the loss and the optimizers.
        half: Whether to compute in bfloat16 by autocast.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, recipe: AutoencoderRecipe, *, half: bool
    ) -> None:
        adversarial = recipe.loss.adversarial
        assert adversarial is not None
        self.network, self.images, self.half = network.train(), images, half
        self.loss, self.weight = recipe.loss, adversarial.weight
        perceptual = recipe.loss.perceptual_network if recipe.loss.perceptual else None
        self.perceptual = build_perceptual(perceptual).to(images.device) if perceptual else None
        self.discriminator = PatchDiscriminator(adversarial.discriminator).to(images.device)
        self.optimizers = [_optimizer(n, recipe.optimizer) for n in (network, self.discriminator)]

    def autoencode(self, images: Tensor) -> tuple[DiagonalGaussian, Callable[[Tensor], Tensor]]:
        """Return the posterior of images, and what decodes."""
        network: Any = self.network
        if isinstance(network, nn.ModuleDict):
            moments = network["quant_conv"](network["encoder"](images))
            decoder, after = network["decoder"], network["post_quant_conv"]
            return DiagonalGaussian(moments), lambda z: decoder(after(z))
        posterior = network.encode(images).latent_dist
        return DiagonalGaussian(posterior.parameters), lambda z: network.decode(z).sample

    def step(self) -> None:
        """Train the autoencoder one step, and the discriminator one."""
        images, loss = self.images, self.loss
        with self._precision():
            posterior, decode = self.autoencode(images)
            noise = torch.randn_like(posterior.mean)
            fake = widened(decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise))
            reconstruction = loss.l1 * F.l1_loss(fake, images)
            if self.perceptual is not None:
                distance = widened(self.perceptual(images, fake))
                reconstruction = reconstruction + loss.perceptual * distance.mean()
            divergence = posterior.kl().mean() / images[0].numel()
            self.discriminator.requires_grad_(False)
            term = generator_loss(self.discriminator(fake))
            self.discriminator.requires_grad_(True)
        last = self._last_layer()
        weight = self.weight * adaptive_weight(reconstruction, term, last)
        self._apply(0, reconstruction + loss.kl * divergence + weight * term)
        with self._precision():
            logits = self.discriminator(torch.cat([images, fake.detach()]))
        self._apply(1, hinge_discriminator_loss(*logits.chunk(2)))

    def _last_layer(self) -> Tensor:
        network: Any = self.network
        if isinstance(network, nn.ModuleDict):
            return network["decoder"].conv_out.weight
        return network.decoder.conv_out.weight

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.half)

    def _apply(self, which: int, loss: Tensor) -> None:
        loss.backward()
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()
