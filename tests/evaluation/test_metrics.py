"""Measures against closed forms."""

import math

import torch

from mezzotint.evaluation.metrics import image_features, psnr, retrieval, shifted_psnr
from mezzotint.models.features import load_features


def test_psnr_of_a_constant_error():
    """An error of 0.2 on a range of 2 is 20 log10(10) dB."""
    a = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(psnr(a + 0.2, a), torch.full((3,), 20.0, dtype=torch.float64))
    assert math.isinf(float(psnr(a, a)[0]))


def test_a_shift_within_reach_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((1, 3, 32, 32), 1.0)
    picture[..., 10:20, 10:20] = torch.rand(1, 3, 10, 10, generator=generator)
    moved = picture.roll((2, -1), dims=(2, 3))
    assert float(psnr(moved, picture)) < 25
    assert math.isinf(float(shifted_psnr(moved, picture, reach=2)))
    assert math.isfinite(float(shifted_psnr(moved, picture, reach=1)))


def test_retrieval_finds_the_nearest_direction():
    candidates = torch.eye(4)
    found = retrieval(torch.tensor([[0.1, 3.0, 0.2, 0.0], [0.0, 0.0, 0.1, 0.2]]), candidates)
    assert found.tolist() == [1, 3]


def test_features_do_not_depend_on_the_batch():
    network = load_features("mobilenet-v2")
    images = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = image_features(network, images), image_features(network, images, batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
