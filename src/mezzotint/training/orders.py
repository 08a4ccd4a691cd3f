"""What a run is trained on, and in which order: a pure function of (seed, position)."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch

from mezzotint.data import AnyDataConfig, ShardStream, WebDatasetConfig, open_data
from mezzotint.data.base import ImageData
from mezzotint.data.captioned import CaptionedImages
from mezzotint.data.stream import merge_states
from mezzotint.errors import DataError
from mezzotint.rng import keyed_generator
from mezzotint.training.batches import DataOrder
from mezzotint.training.ranks import Ranks

__all__ = [
    "BucketOrder",
    "ClassBalancedOrder",
    "LeavingOut",
    "Order",
    "StreamOrder",
    "TrainingData",
    "build_order",
    "can_leave_out",
    "drawn",
    "epoch_length",
    "load_stream_state",
    "open_training_data",
    "spread",
    "stream_state",
]

TrainingData = ImageData | ShardStream

_CLASSES, _IMAGES, _BUCKET, _BATCHES = 0xC1A5, 0xC1A6, 0xB0C4, 0xB0C5  # keys of random numbers
_GOLDEN = 0.618034  # whose multiples are never near a short cycle
_STREAM_EPOCH = 50_000  # samples after which something is done that is done once an epoch


class Order(Protocol):
    """Which image stands at each position."""

    def index(self, position: int) -> int:
        """Return the image at a global position: ``step * batch + place`` in the batch."""
        ...


class StreamOrder:
    """The order of a stream, which has its own: every position is its own index."""

    def index(self, position: int) -> int:
        """Return the position."""
        return position


class ClassBalancedOrder:
    """Each class equally often: once in every round of as many positions as there are classes.

    Within a class every image comes once before any comes again.

    Args:
        labels: Of the images.
        seed: The recipe's seed.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        self.seed = seed
        members: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            members.setdefault(label, []).append(index)
        self._members = [members[label] for label in sorted(members)]
        self._round = lru_cache(maxsize=4)(self._order_of_round)
        self._visit = lru_cache(maxsize=4 * len(self._members))(self._order_of_class)

    def index(self, position: int) -> int:
        """Return the image at a position; see `Order.index`."""
        round_, place = divmod(position, len(self._members))
        number = self._round(round_)[place]
        members = self._members[number]
        epoch, visit = divmod(round_, len(members))
        return members[self._visit(number, epoch)[visit]]

    def _order_of_round(self, round_: int) -> list[int]:
        chance = keyed_generator(self.seed, _CLASSES, round_)
        return torch.randperm(len(self._members), generator=chance).tolist()

    def _order_of_class(self, number: int, epoch: int) -> list[int]:
        chance = keyed_generator(self.seed, _IMAGES, number, epoch)
        return torch.randperm(len(self._members[number]), generator=chance).tolist()


class BucketOrder:
    """Every image once an epoch, in batches whose images are all of one bucket.

    A bucket whose images don't fill its last batch gives some of them a second time, others in
    each epoch.

    Args:
        buckets: Of the images.
        batch_size: Samples of one forward pass, of all ranks together.
        seed: The recipe's seed.
    """

    def __init__(self, buckets: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self._buckets = batch_size, seed, buckets
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._members = [members[bucket] for bucket in sorted(members)]
        self._batches_of = [-(-len(each) // batch_size) for each in self._members]
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    def index(self, position: int) -> int:
        """Return the image at a position; see `Order.index`."""
        epoch, place = divmod(position, self.batch_size * sum(self._batches_of))
        return self._epoch(epoch)[place]

    def others(self, position: int) -> Iterator[int]:
        """Return other places whose images are of the same size, those of its batch first."""
        first = position - position % self.batch_size
        for k in range(1, self.batch_size):
            yield first + (position - first + k) % self.batch_size
        bucket, epoch = self._buckets[self.index(position)], self.batch_size * sum(self._batches_of)
        for place in range(first + self.batch_size, first + self.batch_size + 2 * epoch):
            if self._buckets[self.index(place)] == bucket:
                yield place

    def _order_of_epoch(self, epoch: int) -> list[int]:
        batches: list[list[int]] = []
        for number, members in enumerate(self._members):
            order: list[int] = []
            # a small bucket may have to be gone through several times for one batch
            for time in range(-(-self._batches_of[number] * self.batch_size // len(members))):
                chance = keyed_generator(self.seed, _BUCKET, number, epoch, time)
                places: list[int] = torch.randperm(len(members), generator=chance).tolist()
                order += [members[place] for place in places]
            starts = range(0, self._batches_of[number] * self.batch_size, self.batch_size)
            batches.extend(order[start : start + self.batch_size] for start in starts)
        chance = keyed_generator(self.seed, _BATCHES, epoch)
        numbers: list[int] = torch.randperm(len(batches), generator=chance).tolist()
        return [index for number in numbers for index in batches[number]]


class LeavingOut:
    """An order without some of its images: in the place of one stands the next that is not one.

    Args:
        order: Of all images.
        others: The places that a replacement may be taken from, in turn; by default all that
            follow.

    Attributes:
        excluded: Images that are left out.
    """

    def __init__(self, order: Order, others: Callable[[int], Iterable[int]] | None = None) -> None:
        self.order, self.others = order, others or _following
        self.excluded: frozenset[int] = frozenset()

    def index(self, position: int) -> int:
        """Return the image at a position; see `Order.index`."""
        index = self.order.index(position)
        if index not in self.excluded:
            return index
        chosen = (self.order.index(place) for place in self.others(position))
        # where all of a kind are left out, there is nothing like it to take
        return next((k for k in chosen if k not in self.excluded), index)


def _following(position: int) -> Iterable[int]:
    return itertools.count(position + 1)


def build_order(data: TrainingData, batch_size: int, seed: int) -> LeavingOut:
    """Return the order that data's configuration asks for.

    Args:
        data: The images; ``buckets`` and ``balance`` are those of `CaptionedConfig`.
        batch_size: Samples of one forward pass, of all ranks together.
        seed: The recipe's seed.

    Raises:
        DataError: If classes are to be balanced and an image has none.
    """
    if isinstance(data, ShardStream):
        return LeavingOut(StreamOrder())
    if isinstance(data, CaptionedImages) and data.bucket_sizes:
        buckets = [data.bucket(k) for k in range(len(data))]
        by_bucket = BucketOrder(buckets, batch_size, seed)
        return LeavingOut(by_bucket, by_bucket.others)
    if isinstance(data, CaptionedImages) and data.config.balance == "class":
        labels: list[int] = []
        for k in range(len(data)):
            label = data.describe(k).label
            if label is None:
                raise DataError(f"data.balance: {data.load(k).name} has no class to be balanced")
            labels.append(label)
        return LeavingOut(ClassBalancedOrder(labels, seed))
    return LeavingOut(DataOrder(len(data), seed))


def open_training_data(config: AnyDataConfig, seed: int, batch_size: int) -> TrainingData:
    """Open data by an index, or as a stream if their configuration says so.

    Args:
        config: Any.
        seed: The recipe's seed.
        batch_size: Samples of one forward pass, of all ranks together.

    Raises:
        MezzotintError: As `open_data` raises.
    """
    if isinstance(config, WebDatasetConfig) and config.stream:
        return ShardStream(config, seed, batch_size)
    return open_data(config)


def can_leave_out(data: TrainingData, count: int) -> bool:
    """Whether so many images can be left out: of a stream none, for its images have no index."""
    return count == 0 or (not isinstance(data, ShardStream) and len(data) > 2 * count)


def epoch_length(data: TrainingData) -> int:
    """Return the number of images in an epoch; that of a stream is a convention."""
    return _STREAM_EPOCH if isinstance(data, ShardStream) else len(data)


def spread(data: TrainingData, count: int) -> list[int]:
    """Return so many indices, one from each of as many parts of the data, or fewer.

    A folder's first images are all of one class; a stream's are shuffled. Other data come round to
    the same class again and again: places within the parts differ too.
    """
    if isinstance(data, ShardStream):
        return list(range(count))
    count = min(count, len(data))
    edges = [k * len(data) // count for k in range(count + 1)]
    return [
        start + int(k * _GOLDEN % 1 * (end - start))
        for k, (start, end) in enumerate(pairwise(edges))
    ]


def drawn(data: TrainingData, count: int, seed: int) -> list[int]:
    """Return so many indices by chance, or all if there are fewer; the first of a stream."""
    if isinstance(data, ShardStream):
        return list(range(count))
    return torch.randperm(len(data), generator=keyed_generator(seed)).tolist()[:count]


def stream_state(data: TrainingData, position: int, ranks: Ranks) -> dict[str, Any]:
    """Return what a checkpoint says of a stream: the same on all ranks; nothing of other data.

    Args:
        data: What is trained on.
        position: The next that the run will ask for.
        ranks: This process among the others.
    """
    if not isinstance(data, ShardStream):
        return {}
    return {"stream": merge_states(ranks.gather_values(data.state(position)))}


def load_stream_state(data: TrainingData, values: Mapping[str, Any]) -> None:
    """Take what `stream_state` gave, of any number of ranks.

    Raises:
        DataError: If the stream is another.
    """
    if isinstance(data, ShardStream) and "stream" in values:
        data.load_state(values["stream"])
