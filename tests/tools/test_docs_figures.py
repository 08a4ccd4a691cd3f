"""The figures of the documentation are what the command draws, and small."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tools.docs_figures.__main__ import FIGURES, FOLDER, main
from tools.docs_figures.drawing import webp
from tools.docs_figures.mixture import CENTRES, DEVIATION, Told, denoise, exact


def eighth(picture: Image.Image) -> np.ndarray:
    size = (picture.width // 8, picture.height // 8)
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX), dtype=float)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_is_stored(name: str) -> None:
    drawn = webp(FIGURES[name]())
    assert len(drawn) < 100_000
    stored = Image.open(FOLDER / f"{name}.webp")
    now = Image.open(io.BytesIO(drawn))
    assert now.size == stored.size
    # another processor rounds otherwise: single points move, lines and letters do not
    assert np.abs(eighth(now) - eighth(stored)).mean() < 1.0


def test_every_stored_figure_is_one_of_the_command() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(FIGURES)


def test_an_unknown_figure_is_told_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match="no figure 'sampler'; there are compression, "):
        main(["sampler"])


def test_the_known_denoiser_has_the_least_error() -> None:
    """The mean of what is possible: no other estimate, such as a scaled one, is nearer."""
    x0 = exact(20_000, 0)
    generator = torch.Generator().manual_seed(1)
    sigma = torch.full((len(x0),), 0.7)
    x = x0 + 0.7 * torch.randn(x0.shape, generator=generator)
    told = Told(torch.full((len(x0),), -1))
    estimate = denoise(x.view(-1, 2, 1, 1), sigma, told).flatten(1)
    error = (estimate - x0).square().mean()
    for other in (0.97 * estimate, 1.03 * estimate, estimate + 0.03, 0.9 * estimate + 0.1 * x):
        assert error < (other - x0).square().mean()
    # where there is no noise nothing is guessed, and where there is only noise, the mean is
    still = denoise(x0.view(-1, 2, 1, 1), torch.full((len(x0),), 1e-4), told).flatten(1)
    assert torch.allclose(still, x0, atol=1e-3 * DEVIATION)
    far = denoise(torch.zeros(1, 2, 1, 1), torch.tensor([1e4]), Told(torch.tensor([0])))
    assert torch.allclose(far.flatten().double(), CENTRES[:3].mean(0), atol=1e-4)
