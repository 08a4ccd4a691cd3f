"""Which times are trained."""

import math
from statistics import NormalDist

import pytest
import torch

from mezzotint.diffusion.flow import FlowSchedule, FlowScheduleConfig
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mezzotint.diffusion.times import LogitNormalTimesConfig, UniformTimesConfig, draw_time
from mezzotint.errors import ConfigError
from mezzotint.rng import keyed_generator

COUNT = 4000
ALLOWED = 4 * 0.5 / math.sqrt(COUNT)  # four standard deviations of a share


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_uniform_times_of_a_discrete_schedule_are_drawn_as_ever() -> None:
    """Their stream is a promise: a run that was stopped goes on with the same times."""
    schedule = NoiseSchedule(ScheduleConfig())
    for key in range(20):
        expected = int(torch.randint(1000, (1,), generator=keyed_generator(key)))
        drawn = draw_time(UniformTimesConfig(), schedule, keyed_generator(key))
        assert drawn == expected and isinstance(drawn, int)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_uniform_times_of_a_flow_are_shifted(shift: float) -> None:
    schedule, source = FlowSchedule(FlowScheduleConfig(shift=shift)), generator()
    times = torch.tensor([draw_time(UniformTimesConfig(), schedule, source) for _ in range(COUNT)])
    assert bool(((times >= 0) & (times <= 1000)).all())
    for share in (0.1, 0.5, 0.9):
        below = 1000 * shift * share / (1 + (shift - 1) * share)
        assert (times < below).float().mean().item() == pytest.approx(share, abs=ALLOWED)


@pytest.mark.parametrize("kind", ["flow", "discrete"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-0.5, 1.5)])
def test_logit_normal_times_have_their_distribution(kind: str, mean: float, std: float) -> None:
    discrete = NoiseSchedule(ScheduleConfig())
    schedule = discrete if kind == "discrete" else FlowSchedule(FlowScheduleConfig())
    config, source = LogitNormalTimesConfig(mean=mean, std=std), generator()
    times = torch.tensor([float(draw_time(config, schedule, source)) for _ in range(COUNT)])
    for part in (0.1, 0.3, 0.5, 0.8, 0.95):
        share = NormalDist(mean, std).cdf(math.log(part / (1 - part)))
        assert (times < 1000 * part).float().mean().item() == pytest.approx(share, abs=ALLOWED)
    assert bool((times == times.floor()).all()) == (kind == "discrete")
    assert bool(((times >= 0) & (times <= 1000 - (kind == "discrete"))).all())


@pytest.mark.parametrize(("mean", "std"), [(-5.0, 1.0), (0.0, 0.5), (-1.0, 1.0)])
def test_times_that_never_reach_the_noise_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ConfigError, match="of the training is at the last tenth of the times"):
        LogitNormalTimesConfig.from_dict({"mean": mean, "std": std})


def test_a_quantile_stays_within_the_schedule() -> None:
    short = NoiseSchedule(ScheduleConfig(num_train_timesteps=10))
    assert [short.quantile(u) for u in (0.0, 0.05, 0.55, 0.999, 1.0)] == [0, 0, 5, 9, 9]
