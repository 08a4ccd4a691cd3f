"""Rate, distortion and spectrum of first stages against closed forms."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.device import Execution
from mezzotint.errors import DataError
from mezzotint.evaluation.reconstruction import (
    band_shares,
    measure_reconstruction,
    paired_kid,
    rate_bits_per_pixel,
    restore,
    spectrum_error,
)
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.rng import keyed_generator

IDENTITY = IdentityFirstStage(IdentityFirstStageConfig())


def normal(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=keyed_generator(17, key), dtype=torch.float64)


@pytest.fixture(scope="module")
def emoji() -> Tensor:
    """48 emoji, ``(48, 3, 32, 32)`` uint8."""
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=32))
    return torch.stack([data.load(k).image for k in range(len(data))])


def kl(f: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    depth = int(math.log2(f)) + 1
    config = AutoencoderKLConfig(
        block_out_channels=(8,) * depth, layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    return AutoencoderKL(config).eval()


def vq(codes: int = 32) -> VQModel:
    torch.manual_seed(0)
    config = VQModelConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, codebook_size=codes
    )
    return VQModel(config).eval()


class Posterior(nn.Module):
    """In the place of the encoder: a posterior that is known for each picture by its red value."""

    def __init__(self, means: Tensor, log_variances: Tensor) -> None:
        super().__init__()
        self.means, self.log_variances = means, log_variances  # (colours, C, h, w)

    def forward(self, x: Tensor) -> Tensor:
        which = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        return torch.cat([self.means[which], self.log_variances[which]], 1).float()


def test_the_radial_power_adds_up_to_the_mean_squared_error():
    images, restored = normal(5, 3, 24, 40), normal(5, 3, 24, 40, key=1)
    frequencies, error, original = spectrum_error(images, restored, 8)
    shares = band_shares(24, 40, 8)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close((error * shares).sum(), (restored - images).square().mean())
    torch.testing.assert_close((original * shares).sum(), images.square().mean())
    np.testing.assert_allclose(frequencies, (np.arange(8) + 0.5) / 16)


def test_a_wave_stands_in_the_band_of_its_frequency():
    x = torch.arange(64, dtype=torch.float64)
    for cycles in (3, 11, 30):
        wave = torch.cos(2 * math.pi * cycles / 64 * x).expand(1, 3, 64, 64)
        for signal in (wave, wave.transpose(2, 3)):
            _, error, _ = spectrum_error(torch.zeros_like(signal), signal)
            band = int(cycles / 64 * 2 * 16)
            assert float(error[band]) > 0
            torch.testing.assert_close(error[band], error.sum())


def test_white_noise_has_its_variance_in_every_band():
    _, _, power = spectrum_error(2.0 * normal(64, 3, 64, 64), normal(64, 3, 64, 64, key=1), 16)
    # the first band averages 13 coefficients of 192 planes, 2,496 numbers of relative deviation 1.4
    torch.testing.assert_close(power, torch.full_like(power, 4.0), rtol=0.12, atol=0)


def test_a_blur_loses_high_frequencies_alone():
    """What a Gaussian of width s takes away is ``(1 - exp(-2 pi^2 s^2 f^2))^2`` of the power."""
    images, width = normal(16, 3, 64, 64), 0.8
    fy, fx = (torch.fft.fftfreq(64, dtype=torch.float64) for _ in range(2))
    squared = fy[:, None] ** 2 + fx[None] ** 2
    kept = torch.exp(-2 * math.pi**2 * width**2 * squared)
    blurred = torch.fft.ifft2(torch.fft.fft2(images) * kept).real
    frequencies, error, original = spectrum_error(images, blurred)
    lost = error / original
    assert float(lost[0]) < 1e-3
    assert float(lost[-1]) > 0.8
    assert bool((lost.diff() > 0).all())
    closed = (1 - torch.exp(-2 * math.pi**2 * width**2 * frequencies**2)) ** 2
    # a band is as wide as 1/32 of a cycle; the last reaches into the corners
    torch.testing.assert_close(lost[4:-1], closed[4:-1], rtol=0.1, atol=0)


def test_too_many_bands_for_small_pictures_are_refused():
    with pytest.raises(
        DataError, match="16 bands are too many for images of 16x64 pixels; at most 8"
    ):
        spectrum_error(torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64))


def test_the_identity_takes_all_bits_and_loses_nothing(emoji: Tensor):
    assert rate_bits_per_pixel(IDENTITY, emoji) == 24.0
    assert torch.equal(restore(IDENTITY, emoji, batch_size=7), emoji)
    scores = measure_reconstruction(IDENTITY, emoji[:8])
    assert (scores.rate, scores.psnr, scores.images) == (24.0, math.inf, 8)
    assert scores.ssim == pytest.approx(1.0, abs=1e-4)  # float32, on white
    assert scores.lpips_mobilenet_v2 == pytest.approx(0.0, abs=1e-6)
    # the same features twice: every term of the estimate is 0
    assert scores.rkid_mobilenet_v2.value == pytest.approx(0.0, abs=1e-9)
    assert scores.rfid_mobilenet_v2 == pytest.approx(0.0, abs=1e-3)
    assert scores.codes_used is None
    assert scores.spectrum.error == (0.0,) * 16
    assert scores.spectrum.original[0] > scores.spectrum.original[-1] > 0


def test_a_codebook_takes_the_bits_of_its_index(emoji: Tensor):
    first_stage = vq(codes=32)
    assert rate_bits_per_pixel(first_stage, emoji) == 5 / 4
    scores = measure_reconstruction(first_stage, emoji[:8], batch_size=3)
    indices = first_stage.quantize.nearest(first_stage.encode(emoji[:8] / 127.5 - 1))
    assert scores.codes_used == len(indices.unique()) > 1
    assert scores.rate == 5 / 4
    assert math.isfinite(scores.psnr)


def test_the_rate_of_a_gaussian_channel():
    """Means of variance s^2 and posteriors of variance t: 1/2 log2(1 + s^2 / t) a number."""
    first_stage, signal, noise = kl(f=4), (1.0, 3.0, 0.5, 0.0), 0.25
    means = normal(256, 4, 4, 4)
    means = (means - means.mean((0, 2, 3), keepdim=True)) / means.std(
        (0, 2, 3), keepdim=True, correction=0
    )
    means = means * torch.tensor(signal).view(1, 4, 1, 1) + 7.0
    first_stage.encoder = Posterior(means, torch.full_like(means, math.log(noise)))
    nn.init.dirac_(first_stage.quant_conv.weight)
    nn.init.zeros_(first_stage.quant_conv.bias)
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 16, 16)
    expected = sum(0.5 * math.log2(1 + s**2 / noise) for s in signal) / 16
    assert rate_bits_per_pixel(first_stage, images, batch_size=100) == pytest.approx(expected)


def test_the_rate_is_the_mean_divergence_from_the_fitted_gaussian(emoji: Tensor):
    first_stage = kl(f=2)
    with torch.no_grad():
        posterior = first_stage.encode(emoji / 127.5 - 1)
        mean, var = posterior.mean.double(), posterior.var.double()
        m = mean.mean((0, 2, 3), keepdim=True)
        v = var.mean((0, 2, 3), keepdim=True) + mean.var((0, 2, 3), keepdim=True, correction=0)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, var.sqrt()),
            torch.distributions.Normal(m.expand_as(mean), v.sqrt().expand_as(mean)),
        )
    expected = float(divergence.sum((1, 2, 3)).mean()) / math.log(2) / 32**2
    assert rate_bits_per_pixel(first_stage, emoji) == pytest.approx(expected, rel=1e-6)


def test_paired_kid_is_the_u_statistic_over_pairs():
    x, y = normal(6, 5), normal(6, 5, key=1)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    def estimate(rows: list[int]) -> float:
        pairs = [(i, j) for i in rows for j in rows if i != j]
        terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs]
        return sum(terms) / len(pairs)

    found = paired_kid(x, y)
    assert found.value == pytest.approx(estimate(list(range(6))))
    without = np.array([estimate([i for i in range(6) if i != k]) for k in range(6)])
    error = math.sqrt(5 / 6 * ((without - without.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(error)


def test_paired_kid_is_unbiased_where_both_sets_show_the_same():
    """Two noisy views of the same 12 features, 400 times: the mean is 0."""
    values: list[float] = []
    for trial in range(400):
        shown = normal(12, 8, key=trial)
        views = [shown + 0.3 * normal(12, 8, key=1000 * view + trial) for view in (1, 2)]
        values.append(paired_kid(*views).value)
    mean, error = np.mean(values), np.std(values) / math.sqrt(400)
    assert abs(mean) < 3 * error
    assert error < 0.01


def test_scores_do_not_depend_on_the_batch_and_can_be_stored(emoji: Tensor):
    first_stage = kl(f=2)
    whole = measure_reconstruction(first_stage, emoji[:10], batch_size=10)
    parts = measure_reconstruction(first_stage, emoji[:10], batch_size=3)
    for name in ("rate", "psnr", "ssim", "lpips_mobilenet_v2", "rfid_mobilenet_v2"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    np.testing.assert_allclose(parts.spectrum.error, whole.spectrum.error, rtol=1e-3)
    assert replace(whole, images=3).images == 3
    assert asdict(whole)["rkid_mobilenet_v2"]["standard_error"] > 0


def test_bfloat16_restores_nearly_the_same(emoji: Tensor):
    execution = Execution(device=torch.device("cpu"), precision=torch.bfloat16, reasons=())
    first_stage = kl(f=2)
    exact = restore(first_stage, emoji[:4]).float()
    rough = restore(first_stage, emoji[:4], execution=execution).float()
    assert 0 < float((exact - rough).abs().mean()) < 2  # of 255


def test_distances_grow_with_the_blur(emoji: Tensor):
    class Blur(IdentityFirstStage):
        def __init__(self, reach: int) -> None:
            super().__init__(IdentityFirstStageConfig())
            self.reach = reach

        def decode(self, z: Tensor) -> Tensor:
            padded = F.pad(z, [self.reach] * 4, mode="replicate")
            return F.avg_pool2d(padded, 2 * self.reach + 1, stride=1)

    scores = [measure_reconstruction(Blur(reach), emoji[:16], batch_size=16) for reach in (1, 2)]
    assert scores[0].psnr > scores[1].psnr
    assert scores[0].ssim > scores[1].ssim
    assert scores[0].lpips_mobilenet_v2 < scores[1].lpips_mobilenet_v2
    assert 0 < scores[0].rkid_mobilenet_v2.value < scores[1].rkid_mobilenet_v2.value
    assert 0 < scores[0].rfid_mobilenet_v2 < scores[1].rfid_mobilenet_v2
    # relative to what is there, more of the fine than of the coarse is lost
    lost = np.divide(scores[0].spectrum.error, scores[0].spectrum.original)
    assert lost[0] < 0.01 < lost[4] < lost[8]


def test_two_pictures_are_too_few(emoji: Tensor):
    with pytest.raises(DataError, match="2 images are too few; give at least 3"):
        measure_reconstruction(IDENTITY, emoji[:2])
