"""Packed layers are the plain ones: in what they compute, hold, save, copy and become."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.nn.attention import GEGLU
from mezzotint.nn.packed import (
    PackedConv2d,
    PackedGEGLU,
    PackedHalves,
    PackedLinear,
    PackedUpsample,
    WinogradConv2d,
    is_packed,
    pack,
    weight_shape,
)
from mezzotint.nn.resnet import Upsample

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(32, 40, 3, padding=1), (2, 32, 9, 7)),
    "1x1": (lambda: nn.Conv2d(64, 64, 1), (2, 64, 5, 5)),
    "stride": (lambda: nn.Conv2d(32, 24, 3, stride=2, padding=1), (1, 32, 9, 8)),
    "unpadded": (lambda: nn.Conv2d(32, 24, 3, stride=2, bias=False), (1, 32, 9, 8)),
    "groups": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4), (1, 64, 6, 6)),
    "circular": (
        lambda: nn.Conv2d(32, 40, 3, padding=1, padding_mode="circular"),
        (1, 32, 6, 5),
    ),
    "linear": (lambda: nn.Linear(70, 130), (3, 7, 70)),
    "linear without bias": (lambda: nn.Linear(96, 64, bias=False), (5, 96)),
    "upsampling": (lambda: Upsample(32), (2, 32, 5, 6)),
    "gate": (lambda: GEGLU(70, 96), (3, 7, 70)),
}
KINDS = (PackedConv2d, PackedGEGLU, PackedLinear, PackedUpsample)
ROUND_OTHERWISE = ("upsampling", "gate")


def inner(layer: nn.Module) -> Any:
    """The layer that has the weight."""
    return next((child for child in layer.children()), layer)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    return nn.Sequential(make()).to(dtype).eval(), draw(*shape).to(dtype)


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_float32_is_the_plain_layer_s_to_the_order_of_its_sums(name: str) -> None:
    network, x = build(name)
    plain = network(x)
    pack(network, torch.float32)
    assert isinstance(network[0], KINDS)
    assert torch.allclose(network(x), plain, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ROUND_OTHERWISE])
@torch.no_grad()
def test_bfloat16_is_the_plain_layer_s_to_the_last_bit_but_for_near_ties(name: str) -> None:
    network, x = build(name, torch.bfloat16)
    plain = network(x)
    pack(network, torch.bfloat16)
    packed = network(x)
    assert packed.dtype is torch.bfloat16
    # float32 sums in another order fall now and then on the other side of a rounding
    assert (packed != plain).float().mean() < 0.01
    assert torch.allclose(packed, plain, atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize(("name", "most"), [("upsampling", 1.5), ("gate", 0.95)])
@torch.no_grad()
def test_what_is_rounded_otherwise_is_as_near_to_the_exact_result(name: str, most: float) -> None:
    """Doubling rounds sums of weights once more; a gate rounds less than the plain layer."""
    network, x = build(name, torch.bfloat16)
    exact = copy.deepcopy(network).double()(x.double())
    plain = (network(x).double() - exact).norm()
    pack(network, torch.bfloat16)
    assert network(x).dtype is torch.bfloat16
    assert (network(x).double() - exact).norm() < most * plain


@torch.no_grad()
def test_what_acts_on_a_gate_s_linear_layer_acts() -> None:
    network, x = build("gate")
    pack(network, torch.float32)
    halves = network[0].proj
    assert isinstance(halves, PackedHalves)
    value, gate = halves(x).chunk(2, dim=-1)
    gelu = nn.functional.gelu
    assert torch.allclose(network(x), value * gelu(gate), atol=1e-5)
    handle = halves.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.allclose(network(x), (value + 1) * gelu(gate + 1), atol=1e-5)
    handle.remove()
    handle = halves.register_forward_pre_hook(lambda module, inputs: (0 * inputs[0],))
    first, second = halves.bias.chunk(2)
    assert torch.allclose(network(x), (first * gelu(second)).expand(3, 7, 96), atol=1e-5)
    handle.remove()
    halves.forward = lambda input: torch.ones(3, 7, 192)
    assert torch.allclose(network(x), gelu(torch.ones(3, 7, 96)), atol=1e-5)
    del halves.forward
    halves.weight = nn.Parameter(0 * halves.weight)
    assert torch.allclose(network(x), (first * gelu(second)).expand(3, 7, 96), atol=1e-5)
    assert type(network[0]) is GEGLU


@pytest.mark.parametrize("size", [(9, 12), (10, 11)])
@torch.no_grad()
def test_upsampling_to_an_odd_size_goes_the_plain_way(size: tuple[int, int]) -> None:
    network, x = build("upsampling")
    plain = network[0](x, None, size)
    pack(network, torch.float32)
    assert torch.allclose(network[0](x, None, size), plain, atol=1e-5)
    assert torch.allclose(network[0](x, None, (10, 12)), network[0](x), atol=1e-5)


@torch.no_grad()
def test_what_acts_on_an_upsampling_s_convolution_acts() -> None:
    network, x = build("upsampling")
    pack(network, torch.float32)
    plain = network(x)
    convolution = network[0].conv
    handle = convolution.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.allclose(network(x), plain + 1, atol=1e-5)
    handle.remove()
    convolution.padding_mode = "circular"
    wrapped = network(x)
    assert torch.allclose(wrapped[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1], atol=1e-5)
    assert not torch.allclose(wrapped, plain, atol=1e-2)
    convolution.padding_mode = "zeros"
    convolution.weight = nn.Parameter(2 * convolution.weight)
    doubled = network(x)
    assert not torch.allclose(doubled, plain, atol=1e-2)
    pack(network, torch.float32)  # anew, of the other weight
    assert torch.allclose(network(x), doubled, atol=1e-5)
    assert isinstance(network[0].conv, PackedConv2d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_states_copies_and_pickles_are_the_plain_layer_s(name: str, dtype: torch.dtype) -> None:
    network, x = build(name, dtype)
    plain, state = network(x), copy.deepcopy(network.state_dict())
    pack(network, dtype)
    assert equal_states(network.state_dict(), state)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert not any(isinstance(module, KINDS) for module in other.modules())
        assert [n for n, _ in other.named_parameters()] == list(state)
        assert torch.equal(other(x), plain)
    assert isinstance(network[0], KINDS)  # still


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_wider_weights_are_kept_as_they_are(name: str) -> None:
    network, x = build(name)
    state = copy.deepcopy(network.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        plain = network(x)
        pack(network, torch.bfloat16)
        packed = network(x)
    assert packed.dtype is plain.dtype is torch.bfloat16
    assert (packed.float() - plain.float()).norm() < 0.01 * plain.float().norm()
    assert equal_states(network.state_dict(), state)
    network.train()
    assert equal_states(dict(network.named_parameters()), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.train(),
        lambda network: network.to(torch.float64),
        lambda network: network.load_state_dict(network.state_dict()),
        lambda network: [
            setattr(layer, "weight", nn.Parameter(layer.weight))
            for layer in list(network.modules())
            if isinstance(layer, PackedConv2d | PackedLinear)
        ],
    ],
    ids=["train", "to", "load_state_dict", "weight ="],
)
@pytest.mark.parametrize("name", ["3x3", "linear", "upsampling", "gate"])
def test_what_changes_a_layer_makes_it_plain(name: str, change: Any) -> None:
    network, x = build(name)
    plain, state = network(x), copy.deepcopy(network.state_dict())
    pack(network, torch.float32)
    layer = inner(network[0])
    change(network)
    assert type(layer) in (nn.Conv2d, nn.Linear)
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight.float(), next(iter(state.values())))
    assert torch.allclose(network(x.to(layer.weight.dtype)).float(), plain, atol=1e-5)
    # at that call upsampling lets go of what it had packed
    assert type(network[0]) in (nn.Conv2d, nn.Linear, Upsample, GEGLU)
    assert not is_packed(network)
    assert set(vars(network[0])) == set(vars(build(name)[0][0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.bias.fill_(3.0),
        lambda layer: setattr(layer.bias, "data", torch.ones_like(layer.bias)),
        lambda layer: setattr(layer, "bias", nn.Parameter(-layer.bias)),
        lambda layer: setattr(layer, "bias", None),
    ],
    ids=["in place", "data", "bias =", "none"],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["3x3", "linear", "upsampling", "gate"])
@torch.no_grad()
def test_a_changed_bias_counts(name: str, precision: torch.dtype, change: Any) -> None:
    network, x = build(name)
    plain = copy.deepcopy(network)
    pack(network, precision)
    for one in (network, plain):
        change(inner(one[0]))
    assert is_packed(network)
    atol = 1e-5 if precision is torch.float32 else 0.05
    assert torch.allclose(network(x).float(), plain(x), atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_input_are_the_plain_layer_s(name: str) -> None:
    gradients: list[Tensor] = []
    network, x = build(name)
    for _ in range(2):
        x.requires_grad_().grad = None
        network(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        pack(network, torch.float32)
    assert isinstance(network[0], KINDS)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_of_weights_are_known_without_unpacking(name: str) -> None:
    network, _ = build(name)
    layer = inner(network[0])
    shape = layer.weight.shape
    assert weight_shape(layer) == tuple(shape)
    pack(network, torch.float32)
    assert weight_shape(layer) == tuple(shape) == tuple(layer.weight.shape)


def test_small_layers_and_layers_of_another_class_stay_as_they_are() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = nn.Sequential(nn.Linear(8, 8), Doubled(64, 64)).eval()
    pack(network, torch.float32)
    assert [type(layer) for layer in network] == [nn.Linear, Doubled]

    class Twice(GEGLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    gate = Twice(64, 64).eval()
    x = draw(3, 64)
    plain = gate(x)
    pack(gate, torch.float32)
    assert type(gate) is Twice and type(gate.proj) is PackedLinear
    assert torch.allclose(gate(x), plain, atol=1e-5)


def test_networks_that_train_are_not_packed() -> None:
    with pytest.raises(AssertionError, match="for inference"):
        pack(nn.Linear(64, 64), torch.float32)


@torch.no_grad()
def test_wide_convolutions_of_size_3_run_by_winograd_s_algorithm_if_asked() -> None:
    def wide(channels: int = 256, **more: Any) -> nn.Conv2d:
        return nn.Conv2d(256, channels, **{"kernel_size": 3, "padding": 1, **more})

    torch.manual_seed(0)
    others = [wide(128), wide(stride=2), wide(kernel_size=1, padding=0), wide(padding=0)]
    network = nn.ModuleList([wide(), *others]).eval()
    x = draw(1, 256, 32, 32)
    plain = [layer(x) for layer in network]
    state = copy.deepcopy(network.state_dict())
    half = copy.deepcopy(network).to(torch.bfloat16)
    pack(network, torch.float32, winograd=True)
    pack(half, torch.bfloat16, winograd=True)
    assert [type(layer) for layer in network] == [WinogradConv2d] + 4 * [PackedConv2d]
    assert {type(layer) for layer in half} == {PackedConv2d}
    for layer, right in zip(network, plain, strict=True):
        assert torch.allclose(layer(x), right, atol=1e-5)
    assert equal_states(network.state_dict(), state)
    assert torch.equal(copy.deepcopy(network)[0](x), plain[0])
    network.train()
    assert type(network[0]) is nn.Conv2d
    assert torch.equal(network[0](x), plain[0])


def test_winograd_s_algorithm_leaves_odd_sizes_gradients_and_paddings_to_the_others() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)).eval()
    odd, even = draw(1, 256, 33, 34), draw(1, 256, 32, 32).requires_grad_()
    for mode in ("zeros", "circular"):
        plain = copy.deepcopy(layer)
        plain[0].padding_mode = mode
        packed = copy.deepcopy(plain)
        pack(packed, torch.float32, winograd=True)
        assert type(packed[0]) is WinogradConv2d
        with torch.no_grad():
            for x in (odd, even):
                assert torch.allclose(packed(x), plain(x), atol=1e-5)
        gradients = [torch.autograd.grad(n(even).square().sum(), even)[0] for n in (plain, packed)]
        assert torch.allclose(*gradients, atol=1e-4)
