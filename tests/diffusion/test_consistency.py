"""The consistency function's ends, and the times that it is asked at."""

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.consistency import ConsistencyFunction
from mezzotint.diffusion.flow import FlowSchedule, FlowScheduleConfig
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mezzotint.errors import RequestError

DISCRETE, FLOW = NoiseSchedule(ScheduleConfig()), FlowSchedule(FlowScheduleConfig(shift=3.0))


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
def test_it_is_its_input_at_the_first_time_and_the_estimate_from_then_on(schedule) -> None:
    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 7.0)

    function = ConsistencyFunction(estimate, schedule)
    x = torch.randn(4, 2, 3, 3)
    sigma = schedule.t_to_sigma(torch.tensor([0.0, 1.0, 20.0, 999.0])).float()
    found = function(x, sigma)
    seen = x * schedule.input_scale(sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(found[0], seen[0])
    # at t = 1, s = 10: 0.25 / 100.25 of the input, 10 / sqrt(100.25) of the estimate
    torch.testing.assert_close(found[1], 0.0024938 * seen[1] + 0.9987523 * 7.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2:], torch.full_like(x[2:], 7.0), rtol=1e-4, atol=0)


def test_times_of_the_distillation() -> None:
    """The skipping step is 20 of 1000 times; few steps take of these, from the last down."""
    times = DISCRETE.distilled_times()
    assert times.tolist() == [0, *range(19, 1000, 20)]
    levels = SAMPLERS["lcm"].sigmas(DISCRETE, 4)
    assert DISCRETE.sigma_to_t(levels[:-1]).tolist() == [999, 759, 499, 259]
    assert levels[-1] == 0
    assert torch.equal(
        SAMPLERS["lcm"].sigmas(DISCRETE, 50)[:-1],
        DISCRETE.t_to_sigma(times[1:].flip(0)).float(),
    )
    few = NoiseSchedule(ScheduleConfig(num_train_timesteps=30))
    assert few.distilled_times().tolist() == [0, *range(30)]


def test_times_of_the_distillation_of_a_flow() -> None:
    plain = FlowSchedule(FlowScheduleConfig())
    assert plain.distilled_times()[[0, 1, 50]].tolist() == [0, 20, 1000]
    # shifted by 3, the middle is at 3/4
    assert FLOW.distilled_times()[25] == pytest.approx(750)
    torch.testing.assert_close(
        SAMPLERS["lcm"].sigmas(plain, 2), torch.tensor([4096.0, 1.0, 0.0]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
def test_more_steps_than_were_distilled_are_refused(schedule) -> None:
    with pytest.raises(RequestError, match="steps: must be from 1 to 50, got 51"):
        SAMPLERS["lcm"].sigmas(schedule, 51)
    assert len(SAMPLERS["lcm"].sigmas(schedule, 51, "karras")) == 52
