"""What a first stage keeps of a picture, at which rate, and which frequencies it loses.

These are the measures of the paper's study of compression (Rombach et al. 2022, section 4.1 and
table 8), and the error by spatial frequency: a good first stage drops what the eye hardly sees,
and that is high frequency (section 3.1, figure 2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.device import Execution, autocast
from mezzotint.errors import DataError
from mezzotint.evaluation.distributions import (
    Estimate,
    FeatureStatistics,
    frechet_distance,
    polynomial_kernel,
)
from mezzotint.evaluation.metrics import perceptual_metric, psnr, ssim
from mezzotint.generation.sampling import to_bytes
from mezzotint.latent_diffusion import FirstStage
from mezzotint.models.autoencoder import IdentityFirstStage, VQModel
from mezzotint.models.features import load_features
from mezzotint.models.regularizers import DiagonalGaussian

__all__ = [
    "ReconstructionScores",
    "Spectrum",
    "band_shares",
    "measure_reconstruction",
    "paired_kid",
    "rate_bits_per_pixel",
    "restore",
    "spectrum_error",
]

_ROWS = 1024  # of a kernel matrix that stand in memory at once


@dataclass(frozen=True)
class Spectrum:
    """Radially averaged power spectra, in squares of the pixels' range of 2.

    Attributes:
        frequencies: Centres of the bands, in cycles per pixel.
        error: Power of ``restored - original`` in each band.
        original: Power of the originals in each band.
    """

    frequencies: tuple[float, ...]
    error: tuple[float, ...]
    original: tuple[float, ...]


@dataclass(frozen=True)
class ReconstructionScores:
    """What is left of pictures after a first stage; means over the pictures.

    Attributes:
        images: How many pictures.
        rate: Bits per pixel of the latents; see `rate_bits_per_pixel`.
        psnr: In dB, of 8-bit pictures; infinite if one of them is restored exactly.
        ssim: Structural similarity, at most 1.
        lpips_mobilenet_v2: Perceptual distance on MobileNetV2.
        rkid_mobilenet_v2: Kernel distance between restored and original; see `paired_kid`.
        rfid_mobilenet_v2: Fréchet distance between them. It falls with the number of pictures.
        codes_used: How many codes of a codebook the pictures use; only VQ.
        spectrum: The error by spatial frequency; see `spectrum_error`.
    """

    images: int
    rate: float
    psnr: float
    ssim: float
    lpips_mobilenet_v2: float
    rkid_mobilenet_v2: Estimate
    rfid_mobilenet_v2: float
    codes_used: int | None
    spectrum: Spectrum


@torch.inference_mode()
def measure_reconstruction(
    first_stage: FirstStage,
    images: Tensor,
    *,
    batch_size: int = 16,
    bands: int = 16,
    execution: Execution | None = None,
) -> ReconstructionScores:
    """Encode and decode pictures, and compare them with what they were.

    All is measured on 8-bit pictures, as people see them; a KL first stage decodes its mean.

    Args:
        first_stage: Any first stage; moved nowhere.
        images: ``(N, 3, H, W)`` uint8.
        batch_size: Pictures encoded and decoded at once.
        bands: Of the spectrum; fewer where the pictures are small.
        execution: Device and precision; by default float32 where the first stage stands.

    Raises:
        DataError: If there are fewer than 3 pictures.
        RequestError: If f does not divide their size.
    """
    if len(images) < 3:
        raise DataError(f"reconstruction: {len(images)} images are too few; give at least 3")
    execution = execution or _where_it_stands(first_stage)
    restored = restore(first_stage, images, batch_size=batch_size, execution=execution)
    perceptual = perceptual_metric("mobilenet-v2").to(execution.device)
    network = load_features("mobilenet-v2").to(execution.device)
    bands = min(bands, min(images.shape[-2:]) // 2)
    measured: list[Tensor] = []
    features: list[Tensor] = []
    spectrum = torch.zeros(3, bands, dtype=torch.float64)
    for pair in zip(images.split(batch_size), restored.split(batch_size), strict=True):
        original, again = (part.to(execution.device) for part in pair)
        x, y = _floats(again), _floats(original)
        scores = [metric(x, y).double().cpu() for metric in (psnr, ssim, perceptual)]
        measured.append(torch.stack(scores))
        features.append(torch.stack([network.extract(part)[0].cpu() for part in (again, original)]))
        spectrum += torch.stack(spectrum_error(y, x, bands)) * (len(x) / len(images))
    means = torch.cat(measured, dim=1).mean(1)
    restored_features, original_features = torch.cat(features, dim=1)
    return ReconstructionScores(
        images=len(images),
        rate=rate_bits_per_pixel(first_stage, images, batch_size=batch_size, execution=execution),
        psnr=float(means[0]),
        ssim=float(means[1]),
        lpips_mobilenet_v2=float(means[2]),
        rkid_mobilenet_v2=paired_kid(restored_features, original_features),
        rfid_mobilenet_v2=frechet_distance(
            FeatureStatistics.of(restored_features), FeatureStatistics.of(original_features)
        ),
        codes_used=_codes_used(first_stage, images, batch_size, execution),
        spectrum=Spectrum(*(tuple(part) for part in spectrum.tolist())),
    )


@torch.inference_mode()
def restore(
    first_stage: FirstStage,
    images: Tensor,
    *,
    batch_size: int = 16,
    execution: Execution | None = None,
) -> Tensor:
    """Encode and decode pictures.

    Args:
        first_stage: Any first stage; of a KL posterior the mean is decoded.
        images: ``(N, 3, H, W)`` uint8.
        batch_size: Pictures at once.
        execution: Device and precision; by default float32 where the first stage stands.

    Returns:
        ``(N, 3, H, W)`` uint8 on the CPU.
    """
    execution = execution or _where_it_stands(first_stage)
    parts: list[Tensor] = []
    for part in images.split(batch_size):
        with autocast(execution):
            encoded = first_stage.encode(_floats(part.to(execution.device)))
            z = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
            parts.append(to_bytes(first_stage.decode(z)).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def rate_bits_per_pixel(
    first_stage: FirstStage,
    images: Tensor,
    *,
    batch_size: int = 16,
    execution: Execution | None = None,
) -> float:
    r"""Return how many bits a latent takes for each pixel of its picture.

    The identity takes 8 for each channel. A code of a codebook of K takes ``log2 K``, as in the
    paper's table 8. What a KL first stage sends is a sample of its posterior, and coding that
    costs ``KL(q(z|x) || p(z))`` (bits back; Hinton and van Camp 1993). As p, each channel gets the
    Gaussian that fits all latents of the pictures, of mean m and variance ``v = E[var] +
    Var[mean]``. The terms ``(var + (mean - m)**2) / v`` then average to 1, and what is left is
    ``1/2 (log v - E[log var])`` for each number of a latent.

    Args:
        first_stage: Any first stage.
        images: ``(N, 3, H, W)`` uint8, the more the better; only KL looks at them.
        batch_size: Pictures encoded at once.
        execution: Device and precision; by default float32 where the first stage stands.
    """
    pixels = first_stage.factor**2  # of the picture, for each position of a latent
    if isinstance(first_stage, IdentityFirstStage):
        return 8.0 * first_stage.in_channels
    if isinstance(first_stage, VQModel):
        return math.log2(first_stage.config.codebook_size) / pixels
    execution = execution or _where_it_stands(first_stage)
    sums = torch.zeros(4, first_stage.latent_channels, dtype=torch.float64)
    count = 0
    for part in images.split(batch_size):
        with autocast(execution):
            posterior = first_stage.encode(_floats(part.to(execution.device)))
        mean, logvar = posterior.mean.double().cpu(), posterior.logvar.double().cpu()
        terms = (mean, mean.square(), logvar.exp(), logvar)
        sums += torch.stack([term.sum((0, 2, 3)) for term in terms])
        count += mean[:, 0].numel()
    mean, square, variance, log_variance = sums / count
    aggregate = variance + square - mean.square()
    nats = 0.5 * (aggregate.log() - log_variance).sum()
    return float(nats) / math.log(2.0) / pixels


def spectrum_error(
    images: Tensor, restored: Tensor, bands: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the error is spread over spatial frequencies.

    Power is the mean of ``|F|**2 / (H W)`` over the coefficients of a band, over channels and
    pictures: for white noise it is the variance in every band, and weighted by `band_shares` it
    adds up to the mean square (Parseval). Bands are rings of equal width from 0 to 0.5 cycles per
    pixel; the last also has the corners beyond, which only diagonals reach.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1].
        restored: The same shape.
        bands: How many, at most half the shorter side.

    Returns:
        Centres of the bands in cycles per pixel, power of the error, and power of the images, each
        ``(bands,)`` float64.

    Raises:
        DataError: If the images are too small for so many bands.
    """
    ring, counts = _rings(images.shape[-2], images.shape[-1], bands)
    power = torch.zeros(2, bands, dtype=torch.float64)
    for part in zip(images.split(64), restored.split(64), strict=True):
        original, again = (p.double().cpu() for p in part)
        for row, signal in enumerate((again - original, original)):
            squares = torch.fft.fft2(signal, norm="ortho").abs().square().mean(1).sum(0)
            power[row].index_add_(0, ring, squares.flatten())
    power /= counts * len(images)
    centres = (torch.arange(bands, dtype=torch.float64) + 0.5) * 0.5 / bands
    return centres, power[0], power[1]


def band_shares(height: int, width: int, bands: int = 16) -> Tensor:
    """Return which share of a picture's frequencies each band of `spectrum_error` has.

    Raises:
        DataError: If a picture of this size is too small for so many bands.
    """
    return _rings(height, width, bands)[1] / (height * width)


def paired_kid(restored: Tensor, original: Tensor) -> Estimate:
    """Return the kernel distance (KID) between features of the same pictures, and its jackknife.

    The usual estimate takes its two sets for independent; here each picture stands in both, whose
    kinship would pull it below 0. The estimate of Gretton et al. 2012 (JMLR 13, lemma 6,
    equation 4) leaves those pairs out: it is unbiased, and 0 for a first stage that loses
    nothing. The kernel is KID's, ``(x . y / d + 1)**3`` (Binkowski et al., arXiv 1801.01401).

    Args:
        restored: ``(N, d)``.
        original: ``(N, d)``, row by row of the same pictures.

    Raises:
        DataError: If there are fewer than 3.
    """
    count = len(original)
    if count < 3:
        raise DataError(f"KID: {count} images are too few; give at least 3")
    x, y = restored.double(), original.double()  # once, and not for each block
    rows = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        terms = (
            polynomial_kernel(x[part], x)
            + polynomial_kernel(y[part], y)
            - polynomial_kernel(x[part], y)
            - polynomial_kernel(y[part], x)
        )
        terms[:, part].fill_diagonal_(0.0)
        rows[part] = terms.sum(1)
    total = rows.sum()
    value = total / (count * (count - 1))
    without = (total - 2.0 * rows) / ((count - 1) * (count - 2))
    spread = (without - without.mean()).square().sum() * (count - 1) / count
    return Estimate(float(value), float(spread.sqrt()))


def _floats(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1.0


def _where_it_stands(first_stage: FirstStage) -> Execution:
    parameter = next(first_stage.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return Execution(device=device, precision=torch.float32, reasons=())


def _codes_used(
    first_stage: FirstStage, images: Tensor, batch_size: int, execution: Execution
) -> int | None:
    if not isinstance(first_stage, VQModel):
        return None
    used = torch.zeros(first_stage.config.codebook_size, dtype=torch.bool)
    for part in images.split(batch_size):
        with autocast(execution):
            z = first_stage.encode(_floats(part.to(execution.device)))
        used[first_stage.quantize.nearest(z).flatten().cpu()] = True
    return int(used.sum())


def _rings(height: int, width: int, bands: int) -> tuple[Tensor, Tensor]:
    """The band ``(H W,)`` of each coefficient of a Fourier transform, and each band's count."""
    if bands > min(height, width) // 2:
        raise DataError(
            f"spectrum: {bands} bands are too many for images of {height}x{width} pixels;"
            f" at most {min(height, width) // 2}"
        )
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)
    horizontal = torch.fft.fftfreq(width, dtype=torch.float64)
    radius = torch.hypot(*torch.meshgrid(vertical, horizontal, indexing="ij")).flatten()
    ring = (radius * (2 * bands)).floor().long().clamp(max=bands - 1)
    return ring, torch.bincount(ring, minlength=bands).double()
