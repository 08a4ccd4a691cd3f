"""Attention in tiles is attention."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.device import bf16_instructions
from mezzotint.nn import tiled_attention
from mezzotint.nn.attention import attend
from mezzotint.nn.tiled_attention import attend_in_tiles, suits_tiles


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v.double()


def of_tokens(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(B, heads, N, d)`` as a layer makes it of ``(B, N, heads d)``."""
    return draw(2, tokens, 3, 16, seed=seed).to(dtype).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys"), [(600, 70), (512, 512), (1, 5), (1025, 9)])
@torch.no_grad()
def test_tiles_are_the_definition(queries: int, keys: int) -> None:
    q, k, v = of_tokens(queries, 0), of_tokens(keys, 1), of_tokens(keys, 2)
    out = attend_in_tiles(q, k, v)
    assert out.transpose(1, 2).is_contiguous()  # as the layer after it reads it
    assert torch.allclose(out.double(), exact(q, k, v), atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@torch.no_grad()
def test_bfloat16_is_half_as_exact_as_torch_s_kernel_or_better(sharpness: float) -> None:
    """Of inputs that were rounded themselves; torch's keeps its scores in float32."""
    wide = [sharpness * of_tokens(512, 0), of_tokens(512, 1), of_tokens(512, 2)]
    right = exact(*wide)
    q, k, v = (tensor.to(torch.bfloat16) for tensor in wide)
    theirs = (F.scaled_dot_product_attention(q, k, v) - right).norm()
    ours = (attend_in_tiles(q, k, v) - right).norm()
    assert ours < 2.2 * theirs
    assert ours < 0.015 * right.norm()


@torch.no_grad()
def test_what_all_keys_have_in_common_takes_no_digits_of_their_scores() -> None:
    q, k, v = (of_tokens(512, seed, torch.bfloat16) for seed in range(3))
    q[..., 0], k[..., 0] = 8.0, 128.0  # 256 more in every score, which softmax does not see
    right = exact(q, k, v)
    assert (attend_in_tiles(q, k, v) - right).norm() < 0.01 * right.norm()


@torch.no_grad()
def test_scores_beyond_what_an_exponential_holds() -> None:
    q = k = v = 20 * of_tokens(600, 0)
    out = attend_in_tiles(q, k, v)
    # scores are in the thousands, where float32 has three digits after the point
    assert (out - exact(q, k, v)).norm() < 1e-2 * out.norm()


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_attention, "_multiplies_by_amx", lambda: False)


@pytest.mark.usefixtures("without_amx")
@torch.no_grad()
def test_tiles_are_for_many_keys_in_bfloat16_without_gradients() -> None:
    q = of_tokens(256, 0, torch.bfloat16)
    assert suits_tiles(q, q)
    assert torch.equal(attend(q, q, q), attend_in_tiles(q, q, q))
    for a, b in ((q, q[:, :, :77]), (q[:, :, :8], q), (q.float(), q.float()), (q, q.float())):
        assert not suits_tiles(a, b)
    with torch.enable_grad():
        assert not suits_tiles(q, q)


@torch.no_grad()
def test_with_amx_torch_s_kernel_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    q = of_tokens(256, 0, torch.bfloat16)
    assert suits_tiles(q, q) == ("AMX" not in bf16_instructions())
    monkeypatch.setattr(tiled_attention, "_multiplies_by_amx", lambda: True)
    assert not suits_tiles(q, q)


@pytest.mark.usefixtures("without_amx")
@torch.no_grad()
def test_a_mask_leaves_tiles_aside() -> None:
    q = of_tokens(256, 0, torch.bfloat16)
    mask = torch.arange(256)[None] < 7
    assert torch.equal(attend(q, q, q, mask), F.scaled_dot_product_attention(q, q, q, mask))
