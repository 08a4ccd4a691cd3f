"""What keeps a latent space in bounds: a light KL penalty, or a vector quantiser (appendix G)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.device import widened
from mezzotint.rng import SampleNoise

__all__ = ["DiagonalGaussian", "Quantization", "VectorQuantizer"]

_MOST_DISTANCES = 1 << 26  # of vectors to codes that stand in memory at a time


class DiagonalGaussian:
    """The encoder's posterior q(z|x) = N(mean, diag(var)), Kingma & Welling 2014.

    Args:
        moments: ``(B, 2C, h, w)``, the mean and then the log-variance. The log-variance is clamped
            to -30..20, so that its exponential is finite and not zero in float32.

    Attributes:
        mean: ``(B, C, h, w)``.
        logvar: ``(B, C, h, w)``, natural logarithm of the variance.

    Example:
        >>> import torch
        >>> posterior = DiagonalGaussian(torch.zeros(2, 8, 4, 4))  # the standard normal
        >>> posterior.kl()
        tensor([0., 0.])
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation ``(B, C, h, w)``."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance ``(B, C, h, w)``."""
        return torch.exp(self.logvar)

    def sample(self, rng: SampleNoise | torch.Generator) -> Tensor:
        """Draw z = mean + std * eps (the reparameterisation trick), ``(B, C, h, w)``.

        Args:
            rng: One noise stream per sample, or one CPU generator for the whole batch.
        """
        if isinstance(rng, SampleNoise):
            noise = rng.normal(self.mean.shape[1:])
        else:
            noise = torch.randn(self.mean.shape, generator=rng)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Return the most probable z, which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over C, h and w, in nats; ``(B,)``."""
        mean, logvar = widened(self.mean), widened(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


@dataclass(frozen=True, eq=False)
class Quantization:
    """A latent after its quantiser.

    Attributes:
        z_q: ``(B, d, h, w)``, the nearest codes; gradients pass straight through to the input.
        indices: ``(B, h, w)`` int64, which code stands where.
        loss: Scalar, codebook and commitment terms.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-code quantisation with a learned codebook (VQ-VAE, arXiv 1711.00937).

    The loss is its equation 3, averaged over elements: ``||sg[z] - e||^2 + beta ||z - sg[e]||^2``.
    The commitment weight beta stands on the encoder's term, as the paper has it.

    Args:
        codebook_size: Number K of codes.
        embedding_dim: Length d of a code.
        commitment_weight: beta.

    Attributes:
        usage: ``(K,)`` int64, how often each code was chosen in training since `reset_usage`. It is
            training state and no weight, so the state dict does not have it.
    """

    usage: Tensor

    def __init__(
        self, codebook_size: int, embedding_dim: int, commitment_weight: float = 0.25
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.embedding = nn.Embedding(codebook_size, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.register_buffer(
            "usage", torch.zeros(codebook_size, dtype=torch.int64), persistent=False
        )

    def forward(self, z: Tensor) -> Quantization:
        """Replace every vector of ``z`` ``(B, d, h, w)`` by its nearest code."""
        indices = self.nearest(z)
        codes = self.lookup(indices)
        # in float32: the difference of two bf16 numbers that are close has few bits left
        wide, codes_wide = widened(z), widened(codes)
        loss = F.mse_loss(codes_wide, wide.detach()) + self.commitment_weight * F.mse_loss(
            wide, codes_wide.detach()
        )
        if self.training:
            self.usage += torch.bincount(indices.flatten(), minlength=self.usage.numel())
        return Quantization(z + (codes.to(z.dtype) - z).detach(), indices, loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector of ``z``, ``(B, h, w)`` int64."""
        with torch.autocast(z.device.type, enabled=False):
            codes = widened(self.embedding.weight)
            flat = widened(z).movedim(1, -1).reshape(-1, codes.shape[1])  # (B h w, d)
            # ||z - e||^2 without ||z||^2, which is the same for every code
            lengths = codes.square().sum(dim=1)
            nearest = [
                torch.addmm(lengths, some, codes.T, alpha=-2.0).argmin(dim=1)
                for some in flat.split(max(1, _MOST_DISTANCES // len(codes)))
            ]
        return torch.cat(nearest).view(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, d, h, w)`` of ``indices`` ``(B, h, w)``."""
        return cast(Tensor, self.embedding(indices)).movedim(-1, 1)

    def reset_usage(self) -> None:
        """Begin a new count, at the start of an epoch."""
        self.usage.zero_()

    @torch.no_grad()
    def reseed_dead(self, z: Tensor, generator: torch.Generator) -> int:
        """Move every code that was not chosen since `reset_usage` onto a vector of the encoder.

        Args:
            z: ``(B, d, h, w)``, encoder outputs to choose from.
            generator: CPU generator that decides which.

        Returns:
            How many codes were dead.
        """
        dead = (self.usage == 0).nonzero().flatten()
        vectors = z.movedim(1, -1).flatten(0, -2)  # (B h w, d)
        order = torch.randperm(len(vectors), generator=generator)
        # fewer vectors than dead codes: go round, the first updates will part the twins
        chosen = order[torch.arange(len(dead)) % len(vectors)].to(z.device)
        self.embedding.weight[dead] = vectors[chosen].to(self.embedding.weight.dtype)
        return len(dead)
