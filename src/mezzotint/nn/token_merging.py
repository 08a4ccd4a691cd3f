"""Token merging: self-attention of fewer tokens (Bolya and Hoffman, arXiv 2303.17604)."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.rng import keyed_generator

__all__ = ["MOST_MERGED", "Merges", "TokenMerging", "merged_tokens"]

MOST_MERGED = 0.75  # of each 2 x 2 tokens one always stays
_KEY = 0x70E  # tells the choice of those that stay from the noise of the same seed and step


class Merges(Protocol):
    """A layer of self-attention over the positions of a feature map, which may merge them."""

    merging: "TokenMerging | None"


class TokenMerging:
    """Lets self-attention see the means of similar tokens in place of all of them.

    Of each 2 x 2 positions one, chosen by chance, is a destination and the others are sources. The
    sources that are most like some destination (by the cosine of their features) are merged into
    the one that they are most like, as the mean of all; attention sees the rest and these; and each
    merged token then gets what its mean got. Section 4 of the paper, which also says why the choice
    is by chance (a regular one leaves a pattern) and why both halves of a guided batch share it
    (else guidance would enlarge the difference). Similarity is that of what attention reads: the
    normalised tokens.

    A choice depends on the seed of its sample and the step alone, not on neighbours in a batch.

    Args:
        ratio: The share of the tokens that vanish, 0 to 0.75.
        seeds: One a sample. A batch of several times as many rows holds the samples so many times
            over, as guidance has them.

    Attributes:
        step: Of the sampler; each has a choice of its own.
    """

    def __init__(self, ratio: float, seeds: Sequence[int]) -> None:
        assert 0 <= ratio <= MOST_MERGED, "the request says so"
        self.ratio = ratio
        self.seeds = tuple(seeds)
        self.step = 0

    def __call__(
        self, attend: Callable[[Tensor], Tensor], tokens: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Attend by fewer tokens.

        Args:
            attend: Self-attention, ``(B, n, C)`` to the same shape for any n.
            tokens: ``(B, HW, C)``, row by row.
            size: H and W.

        Returns:
            ``(B, HW, C)``.
        """
        sources, destinations = self._parts(len(tokens), *size)
        merged = min(int(self.ratio * tokens.shape[1]), sources.shape[1])
        if merged == 0 or destinations.shape[1] == 0:
            return attend(tokens)
        place = _places(tokens, sources.to(tokens.device), destinations.to(tokens.device), merged)
        fewer = _means(tokens, place, tokens.shape[1] - merged)
        return attend(fewer).gather(1, place[..., None].expand_as(tokens))

    def _parts(self, rows: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of sources and of destinations, ``(rows, S)`` and ``(rows, D)``, rising."""
        assert rows % len(self.seeds) == 0, "a batch holds all samples, once or several times"
        down, across = height // 2, width // 2  # an odd last row or column has sources alone
        keys = [keyed_generator(seed, self.step, _KEY, down, across) for seed in self.seeds]
        chosen = torch.stack([torch.randint(4, (down, across), generator=key) for key in keys])
        row = 2 * torch.arange(down)[:, None] + chosen // 2
        column = 2 * torch.arange(across) + chosen % 2
        destinations = (row * width + column).flatten(1)
        is_source = torch.ones(len(self.seeds), height * width, dtype=torch.bool)
        is_source.scatter_(1, destinations, False)
        sources = is_source.nonzero()[:, 1].view(len(self.seeds), -1)
        times = rows // len(self.seeds)
        return sources.repeat(times, 1), destinations.repeat(times, 1)


@contextmanager
def merged_tokens(layers: Iterable[Merges], merging: TokenMerging | None) -> Generator[None]:
    """Let layers merge their tokens for a while.

    Args:
        layers: Of self-attention.
        merging: How; nothing is changed by ``None``.
    """
    changed = list(layers) if merging is not None else []
    before = [layer.merging for layer in changed]
    try:
        for layer in changed:
            layer.merging = merging
        yield
    finally:
        for layer, old in zip(changed, before, strict=True):
            layer.merging = old


@torch.no_grad()
def _places(tokens: Tensor, sources: Tensor, destinations: Tensor, merged: int) -> Tensor:
    """Where each token goes ``(B, N)``: the sources that stay come first, then the destinations."""
    unit = F.normalize(tokens, dim=-1)
    places: list[Tensor] = []
    # one sample at a time: the similarities of a large map are the largest tensor of all
    for features, from_, to in zip(unit, sources, destinations, strict=True):
        likeness, nearest = (features[from_] @ features[to].T).max(dim=1)
        order = likeness.argsort(descending=True, stable=True)
        gone, staying = order[:merged], order[merged:]
        place = torch.empty(len(features), dtype=torch.long, device=tokens.device)
        place[from_[staying]] = torch.arange(len(staying), device=tokens.device)
        place[to] = len(staying) + torch.arange(len(to), device=tokens.device)
        place[from_[gone]] = len(staying) + nearest[gone]
        places.append(place)
    return torch.stack(places)


def _means(tokens: Tensor, place: Tensor, count: int) -> Tensor:
    """The mean ``(B, count, C)`` of the tokens that go to each place."""
    rows, _, width = tokens.shape
    flat = (place + count * torch.arange(rows, device=place.device)[:, None]).flatten()
    sums = tokens.new_zeros(rows * count, width)
    if tokens.is_cuda:  # where index_add adds in any order, and the sums differ from run to run
        sums = sums.index_put((flat,), tokens.flatten(0, 1), accumulate=True)
    else:
        sums = sums.index_add(0, flat, tokens.flatten(0, 1))
    numbers = flat.bincount(minlength=rows * count)
    return (sums / numbers[:, None]).to(tokens.dtype).view(rows, count, width)
