"""Keys and values of a context that are computed once."""

import torch
from torch import Tensor

from mezzotint.nn.attention import Attention, SpatialTransformer
from mezzotint.nn.kept_context import KeptContext


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_kept_context_is_a_context_bit_for_bit() -> None:
    layer, tokens = SpatialTransformer(8, 2, 6, layers=2, groups=4), draw(2, 5, 6)
    kept = KeptContext(tokens)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])[:, None, None, :]
    for seed in range(3):
        x = draw(2, 8, 3, 4, seed=seed)
        assert torch.equal(layer(x, kept), layer(x, tokens))
        assert torch.equal(layer(x, kept, mask), layer(x, tokens, mask))


@torch.no_grad()
def test_each_layer_makes_its_own_once() -> None:
    tokens, x = draw(2, 5, 6), draw(2, 3, 8)
    layers = [Attention(8, 2, context_dim=6) for _ in range(2)]
    calls: list[object] = []
    for layer in layers:
        layer.to_k.register_forward_hook(lambda module, *_: calls.append(module))
        layer.to_v.register_forward_hook(lambda module, *_: calls.append(module))
    kept = KeptContext(tokens)
    for _ in range(3):
        for layer in layers:
            layer(x, kept)
    assert len(calls) == len(set(calls)) == 4
    other = KeptContext(draw(2, 5, 6, seed=1))
    assert not torch.equal(layers[0](x, other), layers[0](x, kept))
