"""Inpainting with a model that was never told of masks: what is known is held fast.

At every noise level the known part of the state is the known image with noise of that level, and
the model draws the rest to fit (Lugmayr et al., RePaint, arXiv 2201.09865, equation 8; without its
resampling).
"""

import torch
from torch import Tensor

from mezzotint.diffusion.single_step import Denoise

__all__ = ["HoldKnown"]


class HoldKnown:
    """A denoiser that draws only where a mask says so.

    It sees the known part at the right noise level whatever state the sampler has there, and its
    estimate of the known part is the known image itself. So it goes with every sampler.

    Args:
        denoise: ``(x, sigma (B,)) -> x0``.
        known: ``(B, C, h, w)`` the image, of which the known part is used.
        noise: ``(B, C, h, w)`` standard normal, that of the start.
        mask: ``(B, 1, h, w)``, 1 where to draw and 0 where to hold.
        free_level: A noise level at which nothing is held: where sampling starts from noise alone,
            the known part does too, as in the pipelines of diffusers.
    """

    def __init__(
        self,
        denoise: Denoise,
        known: Tensor,
        noise: Tensor,
        mask: Tensor,
        *,
        free_level: float | None = None,
    ) -> None:
        self.denoise = denoise
        self.known = known
        self.noise = noise
        self.drawn = mask > 0.5
        self.free_level = free_level

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate the clean image; shapes as in `mezzotint.diffusion.denoiser.Denoiser`."""
        level = sigma.view(-1, 1, 1, 1)
        held = self.drawn
        if self.free_level is not None:
            held = held | (level >= self.free_level)
        x = torch.where(held, x, self.known + level * self.noise)
        return self.keep(self.denoise(x, sigma))

    def keep(self, x0: Tensor) -> Tensor:
        """Return a clean image with the known part put in."""
        return torch.where(self.drawn, x0, self.known)
