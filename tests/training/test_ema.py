"""Averages of weights against their closed forms, and diffusers'."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mezzotint.training.ema import (
    ConstantEMAConfig,
    ExponentialMovingAverage,
    InverseGammaEMAConfig,
    PowerEMAConfig,
    WarmupEMAConfig,
)
from mezzotint.training.power_function import decay_at, gamma_of, sigma_rel_of
from mezzotint.training.snapshots import save_snapshot

POWER = PowerEMAConfig(sigma_rel=(0.05, 0.10, 0.25))


def walk(ema: ExponentialMovingAverage, module: nn.Module, steps: int, seed: int = 0):
    """Move a module at random and average it; what it was after each step."""
    generator = torch.Generator().manual_seed(seed)
    visited = []
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        ema.update()
        visited.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return torch.stack(visited)


def flat(average: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in average.values()])


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (ConstantEMAConfig(decay=0.9), lambda n: 0.9),
        (WarmupEMAConfig(decay=0.9), lambda n: min(0.9, (1 + n) / (10 + n))),
    ],
)
def test_follows_its_definition(config, decay):
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = ExponentialMovingAverage(module, config)
    expected = 0.0
    for n in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(float(n))
        ema.update()
        expected = decay(n) * expected + (1 - decay(n)) * n
    torch.testing.assert_close(ema.average["weight"], torch.full((1, 2), expected))


@pytest.mark.parametrize(("inverse_gamma", "power"), [(1.0, 2 / 3), (5.0, 0.75)])
def test_inverse_gamma_is_that_of_diffusers(inverse_gamma, power):
    module = nn.Linear(3, 2)
    config = InverseGammaEMAConfig(decay=0.95, inverse_gamma=inverse_gamma, power=power)
    ema = ExponentialMovingAverage(module, config)
    theirs = EMAModel(
        module.parameters(), decay=0.95, use_ema_warmup=True, inv_gamma=inverse_gamma, power=power
    )
    for seed in range(300):
        walk(ema, module, 1, seed)
        theirs.step(module.parameters())
    # of order 10; the update is written in another way, which rounds otherwise
    torch.testing.assert_close(
        list(ema.average.values()), list(theirs.shadow_params), rtol=1e-5, atol=1e-5
    )


def test_powers_are_those_of_the_paper():
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)  # EDM2, section 3.2
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(12**-0.5) == pytest.approx(0.0, abs=1e-6)
    for sigma_rel in (0.001, 0.01, 0.05, 0.1, 0.2, 0.28):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    for gamma in (0.5, 3.0, 6.94, 16.97, 500.0):
        assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9)


def test_power_functions_weigh_what_was_seen_by_a_power_of_time():
    """Step k of n weighs (k/n)^(gamma+1) - ((k-1)/n)^(gamma+1): the start itself, nothing."""
    module = nn.Linear(4, 4).double()
    ema = ExponentialMovingAverage(module, POWER)
    visited = walk(ema, module, 300)
    ends = torch.arange(301, dtype=torch.float64) / 300
    for sigma_rel, average in zip(POWER.sigma_rel, ema.averages, strict=True):
        weights = (ends ** (gamma_of(sigma_rel) + 1)).diff()
        assert average["weight"].dtype == torch.float64
        torch.testing.assert_close(flat(average), weights @ visited, rtol=1e-10, atol=1e-10)
        # and so they have the relative length that they are named by
        places = (ends[1:] + ends[:-1]) / 2
        mean = weights @ places
        spread = (weights @ (places - mean) ** 2).sqrt()
        assert float(spread) == pytest.approx(sigma_rel, rel=1e-3)
    assert decay_at(1, 6.94) == 0.0


def test_uniform_weights_are_the_mean():
    module = nn.Linear(2, 2).double()
    ema = ExponentialMovingAverage(module, PowerEMAConfig(sigma_rel=(12**-0.5,)))
    visited = walk(ema, module, 50)
    torch.testing.assert_close(flat(ema.average), visited.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_averages_are_float32_or_wider(dtype, kept):
    module = nn.Linear(3, 3).to(dtype)
    ema = ExponentialMovingAverage(module, ConstantEMAConfig(decay=0.999))
    assert all(t.dtype == kept for t in ema.average.values())
    before = ema.average["weight"].clone()
    with torch.no_grad():
        module.weight.add_(0.5)
    ema.update()
    # a step of 1/1000 of the way, which bfloat16 could not take from weights near 1
    torch.testing.assert_close(
        ema.average["weight"] - before,
        (module.weight.detach().to(kept) - before) / 1000,
        rtol=1e-3,
        atol=1e-7,
    )


def test_distance_tells_whether_the_average_moves():
    module = nn.Linear(3, 3, bias=False)
    ema = ExponentialMovingAverage(module, ConstantEMAConfig(decay=0.5))
    assert ema.distance() == 0.0
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.mul_(3.0)
    assert ema.distance() == pytest.approx(2 / 3)  # |w - 3w| / |3w|
    ema.update()
    torch.testing.assert_close(ema.average["weight"], 2.0 * start)
    assert ema.distance() == pytest.approx(1 / 3)


def test_an_average_of_parameters_that_were_replaced_is_noticed():
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, ConstantEMAConfig())
    module.weight = nn.Parameter(torch.zeros(3, 3))
    for use in (ema.distance, ema.state_dict, lambda: ema.applied().__enter__()):
        with pytest.raises(AssertionError, match="replaced"):
            use()


def test_applied_is_undone_even_after_an_error():
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, POWER)
    walk(ema, module, 5)
    live = module.weight.detach().clone()
    try:
        with ema.applied():
            assert torch.equal(module.weight, ema.averages[0]["weight"])
            assert not torch.equal(module.weight, ema.averages[1]["weight"])
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(module.weight, live)


def test_overwritten_rows_are_taken_as_they_are():
    module = nn.Embedding(4, 3)
    ema = ExponentialMovingAverage(module, POWER)
    walk(ema, module, 5)
    before = [average["weight"].clone() for average in ema.averages]
    dead = torch.tensor([False, True, False, True])
    ema.overwrite("weight", dead)
    for average, old in zip(ema.averages, before, strict=True):
        assert torch.equal(average["weight"][dead], module.weight.detach()[dead])
        assert torch.equal(average["weight"][~dead], old[~dead])
    assert ema.overwritten == {"weight": 5}


@pytest.mark.parametrize("config", [WarmupEMAConfig(decay=0.9), POWER])
def test_going_on_from_a_state_equals_going_on(config):
    torch.manual_seed(0)
    whole, part = nn.Embedding(4, 3), nn.Embedding(4, 3)
    ema = ExponentialMovingAverage(whole, config)
    walk(ema, whole, 7)
    ema.overwrite("weight", torch.tensor([True, False, False, False]))
    state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    part.load_state_dict(whole.state_dict())
    resumed = ExponentialMovingAverage(part, config)
    resumed.load_state_dict(state)
    walk(ema, whole, 5, seed=1)
    walk(resumed, part, 5, seed=1)
    assert resumed.updates == 12
    one, other = ema.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys() and len(one) == len(ema.averages) + 2
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_states_of_before_there_were_profiles_are_read():
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, WarmupEMAConfig(decay=0.9))
    old = {"weight": torch.ones(3, 3), "bias": torch.zeros(3), "updates": torch.tensor(40)}
    ema.load_state_dict(old)
    assert ema.updates == 40 and torch.equal(ema.average["weight"], old["weight"])
    assert ema.state_dict().keys() == old.keys()


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_are_averaged_and_stored_alike(tmp_path):
    torch.manual_seed(0)
    plain, sharded = nn.Linear(4, 4), nn.Linear(4, 4)
    sharded.load_state_dict(plain.state_dict())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        one = ExponentialMovingAverage(plain, POWER)
        other = ExponentialMovingAverage(sharded, POWER)
        for k in range(5):
            with torch.no_grad():
                for p in (*plain.parameters(), *sharded.parameters()):
                    p.mul_(1.0 + 0.1 * k)
            one.update()
            other.update()
        assert one.distance() == pytest.approx(other.distance(), rel=1e-6) and one.distance() > 0
        for name, tensor in other.state_dict().items():
            gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(gathered, one.state_dict()[name]), name
        files = [save_snapshot(ema, tmp_path / str(k)) for k, ema in enumerate((one, other))]
        assert files[0].read_bytes() == files[1].read_bytes()
        with other.applied():
            for p, q in zip(sharded.parameters(), one.average.values(), strict=True):
                assert torch.equal(p.full_tensor(), q)
    finally:
        distributed.destroy_process_group()
