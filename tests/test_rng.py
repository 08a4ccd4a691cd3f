"""Noise depends on its key alone."""

import itertools
import math

import pytest
import torch

from mezzotint.rng import INITIAL, SampleNoise, VariedNoise, keyed_generator, mix, slerp

SHAPE = (4, 8, 8)


def test_image_k_is_the_image_alone() -> None:
    batch = SampleNoise([7, 8, 9]).normal(SHAPE, step=3, draw=1)
    assert batch.shape == (3, *SHAPE)
    assert batch.dtype == torch.float32
    for k, seed in enumerate((7, 8, 9)):
        assert torch.equal(batch[k], SampleNoise([seed]).normal(SHAPE, step=3, draw=1)[0])


def test_no_stream_advances() -> None:
    noise = SampleNoise([5])
    first = noise.normal(SHAPE, step=2)
    noise.normal(SHAPE, step=0)
    assert torch.equal(noise.normal(SHAPE, step=2), first)


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    SampleNoise([1]).normal(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_default_step_is_the_start() -> None:
    noise = SampleNoise([5])
    assert torch.equal(noise.normal(SHAPE), noise.normal(SHAPE, step=INITIAL))
    assert not torch.equal(noise.normal(SHAPE), noise.normal(SHAPE, step=0))


def test_different_keys_are_uncorrelated() -> None:
    """Neighbouring seeds, steps and draws: 40 streams of 4,096 numbers each."""
    streams = torch.stack(
        [
            SampleNoise([seed]).normal((4096,), step=step, draw=draw)[0]
            for seed, step, draw in itertools.product(range(5), range(-1, 3), range(2))
        ]
    )
    correlations = torch.corrcoef(streams) - torch.eye(40)
    # 780 pairs of standard deviation 1/64: five of them come by chance once in 2,000 tries
    assert correlations.abs().max() < 5 / 64


def test_noise_is_standard_normal() -> None:
    noise = SampleNoise(range(16)).normal((4096,)).double()
    count = noise.numel()
    # five standard deviations of each moment's estimate
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs((noise**2).mean() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5


def test_mix_is_frozen() -> None:
    """Seeds are written into pictures, so what a key gives must never change."""
    assert mix() == 0x9E3779B97F4A7C15 >> 1
    assert mix(0) == 0x373C4F3550DCB2FA
    assert mix(1, 2, 3) == 0x2467A8145B6F886D
    drawn = torch.randn(3, generator=keyed_generator(1, 2, 3))
    torch.testing.assert_close(drawn, torch.tensor([0.150433, 2.102037, -0.292838]))


def test_mix_tells_keys_apart() -> None:
    keys = list(itertools.product(range(20), range(-1, 30), range(3)))
    # a CPU generator looks at 32 bits of its seed
    assert len({mix(*key) & 0xFFFFFFFF for key in keys}) == len(keys)
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0)


@pytest.mark.parametrize("key", [-1, 2**64 - 1, 2**63, 2**70])
def test_any_integer_is_a_key(key: int) -> None:
    assert 0 <= mix(key) < 2**63
    keyed_generator(key)


def test_slerp_keeps_both_ends_exactly_and_the_angle_evenly() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    third = torch.tensor([math.sqrt(3.0), 1.0])  # 30 of 90 degrees
    torch.testing.assert_close(slerp(a, b, 1 / 3), third)
    assert torch.equal(slerp(a, a, 0.3), a)


def test_varied_noise_turns_the_start_alone_and_sample_by_sample() -> None:
    plain, other = SampleNoise([7, 7]), SampleNoise([3, 4])
    varied = VariedNoise([7, 7], [3, 4], 0.25)
    shape = (2, 16, 16)
    start = varied.normal(shape)
    assert torch.equal(start[1], slerp(plain.normal(shape)[1], other.normal(shape)[1], 0.25))
    assert torch.equal(varied.normal(shape, step=2), plain.normal(shape, step=2))
    assert abs(float(start.std()) - 1.0) < 0.1  # 1024 draws of two seeds: three deviations
