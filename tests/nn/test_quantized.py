"""Layers in int8 are near the plain ones, small, and become plain ones of the rounded weights."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.device import bf16_instructions, quantizes_weights, select_device, select_precision
from mezzotint.nn.embeddings import TimestepEmbedding
from mezzotint.nn.packed import Packed, PackedUpsample, is_packed, pack, weight_shape
from mezzotint.nn.quantized import Quantized, QuantizedConv2d, QuantizedLinear, quantize
from mezzotint.nn.resnet import ResnetBlock, Upsample

EXECUTION = select_precision("float32", select_device("cpu"))
pytestmark = pytest.mark.skipif(
    not quantizes_weights(EXECUTION)[0], reason="torch has no oneDNN here"
)

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(64, 120, 3, padding=1), (2, 64, 9, 7)),
    "groups": (lambda: nn.Conv2d(256, 512, 3, padding=1, groups=4), (1, 256, 6, 6)),
    "circular": (
        lambda: nn.Conv2d(64, 120, 3, padding=1, padding_mode="circular"),
        (1, 64, 6, 5),
    ),
    "wide": (lambda: nn.Conv2d(64, 1024, 3, padding=1), (2, 64, 9, 7)),
    "wide, stride": (lambda: nn.Conv2d(64, 1024, 3, stride=2, padding=1), (2, 64, 9, 8)),
    "wide, unpadded": (lambda: nn.Conv2d(64, 1024, 3, stride=2, bias=False), (2, 64, 9, 8)),
    "wide, circular": (
        lambda: nn.Conv2d(64, 1024, 3, padding=1, padding_mode="circular"),
        (1, 64, 5, 6),
    ),
    "linear": (lambda: nn.Linear(520, 1030), (3, 7, 520)),
    "linear without bias": (lambda: nn.Linear(512, 1024, bias=False), (5, 512)),
}
NETWORKS = ["3x3", "wide", "linear"]
# Values are rounded to steps of s = largest / 127, with an error of s / sqrt(12) where they are of
# random fractions. Of normal ones the largest of thousands is about 4.5 times their deviation, so
# that it is 0.010 of them; of a weight's channel, uniform, 1.7 times, which adds 0.004.
NEAR = 0.014


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(make()).to(dtype).eval(), x.to(dtype)


def apart(found: Tensor, right: Tensor) -> float:
    """The difference's norm over that of the right one."""
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layer_is_as_near_as_its_rounding_says(name: str, precision: torch.dtype) -> None:
    if precision is torch.bfloat16 and not bf16_instructions():
        pytest.skip("this processor does not compute in bfloat16")
    network, x = build(name, precision)
    plain = copy.deepcopy(network).double()(x.double())
    quantize(network, precision)
    assert isinstance(network[0], Quantized)
    found = network(x)
    assert found.dtype is precision and found.shape == plain.shape
    assert 0.003 < apart(found, plain) < NEAR


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_products_of_whole_numbers_are_exact(name: str) -> None:
    network, x = build(name)
    # where the largest of all is 127, each is a step of its own
    whole = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, x.shape, generator=whole).float()
    weight = network[0].weight
    weight.copy_(torch.randint(-127, 128, weight.shape, generator=whole))
    x.view(-1)[0] = 127
    weight.flatten(1)[:, 0] = 127
    plain = copy.deepcopy(network).double()(x.double())
    quantize(network, torch.float32)
    # sums beyond 2^24 are rounded to float32's 24 bits once, and with the bias again
    assert torch.allclose(network(x).double(), plain, rtol=2**-22, atol=0.25)


@torch.no_grad()
def test_sizes_beyond_a_chunk_zeros_and_what_is_no_number() -> None:
    network, _ = build("3x3")
    torch.manual_seed(0)
    x = torch.randn(3, 64, 53, 61)  # whose chunks do not end where it does
    plain = network(x)
    quantize(network, torch.float32)
    assert apart(network(x), plain) < NEAR
    turned = x.transpose(2, 3)
    assert torch.equal(network(turned), network(turned.contiguous()))
    bias = network[0].bias[:, None, None].expand(120, 53, 61)
    assert torch.equal(network(torch.zeros_like(x))[0], bias)
    x[1, 2, 3, 4] = float("nan")
    assert network(x).isnan().any()
    x[1, 2, 3, 4] = float("inf")
    assert not network(x).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_states_copies_and_pickles_are_the_plain_layer_s_with_rounded_weights(
    name: str, dtype: torch.dtype
) -> None:
    network, x = build(name, dtype)
    state = copy.deepcopy(network.state_dict())
    quantize(network, torch.float32)
    rounded = network.state_dict()
    assert list(rounded) == list(state)
    weight, before = rounded["0.weight"], state["0.weight"]
    assert weight.dtype is dtype and weight.shape == before.shape and weight.is_contiguous()
    # half a step of each channel, and what bfloat16 rounds of that
    largest = before.float().flatten(1).abs().amax(1)
    far = (weight.float() - before.float()).flatten(1).abs().amax(1)
    again = 2**-8 if dtype is torch.bfloat16 else 1e-6
    assert (far <= largest * (1 / 127 / 2 + again)).all()
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    found = network(x)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert type(other[0]) in (nn.Conv2d, nn.Linear)
        assert [n for n, _ in other.named_parameters()] == list(state)
        assert torch.equal(other[0].weight, weight)
        assert apart(other(x), found) < NEAR
    assert isinstance(network[0], Quantized)  # still


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.train(),
        lambda network: network.to(torch.float64),
        lambda network: network.load_state_dict(network.state_dict()),
        lambda network: setattr(network[0], "weight", nn.Parameter(network[0].weight)),
    ],
    ids=["train", "to", "load_state_dict", "weight ="],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_changes_a_layer_makes_it_plain(name: str, change: Any) -> None:
    network, _ = build(name)
    quantize(network, torch.float32)
    rounded = network.state_dict()["0.weight"]
    change(network)
    assert type(network[0]) in (nn.Conv2d, nn.Linear)
    assert list(dict(network[0].named_parameters())) == ["weight", "bias"]
    assert network[0].weight.requires_grad
    assert torch.equal(network[0].weight.float(), rounded)
    assert not is_packed(network)
    assert set(vars(network[0])) == set(vars(build(name)[0][0]))
    network.eval().to(torch.float32)
    quantize(network, torch.float32)  # of rounded weights, which it does not round any further
    again = network.state_dict()["0.weight"]
    assert torch.allclose(again, rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_changed_bias_counts(name: str) -> None:
    network, x = build(name)
    plain = copy.deepcopy(network)
    quantize(network, torch.float32)
    for one in (network, plain):
        one[0].bias.fill_(3.0)
    assert apart(network(x), plain(x)) < NEAR
    for one in (network, plain):
        one[0].bias = None
    assert apart(network(x), plain(x)) < NEAR


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_input_are_those_of_the_rounded_weights(name: str) -> None:
    network, x = build(name)
    quantize(network, torch.float32)
    plain = copy.deepcopy(network)
    assert not is_packed(plain)
    gradients: list[Tensor] = []
    for one in (network, plain):
        x = x.detach().requires_grad_()
        gradients += torch.autograd.grad(one(x).square().sum(), x)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-3)
    assert isinstance(network[0], Quantized)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_without_instructions_for_int8_only_the_weights_are_rounded(name: str) -> None:
    network, x = build(name)
    quantize(network, torch.float32, multiplies=False)
    assert isinstance(network[0], Quantized)
    assert torch.allclose(network(x), copy.deepcopy(network)(x), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_take_a_byte_and_their_shapes_are_known(name: str) -> None:
    network, _ = build(name)
    layer = network[0]
    shape, count = layer.weight.shape, layer.weight.numel()
    quantize(network, torch.bfloat16)
    assert weight_shape(layer) == tuple(shape) == tuple(layer.weight.shape)
    assert isinstance(layer, Quantized)
    held = [v for v in vars(layer).values() if isinstance(v, Tensor)]
    assert sum(v.numel() * v.element_size() for v in held) == count + 4 * shape[0]
    assert "weight" not in layer._parameters


def test_which_layers_are_rounded() -> None:
    block = ResnetBlock(64, 128, time_dim=512)
    embedding, upsample = TimestepEmbedding(512, 1024), Upsample(128)
    first, last = nn.Conv2d(64, 128, 3), nn.Conv2d(64, 128, 3)
    small = [nn.Linear(1024, 512), nn.Linear(320, 2560), nn.Conv2d(1024, 1024, 1)]

    class Doubled(nn.Linear):
        pass

    parts = [block, embedding, upsample, first, last, *small, Doubled(512, 1024)]
    network = nn.ModuleList(parts).eval()
    quantize(network, torch.float32, keep=(first, last))
    pack(network, torch.float32)
    found = {name for name, layer in network.named_modules() if isinstance(layer, Quantized)}
    assert found == {"0.conv1", "0.conv2", "2.conv"}
    assert type(upsample) is Upsample  # doubling in one step would take 16 bits a weight
    assert not any(isinstance(layer, PackedUpsample) for layer in network.modules())
    others = [embedding.linear_2, block.time_emb_proj, first, last, *small]
    assert all(isinstance(layer, Packed) for layer in others)
    assert isinstance(block.conv1, QuantizedConv2d)
    assert not any(isinstance(layer, QuantizedLinear) for layer in others)


def test_networks_that_train_are_not_rounded() -> None:
    with pytest.raises(AssertionError, match="for inference"):
        quantize(nn.Linear(512, 1024), torch.float32)
