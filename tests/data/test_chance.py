import numpy as np
import pytest
import torch

from mezzotint.data.chance import Chance


def chance(seed: int = 0) -> Chance:
    return Chance(torch.Generator().manual_seed(seed))


def test_draws_follow_their_generator_alone() -> None:
    def some(c: Chance) -> list[object]:
        return [c.share(), c.uniform(-3, 5), c.ratio(0.5, 2), c.whole(2, 9), c.choose("abcdef"),
                c.happens(0.5), c.order(range(9))]  # fmt: skip

    first = some(chance(4))
    torch.manual_seed(1), np.random.seed(1)
    assert some(chance(4)) == first != some(chance(5))


def test_numbers_lie_within_their_bounds_and_reach_them() -> None:
    c = chance()
    wholes = [c.whole(2, 5) for _ in range(200)]
    assert set(wholes) == {2, 3, 4, 5}
    uniform = [c.uniform(-1.0, 3.0) for _ in range(500)]
    assert -1.0 <= min(uniform) < -0.9 and 2.9 < max(uniform) <= 3.0
    # of a logarithm that is uniform, half lies below the geometric mean
    below = np.mean([c.ratio(1.0, 100.0) < 10.0 for _ in range(500)])
    assert below == pytest.approx(0.5, abs=0.09)  # 4 standard deviations


def test_weights_decide_how_often() -> None:
    c = chance()
    drawn = [c.choose("abc", (1.0, 0.0, 3.0)) for _ in range(600)]
    assert "b" not in drawn
    assert drawn.count("c") / 600 == pytest.approx(0.75, abs=0.075)  # 4 standard deviations
    assert sorted(c.order(range(20))) == list(range(20))
