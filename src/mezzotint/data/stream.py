"""Data that are read from beginning to end and never whole: one sample by its place in the order.

The order of a stream is that of its *lanes*. The shards of epoch after epoch, each epoch in an
order of its own, are dealt to the lanes in turn, as cards are; each lane reads its shards one after
the other, and shuffles what it reads in blocks. Of every batch of B samples, the first B / L are
the next of lane 0, those that follow are of lane 1, and so on, whatever epoch a lane is in. So

- the order depends on seed, shards, buffer, lanes and batch size, and not on the number of ranks: a
  run that goes on with another number of them goes on with the next sample;
- a rank reads the lanes of its own share of the batch alone. Where W ranks share L lanes evenly,
  each opens L / W of them, and no shard is read twice; otherwise a lane between two shares is read
  by both ranks;
- memory holds two blocks of each lane at most, however many samples there are;
- to resume, it is enough to know where the current block of each lane begins. Without that, the
  shards are read again from the first, which gives the same samples.

The blocks at which lanes begin are of different sizes, so that not all are read at once. A sample
that cannot be decoded keeps its place in the order, and the next whole one of its block is given
there a second time: whether it is whole is known only to the rank that decodes it.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mezzotint.data.base import Description, Example, Fault
from mezzotint.data.captioned import decode_view
from mezzotint.data.files import choose_view, cut, one_line
from mezzotint.data.shards import DamagedShard, Sample, find_shards, read_shard, shard_name
from mezzotint.data.webdataset import WebDatasetConfig, told_by
from mezzotint.errors import DataError
from mezzotint.rng import keyed_generator

__all__ = ["ShardStream", "merge_states"]

_SHARDS, _BLOCK = 0x5A4D, 0xB10C  # keys of random numbers
_MOST_FAULTS = 1000  # that are kept by name
_FIRST = 1000  # samples on which at least the share of broken ones is judged
_MARKS = 64  # blocks of a lane whose beginnings are remembered
_EMPTY = 64  # shards without a sample of use that a lane passes by, and eight times their number


class _Mark(NamedTuple):
    """Where a block of a lane begins."""

    block: int
    turn: int  # of the shard, among those of all epochs and lanes
    sample: int  # of the shard


class ShardStream:
    """Shards as a stream; see `mezzotint.data.base.StreamData`, and the module for its order.

    Args:
        config: Which shards, and how their images are seen.
        seed: Of the order.
        batch_size: B, of all ranks together; L is its largest divisor up to ``lanes`` and to the
            number of shards.
        on_fault: Called with every fault that is named.

    Attributes:
        on_fault: See above; from whichever thread reads.
        seen: Samples that were read, anew in every epoch; what is read again for a position that
            was passed is not counted again.
        broken: Those among them that are of no use, and shards that end early.

    Raises:
        DataError: If a pattern names no shard.
    """

    def __init__(
        self,
        config: WebDatasetConfig,
        seed: int,
        batch_size: int,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.shards = find_shards(config.urls)
        self.class_names = config.classes
        self.faults: list[Fault] = []
        self.seen = self.broken = 0
        self.on_fault = on_fault
        self._named: set[str] = set()
        self._numbers = {name: number for number, name in enumerate(config.classes or ())}
        self._counting = threading.Lock()
        self._order = lru_cache(maxsize=4)(self._permute)
        # in more lanes than shards, one shard would be read by several at the same time
        most = min(config.lanes, batch_size, len(self.shards))
        lanes = next(count for count in range(most, 0, -1) if batch_size % count == 0)
        self._share = batch_size // lanes  # of the batch, for each lane
        size = config.shuffle_buffer // lanes
        self._lanes = [_Lane(self, k, lanes, size) for k in range(lanes)]
        self.fingerprint = self._fingerprint()

    def load(self, position: int, generator: torch.Generator | None = None) -> Example:
        """Return the sample at a position; see `StreamData.load`.

        Raises:
            DataError: If a shard has gone, or more than ``max_broken`` of what was seen is broken.
        """
        lane, block, place = self._find(position)
        samples = lane.read(block)
        for k in (*range(place, len(samples)), *range(place)):
            sample = samples[k]
            try:
                pixels = decode_view(sample.picture or b"", self.config, ()).pixels
            except Exception as error:  # a damaged file makes decoders raise anything
                if lane.is_new(block, k):
                    self.fault(Fault(sample.name, one_line(error)))
                continue
            known, side = self._describe(sample), self.config.resolution
            high, wide = pixels.shape[:2]
            view = choose_view(high, wide, side, self.config.flip, generator)
            return Example(cut(pixels, view), known.caption, known.label, sample.name)
        raise DataError(
            f"{samples[place].name}: neither this image nor one of the {len(samples) - 1} that were"
            " read with it can be decoded"
        )

    def describe(
        self, position: int, generator: torch.Generator | None = None, *, with_map: bool = False
    ) -> Description:
        """Return caption and label of a sample, whole or not; see `StreamData.describe`."""
        lane, block, place = self._find(position)
        return self._describe(lane.read(block)[place])

    def captions(self, limit: int) -> list[str]:
        """Return the captions of the first samples; see `StreamData.captions`."""
        found: list[str] = []
        for place in self.shards:
            for sample in self.samples_of(place, 0):
                if len(found) == limit:
                    return found
                if isinstance(sample, Sample) and (caption := self._describe(sample).caption):
                    found.append(caption)
        return found

    def state(self, position: int) -> dict[str, Any]:
        """Return where the blocks begin that hold a position; see `StreamData.state`."""
        marks: list[list[int]] = []
        batch, place = divmod(position, self.batch_size)
        for lane in self._lanes:
            into = min(max(place - lane.number * self._share, 0), self._share)
            mark = lane.mark(lane.block_of(batch * self._share + into)[0])
            if mark is not None:
                marks.append([lane.number, *mark])
        return {"stream": self.fingerprint, "position": position, "marks": marks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave; see `StreamData.load_state`."""
        if state["stream"] != self.fingerprint:
            raise DataError(
                f"{self.config.urls}: these are not the shards, or not the seed, view, buffer,"
                " lanes or batch size, with which this run began; put them back as they were, or"
                " start anew"
            )
        for number, *mark in state["marks"]:
            self._lanes[number].start(_Mark(*mark))

    def shard(self, turn: int) -> str:
        """Return the shard whose turn it is, among those of epoch after epoch."""
        epoch, place = divmod(turn, len(self.shards))
        return self.shards[self._order(epoch)[place]]

    def samples_of(self, place: str, skip: int) -> Iterator[Sample | Fault]:
        """Read a shard; a fault stands for a sample that is of no use, or for a damaged rest."""
        try:
            for sample in read_shard(place, skip):
                fault = "no image" if sample.picture is None else self._told_fault(sample)
                yield sample if fault is None else Fault(sample.name, fault)
        except DamagedShard as error:
            yield Fault(shard_name(place), f"{error}; what follows is lost")

    def count(self, sample: Sample | Fault) -> None:
        """Count what is read for the first time.

        Raises:
            DataError: As `fault` raises.
        """
        with self._counting:
            self.seen += 1
        if isinstance(sample, Fault):
            self.fault(sample)

    def fault(self, fault: Fault) -> None:
        """Count something that is skipped, and name it unless it was or too many were.

        Raises:
            DataError: If it is one too many.
        """
        with self._counting:
            self.broken += 1
            new = fault.name not in self._named and len(self.faults) < _MOST_FAULTS
            if new:
                self._named.add(fault.name)
                self.faults.append(fault)
            seen, broken, allowed = self.seen, self.broken, self.config.max_broken
        if new and self.on_fault is not None:
            self.on_fault(fault)
        if broken > allowed * max(seen, _FIRST):
            named = ", ".join(f"{f.name} ({f.reason})" for f in self.faults[:3])
            raise DataError(
                f"{self.config.urls}: {broken:,} of {seen:,} samples are broken (max_broken allows"
                f" {allowed:.1%}): {named} and so on; mend them, or raise max_broken"
            )

    def _find(self, position: int) -> tuple["_Lane", int, int]:
        """The lane and the block that hold a position, and the place in the block."""
        batch, place = divmod(position, self.batch_size)
        number, place = divmod(place, self._share)
        lane = self._lanes[number]
        return lane, *lane.block_of(batch * self._share + place)

    def _describe(self, sample: Sample) -> Description:
        told = told_by(sample.parts, self.config)
        if told.class_name is None:
            return Description(told.caption, None)
        return Description(told.caption, self._numbers[told.class_name])

    def _told_fault(self, sample: Sample) -> str | None:
        told = told_by(sample.parts, self.config)
        if told.fault is None and told.class_name not in (None, *self._numbers):
            return f"its class {told.class_name!r} is not among data.classes"
        return told.fault

    def _permute(self, epoch: int) -> list[int]:
        chance = keyed_generator(self.seed, _SHARDS, epoch)
        return torch.randperm(len(self.shards), generator=chance).tolist()

    def _fingerprint(self) -> str:
        settings = self.config.model_dump(exclude={"urls", "cache_limit_mib", "max_broken"})
        settings["lanes"] = len(self._lanes)
        sizes = [None if "://" in place else Path(place).stat().st_size for place in self.shards]
        names = [shard_name(place) for place in self.shards]
        content = [names, sizes, settings, self.seed, self.batch_size]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Lane:
    """Every L-th shard of epoch after epoch, read in blocks that are shuffled."""

    def __init__(self, stream: ShardStream, number: int, lanes: int, size: int) -> None:
        self.number = number
        self._stream, self._lanes, self._size = stream, lanes, size
        self._first = -(-size * (number + 1) // lanes)  # lanes don't all read at once
        self._marks = [_Mark(0, number, 0)]  # rising
        self._held: dict[int, list[Sample]] = {}
        self._source: Iterator[tuple[Sample, int, int]] | None = None
        self._next = self._marks[0]
        self._furthest = (number, 0)  # turn and sample that were read; all before are counted
        self._damaged: dict[int, set[int]] = {}  # places, of the last blocks that have any
        self._counted = 0  # blocks before it are counted
        self._reading = threading.Lock()

    def block_of(self, n: int) -> tuple[int, int]:
        """The block that holds the lane's n-th sample, and its place there."""
        if n < self._first:
            return 0, n
        block, place = divmod(n - self._first, self._size)
        return block + 1, place

    def read(self, block: int) -> list[Sample]:
        """The samples of a block, shuffled."""
        with self._reading:
            while block not in self._held:
                known = self._before(block) or _Mark(0, self.number, 0)
                if self._source is None or not known.block <= self._next.block <= block:
                    self._next = known
                    self._source = self._samples(known.turn, known.sample)
                # after an error, from the block's beginning
                source, self._source = self._source, None
                self._read_next(source)
                self._source = source
            return self._held[block]

    def mark(self, block: int) -> _Mark | None:
        """Where the block begins, or the nearest before it that is known, but for the first."""
        with self._reading:
            mark = self._before(block)
        return mark if mark is not None and mark.block else None

    def start(self, mark: _Mark) -> None:
        """Say where a block begins."""
        with self._reading:
            self._marks = [mark]
            self._furthest = max(self._furthest, mark[1:])
            self._counted = max(self._counted, mark.block)

    def is_new(self, block: int, place: int) -> bool:
        """Whether a sample that cannot be decoded is met for the first time."""
        with self._reading:
            places = self._damaged.get(block, set[int]())
            if block < self._counted or place in places:
                return False
            self._damaged[block] = places | {place}
            if len(self._damaged) > _MARKS:
                self._counted = min(self._damaged) + 1
                del self._damaged[self._counted - 1]
            return True

    def _before(self, block: int) -> _Mark | None:
        return max((m for m in self._marks if m.block <= block), default=None)

    def _read_next(self, source: Iterator[tuple[Sample, int, int]]) -> None:
        mark = self._next
        while len(self._held) > 1:  # before, not after: with the new one there are two
            del self._held[next(iter(self._held))]
        samples: list[Sample] = []
        turn, read = mark.turn, mark.sample
        for _ in range(self._size if mark.block else self._first):
            sample, turn, read = next(source)
            samples.append(sample)
        seed = self._stream.seed
        chance = keyed_generator(seed, _BLOCK, self.number, mark.block)
        order: list[int] = torch.randperm(len(samples), generator=chance).tolist()
        self._held[mark.block] = [samples[k] for k in order]
        self._next = _Mark(mark.block + 1, turn, read)
        if self._next not in self._marks:
            # those furthest on are kept: to them the reading returns from a look at the beginning
            self._marks = sorted([*self._marks, self._next])[-_MARKS:]

    def _samples(self, turn: int, skip: int) -> Iterator[tuple[Sample, int, int]]:
        """Samples of use without an end, each with the turn and how many of its shard are read."""
        shards = len(self._stream.shards)
        empty = 0
        while empty <= _EMPTY + 8 * shards:
            empty += 1
            read = skip
            for sample in self._stream.samples_of(self._stream.shard(turn), skip):
                read += 1
                if (turn, read) > self._furthest:
                    self._furthest = (turn, read)
                    self._stream.count(sample)
                if isinstance(sample, Sample):
                    empty = 0
                    yield sample, turn, read
            turn, skip = turn + self._lanes, 0
        raise DataError(f"{self._stream.config.urls}: no sample in {shards} shards is of use")


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put together what `StreamData.state` gave on several ranks, for any number of ranks.

    Args:
        states: Of the same position, one for each rank.
    """
    marks: dict[int, list[int]] = {}
    for state in states:
        for number, *mark in state["marks"]:
            marks[number] = max(marks.get(number, mark), mark)
    merged = dict(states[0])
    merged["marks"] = [[number, *mark] for number, mark in sorted(marks.items())]
    return merged
