"""Attention by closed form."""

import math

import pytest
import torch
from torch import Tensor

from mezzotint.nn.attention import Attention, AttentionBlock, SpatialTransformer, attend


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(math.sqrt(q.shape[-1])).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    # bf16 keeps 8 bits, and the weights and the values are both rounded to them
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
)
def test_attend_is_its_definition(gradients: bool, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 8, seed=2)
    with torch.set_grad_enabled(gradients):
        out = attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - by_definition(q, k, v)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_count_for_nothing_and_get_no_gradient(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 2, 4, 8, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    mask = torch.tensor([[True, True, False, False]])
    out = attend(q, k, v, mask)
    assert torch.allclose(out, attend(q, k[:, :, :2], v[:, :, :2]), atol=1e-2)
    out.float().square().sum().backward()
    for tensor in (k, v):
        assert tensor.grad is not None
        assert tensor.grad[:, :, 2:].abs().max() == 0
        assert tensor.grad[:, :, :2].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    q, k, v = (draw(2, 1, 3, 8, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    mask = torch.tensor([[False] * 3, [True] * 3])[:, None, None, :]
    out = attend(q, k, v, mask)
    out.float().sum().backward()
    assert out[0].abs().max() == 0
    assert out[1].abs().max() > 0
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad[0].abs().max() == 0


def test_heads_do_not_mix_before_the_output() -> None:
    attention = Attention(8, heads=2)
    torch.nn.init.eye_(attention.to_out[0].weight)
    torch.nn.init.zeros_(attention.to_out[0].bias)
    x = draw(1, 6, 8)
    before = attention(x)
    with torch.no_grad():
        attention.to_k.weight[4:] += 1.0  # keys of the second head
    after = attention(x)
    assert torch.equal(before[..., :4], after[..., :4])
    assert not torch.allclose(before[..., 4:], after[..., 4:])


def test_attention_block_knows_no_positions() -> None:
    block = AttentionBlock(8, 2, groups=4, eps=1e-6)
    x = draw(2, 8, 3, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[..., order].view_as(x)
    expected = block(x).flatten(2)[..., order].view_as(x)
    assert torch.allclose(block(shuffled), expected, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_linear_and_convolutional_projections_are_one_function(linear: bool) -> None:
    conv = SpatialTransformer(8, 2, 6, groups=4)
    other = SpatialTransformer(8, 2, 6, groups=4, linear=linear)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    other.load_state_dict({k: v.reshape(shapes[k]) for k, v in conv.state_dict().items()})
    x, context = draw(2, 8, 3, 5), draw(2, 4, 6, seed=1)
    assert torch.allclose(conv(x, context), other(x, context), atol=1e-5)
