"""On what a batch is drawn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mezzotint.conditioning.spatial import LowResConditioner, LowResConditionerConfig
from mezzotint.errors import RequestError
from mezzotint.generation.canvas import Canvas, lay_out
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.request import GenerationRequest
from mezzotint.latent_diffusion import LatentDiffusion


def test_a_picture_of_odd_sides_is_enlarged_alike_once_its_size_is_recorded(tmp_path: Path) -> None:
    """A request that was carried out says the size, which f need not divide."""
    Image.effect_noise((15, 16), 60).convert("RGB").save(tmp_path / "small.png")
    pictures = InputPictures()
    image = pictures.add(tmp_path / "small.png")
    spatial = LowResConditioner(LowResConditionerConfig(fold=2))
    model: Any = SimpleNamespace(
        first_stage=SimpleNamespace(factor=4, latent_channels=3), conditioner=spatial
    )
    model.latent_shape = lambda height, width: LatentDiffusion.latent_shape(model, height, width)

    def laid_out(**size: int) -> Canvas:
        request = GenerationRequest(task="super-resolution", image=image, **size)
        return lay_out(model, [request], pictures)

    first, again = laid_out(), laid_out(width=30, height=32)
    for canvas in (first, again):
        assert (canvas.width, canvas.height) == (30, 32)
        assert (canvas.drawn_width, canvas.drawn_height) == (32, 32)
    assert first.low_res is not None and again.low_res is not None
    assert torch.equal(first.low_res, again.low_res)
    other = laid_out(width=64)
    assert other.low_res is not None and other.low_res.shape[2:] == (16, 32)
    with pytest.raises(RequestError, match="width 31 is not divisible by f = 4"):
        laid_out(width=31)
