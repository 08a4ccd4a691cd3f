"""Time embeddings by closed form."""

import math

import pytest
import torch

from mezzotint.nn.embeddings import TimestepEmbedding, timestep_embedding


@pytest.mark.parametrize("t", [0.0, 1.0, 17.25, 999.0])
def test_each_frequency(t: float) -> None:
    embedding = timestep_embedding(torch.tensor([t]), 8)[0]
    for k in range(4):
        angle = t * 10_000 ** (-k / 4)
        # the angle itself is rounded to float32, an absolute error of 999 * 2**-24 at most
        assert embedding[k] == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[4 + k] == pytest.approx(math.sin(angle), abs=1e-4)


def test_ho_et_al_end_at_the_longest_period_and_begin_with_sines() -> None:
    t = torch.tensor([1000.0])
    embedding = timestep_embedding(t, 8, flip_sin_to_cos=False, freq_shift=1)[0]
    assert embedding[3] == pytest.approx(math.sin(0.1), abs=1e-5)
    assert embedding[7] == pytest.approx(math.cos(0.1), abs=1e-5)


def test_whole_and_fractional_times_agree_and_an_odd_width_ends_in_zero() -> None:
    whole = timestep_embedding(torch.tensor([3, 500]), 9)
    assert torch.equal(whole, timestep_embedding(torch.tensor([3.0, 500.0]), 9))
    assert whole.shape == (2, 9)
    assert whole[:, -1].abs().max() == 0


def test_a_condition_is_added_before_the_layers() -> None:
    mlp = TimestepEmbedding(4, 8, condition_dim=3)
    x, condition = torch.randn(2, 4), torch.randn(2, 3)
    assert mlp.cond_proj is not None
    assert torch.allclose(mlp(x, condition), mlp(x + condition @ mlp.cond_proj.weight.T))
