"""Averages over training whose weights are a power of time, and what they have in common.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv
2312.02696), section 3 and appendix C. At step t such an average weighs the step tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t,

so its length, the deviation of p as a share of t, is the same throughout training: ``sigma_rel``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEAST_SIGMA_REL",
    "MOST_SIGMA_REL",
    "Profile",
    "decay_at",
    "expected_error",
    "gamma_of",
    "sigma_rel_of",
    "solve_weights",
]

LEAST_SIGMA_REL = 1e-3
MOST_SIGMA_REL = 12**-0.5  # gamma = 0: every step weighs the same


@dataclass(frozen=True)
class Profile:
    """What an average holds: the steps before ``step``, weighed by a power of time.

    Attributes:
        step: t, the last step that it holds; above 0.
        sigma_rel: Its length as a share of t.
    """

    step: float
    sigma_rel: float


def sigma_rel_of(gamma: float) -> float:
    """Return the relative length of a power function (EDM2, eq. 123).

    Example:
        >>> round(sigma_rel_of(6.94), 4), round(sigma_rel_of(0.0), 4)
        (0.1, 0.2887)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """Return the power of the average of a relative length (EDM2, eq. 126), in closed form.

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s with s = sigma_rel^-2,
    which has three real ones.

    Args:
        sigma_rel: Above 0, at most `MOST_SIGMA_REL`.

    Example:
        >>> round(gamma_of(0.05), 2), round(gamma_of(0.10), 2)
        (16.97, 6.94)
    """
    assert 0 < sigma_rel <= MOST_SIGMA_REL
    s = sigma_rel**-2
    # gamma = x - 7/3 leaves x^3 + p x + q, whose largest root is a cosine
    p = 16 - s - 49 / 3
    q = 2 * 343 / 27 - 7 * (16 - s) / 3 + 12 - s
    cosine = 3 * q / (2 * p) * math.sqrt(-3 / p)
    x = 2 * math.sqrt(-p / 3) * math.cos(math.acos(max(-1.0, min(1.0, cosine))) / 3)
    return max(0.0, x - 7 / 3)


def decay_at(step: int, gamma: float) -> float:
    """Return beta, the decay of a tracked average at its t-th step (EDM2, eq. 127); 0 at first."""
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def solve_weights(profiles: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Return by what averages are multiplied so that their sum is nearest to another one.

    Nearest is the sum whose profile has the least squared difference (EDM2, algorithm 3) among
    those whose weights add up to 1. That leaves alone what does not move in training, as every
    average does; the paper solves without this condition, and scales the weights afterwards.

    Args:
        profiles: Of the averages that there are; no two alike.
        wanted: Of the average that is looked for.

    Returns:
        ``(N,)``, one per profile.
    """
    count, unit = len(profiles), wanted.step
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = unit * _products(profiles, profiles)
    system[count, count] = 0.0
    right = np.append(unit * _products(profiles, [wanted])[:, 0], 1.0)
    solved, *_ = np.linalg.lstsq(system, right, rcond=None)
    return solved[:count].astype(np.float64)


def expected_error(
    profiles: Sequence[Profile], wanted: Profile, weights: NDArray[np.float64]
) -> float:
    """Return how far a weighted sum of averages would be from another one in a random walk.

    Args:
        profiles: Of the averages.
        wanted: Of the other one.
        weights: ``(N,)``, which add up to 1.

    Returns:
        The root of the mean squared distance, as a share of that from the other average to the
        point where it ends.
    """
    both = [*profiles, wanted]
    # in a walk of steps dW an average is its end less the sum of P dW, P being p summed up
    end = max(profile.step for profile in both)
    difference = np.append(weights, -1.0)
    apart = float(difference @ _summed_products(both, end) @ difference)
    way = wanted.step / (2 * gamma_of(wanted.sigma_rel) + 3)
    return math.sqrt(max(0.0, apart) / way)


def _products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """The inner products of profiles (EDM2, eq. 151), ``(len(a), len(b))``, per step."""
    t_a, power_a, t_b, power_b = _grid(a, b)
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    # of what ends later, the part before the earlier end counts
    share = (earlier / later) ** (np.where(t_a < t_b, power_b, power_a) - 1)
    return power_a * power_b / (power_a + power_b - 1) * share / later


def _summed_products(a: Sequence[Profile], end: float) -> NDArray[np.float64]:
    """The inner products until ``end`` of profiles summed up, min(1, (tau / t)^(gamma + 1))."""
    t_a, power_a, t_b, power_b = _grid(a, a)
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    power = np.where(t_a < t_b, power_b, power_a)  # of what ends later
    ratio = earlier / later
    rising = earlier * ratio**power / (power_a + power_b + 1)
    one_is_full = later * (1 - ratio ** (power + 1)) / (power + 1)
    return rising + one_is_full + end - later


def _grid(a: Sequence[Profile], b: Sequence[Profile]) -> tuple[NDArray[np.float64], ...]:
    """Ends and gamma + 1 of one down the rows, and of the other along the columns."""
    (t_a, power_a), (t_b, power_b) = (
        np.array([(p.step, gamma_of(p.sigma_rel) + 1) for p in profiles]).T for profiles in (a, b)
    )
    return t_a[:, None], power_a[:, None], t_b[None], power_b[None]
