"""The moving average against its closed form."""

import torch
from torch import nn

from mezzotint.training.ema import ExponentialMovingAverage


def test_follows_its_definition():
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = ExponentialMovingAverage(module, 0.9)
    expected = 0.0
    for n in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    torch.testing.assert_close(ema.average["weight"], torch.full((1, 2), expected))


def test_applied_is_undone_even_after_an_error():
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, 0.5)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    live = module.weight.detach().clone()
    try:
        with ema.applied():
            assert torch.equal(module.weight, before)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(module.weight, live)


def test_state_round_trip():
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, 0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update()
    other = ExponentialMovingAverage(nn.Linear(3, 3), 0.5)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert torch.equal(other.average["weight"], ema.average["weight"])
