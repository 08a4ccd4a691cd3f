"""From an estimate of the image to a consistency function: the end of the path from any point."""

from torch import Tensor

from mezzotint.diffusion.flow import Schedule
from mezzotint.diffusion.single_step import Denoise

__all__ = ["SIGMA_DATA", "TIMESTEP_SCALING", "ConsistencyFunction"]

# of latent consistency models (arXiv 2310.04378), and of diffusers' LCMScheduler by default
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


class ConsistencyFunction:
    """``f(x, t) = c_skip(t) * c_in * x + c_out(t) * D(x, sigma)``, whose f(x, 0) is its input.

    With ``s = 10 t`` and ``sigma_data = 0.5``, ``c_skip = sigma_data**2 / (s**2 + sigma_data**2)``
    and ``c_out = s / sqrt(s**2 + sigma_data**2)`` (Luo et al., arXiv 2310.04378, section 3 and
    their code; Song et al., arXiv 2303.01469, equation 5). ``c_in * x`` is what the network sees.
    The two ends aside it is the estimate of the image: at t = 1 c_out is 0.9988.

    Args:
        denoise: ``(x, sigma) -> x0``, guided or not.
        schedule: Of its network.
    """

    def __init__(self, denoise: Denoise, schedule: Schedule) -> None:
        self.denoise = denoise
        self.schedule = schedule

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate the image at the end of the path; shapes as in `Denoiser`."""
        scaled = TIMESTEP_SCALING * self.schedule.sigma_to_t(sigma)
        total = scaled**2 + SIGMA_DATA**2
        shape = (-1, *[1] * (x.ndim - 1))
        c_skip = (SIGMA_DATA**2 / total).view(shape).to(x.dtype)
        c_out = (scaled / total.sqrt()).view(shape).to(x.dtype)
        c_in = self.schedule.input_scale(sigma.to(x.dtype).view(shape))
        return c_skip * (c_in * x) + c_out * self.denoise(x, sigma)
