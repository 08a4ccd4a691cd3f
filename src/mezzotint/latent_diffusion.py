"""A latent diffusion model: first stage, UNet, conditioner and schedule, composed; no loop."""

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mezzotint.conditioning.base import Conditioner, Conditioning
from mezzotint.diffusion.denoiser import Denoiser
from mezzotint.diffusion.flow import FlowScheduleConfig, build_schedule
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import ConfigError, RequestError, short
from mezzotint.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.models.sampling_memory import SamplingMemory
from mezzotint.models.unet import UNet
from mezzotint.rng import SampleNoise

__all__ = ["LARGEST_SCALE", "LEAST_SCALE", "FirstStage", "LatentDiffusion", "LatentNormalization"]
__all__ += ["encode_moments", "fingerprint", "run_unet"]

FirstStage = AutoencoderKL | VQModel | IdentityFirstStage
LEAST_SCALE, LARGEST_SCALE = 1e-9, 1e9  # latents have deviations of about 0.1 to 100


class LatentNormalization(nn.Module):
    """Brings latents to unit variance: ``(z - mean) / std``.

    The paper rescales by one number, 1 / std over the data (appendix G, eq. for sigma-hat): then
    ``mean`` is 0 and ``std`` holds one value. Per channel, both have C values.

    Args:
        mean: Shape ``(1,)`` or ``(C,)``.
        std: The same shape, positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone().float())
        self.register_buffer("std", std.detach().clone().float())
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def from_scale_factor(cls, scale_factor: float) -> "LatentNormalization":
        """The paper's form: z is multiplied by ``scale_factor``.

        Raises:
            ConfigError: If it is not of a size that float32 can divide by.
        """
        if not LEAST_SCALE <= scale_factor <= LARGEST_SCALE:
            raise ConfigError(
                f"scale_factor is {short(scale_factor)}, expected {LEAST_SCALE:g} to"
                f" {LARGEST_SCALE:g}"
            )
        return cls(torch.zeros(1), torch.tensor([1.0 / scale_factor]))

    @classmethod
    def measure(cls, moments: Tensor, channels: int, per_channel: bool) -> "LatentNormalization":
        """Measure over the data.

        Args:
            moments: What `encode_moments` gave for the data, ``(N, C or 2C, h, w)``. For a KL
                first stage the variance is that of posterior samples, in closed form.
            channels: Latent channels C.
            per_channel: Means and deviations per channel; otherwise the paper's one number.
        """
        values = moments.double()
        mean = values[:, :channels]
        noise = values[:, channels:].exp() if values.shape[1] > channels else torch.zeros(1)
        if not per_channel:
            return cls(torch.zeros(1), (mean.var() + noise.mean()).sqrt().reshape(1))
        within = noise.mean((0, 2, 3)) if noise.ndim == 4 else noise
        return cls(mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + within).sqrt())

    @property
    def is_scalar(self) -> bool:
        """Whether this is one scale factor alone."""
        return self.std.numel() == 1 and not bool(self.mean.any())

    @property
    def scale_factor(self) -> float:
        """The paper's ``scale_factor``; only for the scalar form."""
        assert self.is_scalar
        return 1.0 / float(self.std)

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents ``(B, C, h, w)`` to unit variance."""
        return (z - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return z * self.std.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)


def encode_moments(first_stage: FirstStage, images: Tensor) -> Tensor:
    """Encode to what is worth caching: mean and log-variance of a KL posterior, else the latent.

    Args:
        first_stage: Any first stage.
        images: ``(B, 3, H, W)`` in [-1, 1].

    Returns:
        ``(B, 2C, h, w)`` for `AutoencoderKL`, ``(B, C, h, w)`` for the others.
    """
    encoded = first_stage.encode(images)
    if isinstance(encoded, DiagonalGaussian):
        return torch.cat([encoded.mean, encoded.logvar], dim=1)
    return encoded


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a short content hash of named tensors: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class LatentDiffusion(nn.Module):
    """p(z | y) in the latent space of a first stage (paper, figure 3).

    Args:
        first_stage: E and D; frozen.
        unet: epsilon_theta.
        conditioner: tau_theta.
        schedule: Noise schedule and what the network predicts.
        normalization: Of the latents of ``first_stage``, measured over the training data.
        image_size: Height and width in pixels that it was trained at.

    Raises:
        ConfigError: If the parts do not fit together.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        unet: UNet,
        conditioner: Conditioner,
        schedule: ScheduleConfig | FlowScheduleConfig,
        normalization: LatentNormalization,
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        if unet.config.in_channels < first_stage.latent_channels:
            raise ConfigError(
                f"unet: in_channels is {unet.config.in_channels}, but the first stage has"
                f" {first_stage.latent_channels} latent channels"
            )
        if unet.config.out_channels != first_stage.latent_channels:
            raise ConfigError(
                f"unet: out_channels is {unet.config.out_channels}, but the first stage has"
                f" {first_stage.latent_channels} latent channels"
            )
        if normalization.std.numel() not in (1, first_stage.latent_channels):
            raise ConfigError(
                f"the statistics of latents have {normalization.std.numel()} channels, but the"
                f" first stage has {first_stage.latent_channels}"
            )
        self.first_stage = first_stage.eval().requires_grad_(False)
        self.unet = unet
        self.conditioner = conditioner
        self.schedule_config = schedule
        self.schedule = build_schedule(schedule)
        self.normalization = normalization
        self.image_size = image_size

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Set training mode for all but the first stage, which is frozen."""
        super().train(mode)
        self.first_stage.eval()
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of the latent of an image.

        Raises:
            RequestError: If the size is not divisible by f.
        """
        factor = self.first_stage.factor
        for name, size in (("height", height), ("width", width)):
            check_divisible(name, size, factor)
        return self.first_stage.latent_channels, height // factor, width // factor

    def encode(self, images: Tensor, rng: SampleNoise | None = None) -> Tensor:
        """Images ``(B, 3, H, W)`` in [-1, 1] to normalised latents ``(B, C, h, w)``.

        Args:
            images: The pictures.
            rng: Samples the posterior of a KL first stage; without it, its mean is taken.
        """
        encoded = self.first_stage.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            encoded = encoded.sample(rng) if rng is not None else encoded.mode()
        return self.normalization.normalize(encoded)

    def decode(self, latents: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Normalised latents ``(B, C, h, w)`` to images ``(B, 3, H, W)``, about [-1, 1].

        Args:
            latents: What to decode.
            in_stripes: See `mezzotint.models.striped`: less memory, for large images.
        """
        z = self.normalization.denormalize(latents)
        return self.first_stage.decode(z, in_stripes=in_stripes)

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Conditioning,
        *,
        guidance: Tensor | None = None,
        memory: SamplingMemory | None = None,
    ) -> Tensor:
        """Run the UNet: epsilon_theta(z_t, t, tau_theta(y)), paper eq. 3.

        Args:
            x: ``(B, C, h, w)`` noisy latents: variance-preserving, or on the path of a flow.
            timestep: ``(B,)`` in [0, T), or [0, T] and fractional for a flow.
            cond: The conditions; ``concat`` is joined to ``x`` along the channels.
            guidance: ``(B,)`` scale of guidance, for networks that were distilled with it.
            memory: What the calls of one sampling share.
        """
        return run_unet(self.unet, x, timestep, cond, guidance=guidance, memory=memory)

    @property
    def denoiser(self) -> Denoiser:
        """The model as a denoiser in variance-exploding coordinates."""
        return Denoiser(self.predict, self.schedule)

    def weights_hash(self) -> str:
        """A short hash of weights, statistics, shapes, schedule and vocabulary.

        Models that have the same one draw the same pictures.
        """
        settings = [
            self.first_stage.config.to_dict(),
            self.unet.config.to_dict(),
            self.schedule_config.to_dict(),
            self.conditioner.settings(),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(fingerprint(self.state_dict().items()).encode())
        return digest.hexdigest()[:16]


def run_unet(
    unet: Callable[..., Tensor],
    x: Tensor,
    timestep: Tensor,
    cond: Conditioning,
    *,
    guidance: Tensor | None = None,
    memory: SamplingMemory | None = None,
) -> Tensor:
    """Ask a UNet, or what stands for one; see `LatentDiffusion.predict`."""
    if cond.concat is not None:
        x = torch.cat([x, cond.concat], dim=1)
    more = {} if cond.crossattn_boxes is None else {"context_boxes": cond.crossattn_boxes}
    return unet(
        x,
        timestep,
        context=cond.crossattn,
        context_mask=cond.crossattn_mask,
        vector=cond.vector,
        guidance=guidance,
        memory=memory,
        **more,
    )


def check_divisible(name: str, size: int, factor: int) -> None:
    """Refuse an image size that the first stage cannot halve often enough."""
    if size < 1 or size % factor:
        lower = max(factor, size // factor * factor)
        near = f"{lower} or {lower + factor}" if size > factor else str(factor)
        raise RequestError(f"{name} {size} is not divisible by f = {factor}; the nearest is {near}")
