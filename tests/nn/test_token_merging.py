"""Merging of tokens by what must hold whatever the features."""

import pytest
import torch
from torch import Tensor

from mezzotint.nn.attention import AttentionBlock, SpatialTransformer
from mezzotint.nn.token_merging import TokenMerging, merged_tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Seen:
    """Attention that changes nothing, and remembers what it saw."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.append(tokens)
        return tokens


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("size", [(4, 4), (6, 8), (5, 7)])
def test_attention_sees_as_many_fewer_as_the_ratio_says(
    ratio: float, size: tuple[int, int]
) -> None:
    seen, tokens = Seen(), draw(2, size[0] * size[1], 3)
    assert TokenMerging(ratio, [1, 2])(seen, tokens, size).shape == tokens.shape
    total, cells = size[0] * size[1], (size[0] // 2) * (size[1] // 2)
    assert seen.tokens[0].shape == (2, total - min(int(ratio * total), total - cells), 3)


def test_the_tokens_that_vanish_are_those_that_have_a_like() -> None:
    """In a picture of two colours at half the ratio, attention loses nothing."""
    colours = torch.eye(3)[:2]
    picture = torch.tensor([[0, 0, 1, 1]] * 4).flatten()
    merging, seen = TokenMerging(0.75, [5]), Seen()
    out = merging(seen, colours[picture][None], (4, 4))
    assert torch.equal(out, colours[picture][None])
    assert seen.tokens[0].shape == (1, 4, 3)
    # unlike tokens stay: a single one of another colour is no mean with the rest, if it may stay
    lone = colours[picture].clone()
    lone[6] = torch.tensor([0.0, 0.0, 5.0])
    for seed in range(8):
        assert torch.equal(TokenMerging(0.5, [seed])(Seen(), lone[None], (4, 4))[0, 6], lone[6])


def test_a_merged_token_gets_what_the_mean_of_its_group_gets() -> None:
    tokens, seen = draw(1, 16, 4), Seen()
    out = TokenMerging(0.5, [3])(seen, tokens, (4, 4))
    for value in seen.tokens[0][0]:
        group = (out[0] == value).all(1)
        torch.testing.assert_close(value, tokens[0, group].mean(0))
    assert len(out[0].unique(dim=0)) == 8


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (2, 2)])
def test_what_is_too_small_to_merge_is_attended_to_as_it_is(size: tuple[int, int]) -> None:
    seen, tokens = Seen(), draw(1, size[0] * size[1], 3)
    assert torch.equal(TokenMerging(0.2, [0])(seen, tokens, size), tokens)
    assert seen.tokens[0] is tokens


def test_the_choice_is_of_the_seed_and_the_step_alone() -> None:
    tokens = draw(1, 64, 8)

    def run(seeds: list[int], step: int = 0) -> Tensor:
        merging = TokenMerging(0.5, seeds)
        merging.step = step
        return merging(Seen(), tokens.expand(2 * len(seeds), -1, -1), (8, 8))

    alone, beside = run([7]), run([3, 7])
    assert torch.equal(alone, run([7]))
    assert torch.equal(beside[1], alone[0])
    assert torch.equal(alone[0], alone[1]) and torch.equal(beside[:2], beside[2:])  # both halves
    assert not torch.equal(beside[0], beside[1])
    assert not torch.equal(run([7], step=1), alone)


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_layers_merge_for_a_while(linear: bool) -> None:
    transformer = SpatialTransformer(8, 2, 6, groups=4, linear=linear)
    block = AttentionBlock(8, 2, groups=4, eps=1e-6)
    x, context = draw(2, 8, 6, 6), draw(2, 4, 6)

    def run() -> list[Tensor]:
        return [transformer(x, context), block(x)]

    plain = run()
    with pytest.raises(KeyError), merged_tokens([transformer, block], TokenMerging(0.5, [1])):
        for a, b in zip(run(), plain, strict=True):
            assert a.shape == b.shape and not torch.equal(a, b)
        raise KeyError
    for merging in (None, TokenMerging(0.0, [1])):
        with merged_tokens([transformer, block], merging):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))
    assert transformer.merging is None and block.merging is None


def test_it_can_be_differentiated() -> None:
    block, x = AttentionBlock(8, 2, groups=4, eps=1e-6), draw(1, 8, 4, 4).requires_grad_()
    with merged_tokens([block], TokenMerging(0.5, [1])):
        block(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad.abs().amax(1) > 0).all()
