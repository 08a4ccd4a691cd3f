"""What training minimises."""

from typing import Literal, TypeVar

from torch import Tensor

from mezzotint.device import widened
from mezzotint.diffusion.denoiser import Network
from mezzotint.diffusion.flow import Schedule

__all__ = ["Deviation", "Weighting", "diffusion_loss", "loss_weight", "pseudo_huber"]

C = TypeVar("C")
Weighting = Literal["simple", "min_snr"]
Deviation = Literal["squared", "absolute"]


def loss_weight(schedule: Schedule, t: Tensor, weighting: Weighting, gamma: float = 5.0) -> Tensor:
    """Return the weight of the squared error at each time.

    ``simple`` is 1, equation 14 of Ho et al. (arXiv 2006.11239). ``min_snr`` weighs the squared
    error of the *image* by min(SNR, gamma) (Hang et al., arXiv 2303.09556, section 3.4). A
    network's own error is SNR times that for the noise, SNR + 1 times that for the velocity and
    (sqrt(SNR) + 1)**2 times that for a flow's, so for these the weight is divided by as much.

    Where a schedule ends in noise alone, the weight of the last time would be 0, and the first
    step of sampling never learned. There the image is weighed by min(SNR + 1, gamma): SNR + 1 is
    the form that Salimans and Ho (arXiv 2202.00512, section 4) give SNR for this reason, and
    Hang et al.'s code sets the weight to 1 at that time, as it is here for either velocity.

    Args:
        schedule: The noise schedule, which also says what the network predicts.
        t: ``(B,)`` times.
        weighting: Which of the two.
        gamma: The cap of ``min_snr``.

    Returns:
        ``(B,)`` float32.
    """
    snr = schedule.snr(t)
    if weighting == "simple":
        return snr.new_ones(snr.shape)
    capped = (snr + 1 if schedule.ends_in_noise else snr).clamp(max=gamma)
    match schedule.prediction_type:
        case "epsilon":
            return capped / snr
        case "v_prediction":
            return capped / (snr + 1)
        case "sample":
            return capped
        case "flow_prediction":
            return capped / (snr.sqrt() + 1) ** 2


def pseudo_huber(found: Tensor, wanted: Tensor, c: float) -> Tensor:
    """Return the mean of ``sqrt(d**2 + c**2) - c`` over each sample's deviations d.

    Squared where they are far below c, absolute where they are far above (Song and Dhariwal, arXiv
    2310.14189, section 3.3, there of the whole sample, here of each element as latent consistency
    models are trained).

    Args:
        found: ``(B, ...)``.
        wanted: Of the same shape.
        c: Above 0.

    Returns:
        ``(B,)`` float32 or wider.
    """
    off = widened(found) - widened(wanted)
    return ((off**2 + c**2).sqrt() - c).flatten(1).mean(1)


def diffusion_loss(
    network: Network[C],
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: C,
    *,
    weighting: Weighting = "simple",
    gamma: float = 5.0,
    deviation: Deviation = "squared",
) -> Tensor:
    """Return the weighted error of one prediction per sample (paper, eq. 2).

    Args:
        network: ``(input, t, cond) -> prediction``.
        schedule: The noise schedule, which also says what the network predicts.
        x0: ``(B, C, H, W)`` normalised latents or images.
        t: ``(B,)`` times, whole ones but for a flow.
        noise: Standard normal, of the shape of ``x0``.
        cond: What the network is told, as a batch of B.
        weighting: How times are weighed; see `loss_weight`.
        gamma: The cap of ``min_snr``.
        deviation: The error that is averaged. Some of the paper's released configurations have the
            absolute one.

    Returns:
        ``(B,)`` float32: the mean over each sample's elements, to be averaged by the caller.
    """
    prediction = widened(network(schedule.add_noise(x0, noise, t), t, cond))
    off = prediction - widened(schedule.target(x0, noise, t))
    error = off**2 if deviation == "squared" else off.abs()
    return error.flatten(1).mean(1) * loss_weight(schedule, t, weighting, gamma)
