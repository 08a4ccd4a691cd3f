import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data.degradation import DegradationConfig, bicubic_down, degrade
from mezzotint.errors import ConfigError, DataError

PLAIN = {"blur": (0.01, 0.01), "noise": (0.0, 0.0), "jpeg": (95, 95), "jpeg_twice": 0.0}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(height: int = 96, width: int = 128) -> torch.Tensor:
    """A picture without detail: what little a degradation does to it can be told."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (torch.stack([x, y, 0.5 + 0.4 * torch.sin(3 * x + 2 * y)]) * 200 + 20).to(torch.uint8)


def speckled(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=generator(1)).to(torch.uint8)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_bicubic_is_pillows_filter(factor: int) -> None:
    image = speckled(72, 48) // 2 + 64  # nothing is clipped between Pillow's two directions
    small = degrade(image, DegradationConfig(factor=factor), generator(0))
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.asarray(pixels.resize((48 // factor, 72 // factor), Image.Resampling.BICUBIC))
    difference = small.permute(1, 2, 0).numpy().astype(int) - expected
    assert np.abs(difference).max() <= 1  # Pillow rounds after each of them


def test_bicubic_down_is_the_same_for_models_and_has_a_gradient() -> None:
    image = speckled()
    x = (image[None].double() / 127.5 - 1.0).requires_grad_()
    small = bicubic_down(x, 4)
    expected = degrade(image, DegradationConfig(factor=4), generator(0))
    again = ((small[0] + 1.0) * 127.5).clamp(0, 255)
    assert (again - expected).abs().max() <= 0.51  # half a level, by rounding
    small.sum().backward()
    # every pixel's weights sum to one small pixel's share, so the gradients sum to their number
    assert float(x.grad.sum()) == pytest.approx(3 * 16 * 16, rel=1e-9)
    inside = x.grad[:, :, 12:-12, 12:-12]
    assert float(inside.min()) > 0.04 and float(inside.max()) < 0.085  # 1/16, uneven by phase


def test_bicubic_down_averages_what_it_leaves_out() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1.0
    small = bicubic_down(board.expand(1, 3, 64, 64), 4)
    assert small[..., 2:-2, 2:-2].abs().max() < 0.01


@pytest.mark.parametrize("kind", ["bicubic", "bsrgan"])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_sizes(kind: str, factor: int) -> None:
    config = DegradationConfig.from_dict({"kind": kind, "factor": factor})
    for seed in range(6):
        small = degrade(smooth(5 * 24, 24), config, generator(seed))
        assert small.shape == (3, 5 * 24 // factor, 24 // factor)
        assert small.dtype == torch.uint8 and small.is_contiguous()


def test_the_generator_alone_decides() -> None:
    config = DegradationConfig(kind="bsrgan")
    image = smooth()
    first = degrade(image, config, generator(3))
    torch.manual_seed(7), np.random.seed(7)
    torch.rand(5)
    assert torch.equal(first, degrade(image, config, generator(3)))
    others = [degrade(image, config, generator(seed)) for seed in range(4, 9)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(image, smooth())  # it is left as it was


def test_a_chain_without_strength_only_shrinks() -> None:
    """On a smooth picture all filters agree, and JPEG of quality 95 changes little."""
    config = DegradationConfig(kind="bsrgan", **PLAIN)
    plain = degrade(smooth(), DegradationConfig(), generator(0)).float()
    for seed in range(12):
        error = (degrade(smooth(), config, generator(seed)).float() - plain).abs()
        assert error.mean() < 1.5 and error.median() <= 1


def spread(image: torch.Tensor) -> float:
    return float(image.float().std((1, 2)).mean())


def test_noise_has_the_asked_deviation() -> None:
    """Noise that is added last is what a constant picture varies by."""
    from mezzotint.data.chance import Chance
    from mezzotint.data.degradation import _add_noise

    grey = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    config = DegradationConfig(noise=(12.0, 12.0))
    correlations, spreads = [], []
    for seed in range(24):
        values = _add_noise(grey, config, Chance(generator(seed))).float().flatten(1) - 128
        spreads.append(float(values.square().mean().sqrt()))
        correlations.append(float(torch.corrcoef(values)[0, 1]))
    assert max(spreads) <= 12.5  # correlated noise has at most this deviation
    full = [s for s in spreads if s > 11.7]
    assert all(s == pytest.approx(12.0, rel=0.03) for s in full)
    grey_kind = sum(c > 0.999 for c in correlations)
    colour_kind = sum(abs(c) < 0.04 for c in correlations)
    assert grey_kind >= 3 and colour_kind >= 3 and 24 - grey_kind - colour_kind >= 3


@pytest.mark.parametrize("deviation", [0.7, 1.5, 3.0])
def test_blur_is_gaussian(deviation: float) -> None:
    """The slope of a blurred edge is the kernel's profile."""
    from mezzotint.data.chance import Chance
    from mezzotint.data.degradation import _blur

    config = DegradationConfig(blur=(deviation, deviation), anisotropic=1.0)
    step = torch.zeros(3, 41, 41, dtype=torch.uint8)
    step[:, :, 21:] = 255
    blurred = _blur(step, 1.0, config, Chance(generator(0)))[0, 20].double() / 255
    slope = blurred.diff()
    place = torch.arange(40, dtype=torch.float64)
    mean = (slope * place).sum()
    found = (slope * (place - mean) ** 2).sum().sqrt()
    assert float(slope.sum()) == 1.0
    assert float(found) == pytest.approx(deviation, rel=0.04)  # cut off at 3 deviations


def test_stronger_settings_are_further_from_the_clean_picture() -> None:
    image = smooth()
    plain = degrade(image, DegradationConfig(), generator(0)).float()

    def error(**settings: object) -> float:
        config = DegradationConfig.from_dict({"kind": "bsrgan", **PLAIN, **settings})
        found = [degrade(image, config, generator(seed)).float() for seed in range(8)]
        return float(torch.stack([(f - plain).square().mean() for f in found]).mean())

    none = error()
    assert error(noise=(20.0, 20.0)) > 10 * none
    assert error(jpeg=(5, 5)) > 3 * none
    sharp = speckled(96, 96)
    weak, strong = (
        spread(
            degrade(sharp, DegradationConfig(kind="bsrgan", **{**PLAIN, "blur": b}), generator(2))
        )
        for b in ((0.01, 0.01), (2.0, 2.0))
    )
    assert strong < 0.5 * weak


def test_sides_that_the_factor_does_not_divide_are_told() -> None:
    with pytest.raises(DataError, match="an image of 30x64 cannot be shrunk by 4.*multiples of 4"):
        degrade(speckled(64, 30), DegradationConfig(), generator(0))
    with pytest.raises(DataError, match="multiples of 3"):
        bicubic_down(torch.zeros(1, 3, 32, 33), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1}, "factor: Input should be greater than or equal to 2"),
        ({"factor": 9}, "factor: Input should be less than or equal to 8"),
        ({"blur": (2.0, 1.0)}, r"blur: expected two numbers.*smaller first, got \[2.0, 1.0\]"),
        ({"noise": (0.0, 500.0)}, "noise: expected two numbers from 0.0 to 128.0"),
        ({"jpeg": (0, 95)}, "jpeg: expected two numbers from 1 to 95"),
        ({"noise": (float("nan"), 1.0)}, "noise: expected two numbers"),
        ({"kinds": "bsrgan"}, "did you mean 'kind'"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DegradationConfig.from_dict(settings)


def test_settings_survive_plain_values() -> None:
    config = DegradationConfig(kind="bsrgan", factor=2, noise=(2.0, 25.0))
    assert DegradationConfig.from_dict(config.to_dict()) == config
