"""Shards read from beginning to end: the order, resumption, ranks, faults."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from shard_files import picture, sample, write_shards, write_tar

from mezzotint.data import ShardStream, WebDatasetConfig
from mezzotint.data.base import Fault
from mezzotint.data.stream import merge_states
from mezzotint.errors import DataError

SHARDS, EACH = 6, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), SHARDS, EACH)


def stream(
    urls: Path, seed: int = 3, batch_size: int | None = None, **settings: object
) -> ShardStream:
    values = {"urls": str(urls), "resolution": 16, "lanes": 4, "shuffle_buffer": 24, **settings}
    return ShardStream(WebDatasetConfig.from_dict(values), seed, batch_size or values["lanes"])


def numbers(data: ShardStream, positions: Iterable[int]) -> list[int]:
    """Which pictures stand at positions; each one's colour is its number."""
    return [int(data.load(p).image[0, 0, 0]) for p in positions]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_epoch_gives_each_sample_once(folder: Path, lanes: int) -> None:
    """Blocks of as many samples as a shard has don't reach beyond the end of an epoch."""
    data = stream(folder, lanes=lanes, shuffle_buffer=lanes * EACH)
    for lane in data._lanes:
        lane._first = EACH
    found = numbers(data, range(4 * SHARDS * EACH))
    epochs = [found[k : k + SHARDS * EACH] for k in range(0, len(found), SHARDS * EACH)]
    assert all(sorted(epoch) == list(range(SHARDS * EACH)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_no_sample_is_favoured(folder: Path) -> None:
    """Six shards in four lanes: no lane runs ahead, so that none is read more often."""
    counts = Counter(numbers(stream(folder), range(10 * SHARDS * EACH)))
    assert len(counts) == SHARDS * EACH
    # what is in the blocks at the end came early, or will come late
    assert all(8 <= count <= 12 for count in counts.values())


def test_the_order_is_shuffled_and_follows_the_seed(folder: Path) -> None:
    first, again, other = (numbers(stream(folder, seed), range(60)) for seed in (3, 3, 4))
    assert first == again != other
    assert first != sorted(first)
    steps = [b - a for a, b in zip(first, first[4:], strict=False)]  # within lanes
    assert Counter(steps)[1] < 20  # unshuffled, nine of ten would be 1


def shares(positions: range, batch_size: int, rank: int, world: int) -> list[int]:
    """Those of a rank, as training deals them out."""
    each = batch_size // world
    return [p for p in positions if p % batch_size // each == rank]


@pytest.mark.parametrize("lanes", [1, 3, 4, 24])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_one_order(folder: Path, lanes: int, world: int) -> None:
    def opened() -> ShardStream:
        return stream(folder, lanes=lanes, batch_size=12)

    alone = numbers(opened(), range(72))
    found: dict[int, int] = {}
    for rank in range(world):
        places = shares(range(72), 12, rank, world)
        found |= dict(zip(places, numbers(opened(), places), strict=True))
    assert [found[p] for p in range(72)] == alone


@pytest.mark.parametrize(
    ("world", "own"),
    [(2, [[0, 1], [2, 3]]), (4, [[0], [1], [2], [3]]), (3, [[0, 1], [1, 2], [2, 3]])],
)
def test_a_rank_opens_the_lanes_of_its_share_alone(
    folder: Path, world: int, own: list[list[int]]
) -> None:
    for rank in range(world):
        data = stream(folder, batch_size=12)
        numbers(data, shares(range(60), 12, rank, world))
        assert [lane.number for lane in data._lanes if lane._held] == own[rank]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("position", [0, 12, 60, 156, 157])
def test_resumed_equals_uninterrupted(folder: Path, before: int, after: int, position: int) -> None:
    def opened() -> ShardStream:
        return stream(folder, batch_size=12)

    whole = numbers(opened(), range(position, position + 48))
    states = []
    for rank in range(before):
        data = opened()
        # one batch was made ahead, as training does
        numbers(data, shares(range(position + 12), 12, rank, before))
        states.append(data.state(position))
    state = merge_states(states)
    found: dict[int, int] = {}
    for rank in range(after):
        data = opened()
        data.load_state(json.loads(json.dumps(state)))
        places = shares(range(position, position + 48), 12, rank, after)
        found |= dict(zip(places, numbers(data, places), strict=True))
    assert [found[p] for p in range(position, position + 48)] == whole


def test_resuming_reads_no_more_than_a_block_of_each_lane(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stream(folder)
    numbers(data, range(200))
    state = data.state(200)
    opened: list[tuple[str, int]] = []
    read = ShardStream.samples_of

    def counted(self: ShardStream, place: str, skip: int):
        opened.append((place, skip))
        return read(self, place, skip)

    monkeypatch.setattr(ShardStream, "samples_of", counted)
    data = stream(folder)
    data.load_state(state)
    assert numbers(data, range(200, 204)) and len(opened) <= 8
    opened.clear()
    assert numbers(stream(folder), range(200, 204)) and len(opened) > 16  # from the beginning


def test_another_stream_is_refused(folder: Path, tmp_path: Path) -> None:
    state = stream(folder).state(9)
    stream(folder).load_state(state)
    for other in (stream(folder, seed=4), stream(folder, lanes=2), stream(folder / "*[0-4].tar")):
        with pytest.raises(DataError, match="not the shards, or not the seed"):
            other.load_state(state)


def test_views_and_captions(folder: Path) -> None:
    data = stream(folder, flip=True, crop="random", caption_column="caption")
    assert data.class_names is None
    one = data.load(5)
    number = int(one.image[0, 0, 0])
    assert one.caption == f"told {number}" and one.name.endswith(f"{number % EACH:04d}")
    assert data.describe(5).caption == one.caption
    generator = torch.Generator().manual_seed(0)
    assert data.load(5, generator).image.shape == (3, 16, 16)
    assert data.captions(12) == [f"told {k}" for k in range(12)]
    labelled = stream(folder, class_column="kind_of", classes=["class 2", "class 1", "class 0"])
    assert labelled.load(5).label == 2 - number % 3


def broken(folder: Path) -> Path:
    members: dict[str, bytes] = {}
    for k in range(20):
        members |= sample(f"{k:04d}", k)
    members["0003.png"] = b"no picture"
    members["0007.png"] = picture(7)[:60]
    del members["0011.txt"]
    return write_tar(folder / "one.tar", members)


def test_broken_samples_are_skipped_counted_and_named(tmp_path: Path) -> None:
    path = broken(tmp_path)
    told: list[Fault] = []
    data = ShardStream(
        WebDatasetConfig.from_dict(
            {
                "urls": str(path),
                "resolution": 16,
                "lanes": 1,
                "shuffle_buffer": 8,
                "max_broken": 0.4,
            }
        ),
        0,
        1,
        told.append,
    )
    found = Counter(numbers(data, range(190)))
    assert set(found) == set(range(20)) - {3, 7, 11}
    # the place of a broken sample goes to another of its block
    assert all(count >= 9 for count in found.values()) and found.total() == 190
    names = {"one.tar/0003", "one.tar/0007", "one.tar/0011"}
    assert {fault.name for fault in data.faults} == names
    assert data.faults == told
    assert data.broken > 3 and data.seen >= 190


def test_a_broken_sample_does_not_move_the_order_of_other_ranks(tmp_path: Path) -> None:
    path = broken(tmp_path)
    alone = numbers(stream(path, max_broken=0.4), range(100))
    ranks = [numbers(stream(path, max_broken=0.4), range(r, 100, 3)) for r in range(3)]
    assert [ranks[p % 3][p // 3] for p in range(100)] == alone


def test_too_many_broken_samples_stop(tmp_path: Path) -> None:
    path = broken(tmp_path)
    with pytest.raises(DataError, match=r"of .* samples are broken .max_broken allows 1.0%.*one.t"):
        numbers(stream(path), range(2000))
    with pytest.raises(DataError, match="no sample in 1 shards is of use"):
        stream(write_tar(tmp_path / "two.tar", {"a.txt": b"words"}), max_broken=1.0).load(0)
    nothing = write_tar(tmp_path / "three.tar", {"a.png": b"?", "a.txt": b"words"})
    with pytest.raises(DataError, match="neither this image nor one of the 7 that were read with"):
        stream(nothing, shuffle_buffer=8).load(7)


def test_a_shard_that_ends_early_is_named_and_one_that_is_gone_stops(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 10)
    cut = tmp_path / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    data = stream(tmp_path, max_broken=0.2)
    found = Counter(numbers(data, range(120)))
    assert [fault.name for fault in data.faults] == ["00001.tar"]
    assert set(range(10)) <= set(found) and not {18, 19} & set(found)
    cut.unlink()
    with pytest.raises(DataError, match="00001.tar: no such file; put the shard back"):
        numbers(data, range(120, 400))


def test_a_look_at_the_beginning_costs_a_block_and_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previews and checks ask for the first positions in the middle of a run."""
    path = broken(tmp_path)
    data = stream(path, lanes=1, shuffle_buffer=8, max_broken=1.0)
    wanted = numbers(data, range(700))
    state, counts = data.state(700), (data.seen, data.broken)
    # of twenty, one without a text is passed by, and two broken pictures keep their places
    assert 735 <= data.seen <= 750 and 3 * 36 <= data.broken <= 3 * 38
    opened: list[int] = []
    read = ShardStream.samples_of

    def counted(self: ShardStream, place: str, skip: int):
        opened.append(skip)
        return read(self, place, skip)

    monkeypatch.setattr(ShardStream, "samples_of", counted)
    for _ in range(3):
        assert numbers(data, range(8)) == wanted[:8]
        assert numbers(data, range(690, 700)) == wanted[690:]
    assert len(opened) <= 3 * 4 and (data.seen, data.broken) == counts
    resumed = stream(path, lanes=1, shuffle_buffer=8, max_broken=1.0)
    resumed.describe(0)
    resumed.load_state(state)
    opened.clear()
    assert numbers(resumed, range(699, 700)) == wanted[699:]
    assert numbers(resumed, range(8)) == wanted[:8]
    assert len(opened) <= 4 and resumed.seen <= 3 * 10


def test_every_rank_counts_what_it_reads(tmp_path: Path) -> None:
    """Of a lane that three ranks share, each reads all and loads a third."""
    members: dict[str, bytes] = {}
    for k in range(1000):
        members |= sample(f"{k:04d}", k % 256)
        if k % 16 == 0:
            del members[f"{k:04d}.txt"]
    data = stream(write_tar(tmp_path / "one.tar", members), lanes=1, max_broken=0.08)
    numbers(data, range(0, 2700, 3))
    assert 2700 < data.seen < 3000
    assert data.broken / data.seen == pytest.approx(1 / 16, rel=0.05)


def test_a_lane_holds_two_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream(folder, lanes=1)
    most: list[int] = []
    read = ShardStream.samples_of

    def watched(self: ShardStream, place: str, skip: int):
        for found in read(self, place, skip):
            most.append(len(self._lanes[0]._held))
            yield found

    monkeypatch.setattr(ShardStream, "samples_of", watched)
    numbers(data, range(200))
    assert max(most) == 1  # beside the one that is being read


def test_no_shard_is_read_by_two_lanes_at_once(tmp_path: Path) -> None:
    data = stream(write_shards(tmp_path, 2, 50), lanes=16, shuffle_buffer=16, batch_size=16)
    found = numbers(data, range(80))
    assert len(data._lanes) == 2 and len(set(found)) == 80
