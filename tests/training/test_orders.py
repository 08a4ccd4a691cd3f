"""Which image stands where: balanced classes, and batches of one aspect ratio."""

from collections import Counter

import pytest
from PIL import Image

from mezzotint.data import FolderData, FolderDataConfig
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig
from mezzotint.errors import ConfigError
from mezzotint.training.batches import DataOrder
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.orders import (
    BucketOrder,
    ClassBalancedOrder,
    LeavingOut,
    build_order,
    spread,
)

LABELS = [0] * 12 + [1] * 3 + [4] * 5


def test_classes_come_equally_often_and_their_images_in_turn():
    order = ClassBalancedOrder(LABELS, seed=5)
    found = [order.index(k) for k in range(180)]
    for start in range(0, 180, 3):
        assert sorted(LABELS[k] for k in found[start : start + 3]) == [0, 1, 4]
    counts = Counter(found)  # 60 visits of each class
    assert {counts[k] for k in range(12)} == {5}
    assert {counts[k] for k in range(12, 15)} == {20}
    assert {counts[k] for k in range(15, 20)} == {12}
    for label, size in ((0, 12), (1, 3), (4, 5)):
        visits = [k for k in found if LABELS[k] == label]
        epochs = [tuple(visits[n : n + size]) for n in range(0, 60, size)]
        assert all(len(set(epoch)) == size for epoch in epochs) and len(set(epochs)) > 1
    again = ClassBalancedOrder(LABELS, seed=5)
    assert [again.index(k) for k in (150, 7, 179)] == [found[150], found[7], found[179]]
    assert [ClassBalancedOrder(LABELS, seed=6).index(k) for k in range(60)] != found[:60]


@pytest.mark.parametrize("batch", [1, 4, 5, 16])
def test_a_batch_is_of_one_bucket_and_an_epoch_of_all_images(batch):
    order = BucketOrder(LABELS, batch, seed=5)
    length = batch * sum(-(-size // batch) for size in (12, 3, 5))
    epochs = []
    for epoch in range(3):
        found = [order.index(epoch * length + k) for k in range(length)]
        assert set(found) == set(range(20))
        for start in range(0, length, batch):
            assert len({LABELS[k] for k in found[start : start + batch]}) == 1
        counts = Counter(found)
        for label, size in ((0, 12), (1, 3), (4, 5)):
            seen = [counts[k] for k in range(20) if LABELS[k] == label]
            assert max(seen) - min(seen) <= 1 and sum(seen) == -(-size // batch) * batch
        epochs.append(found)
    assert epochs[0] != epochs[1] != epochs[2]
    again = BucketOrder(LABELS, batch, seed=5)
    assert [again.index(k) for k in (2 * length, 3)] == [epochs[2][0], epochs[0][3]]


@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_left_out_of_a_bucket_is_replaced_by_one_of_its_size(batch):
    """Even where all of its batch are left out, or it is alone in it."""
    order = BucketOrder(LABELS, batch, seed=5)
    without = LeavingOut(order, order.others)
    start = next(k for k in range(0, 100, batch) if LABELS[order.index(k)] == 0)
    without.excluded = frozenset(order.index(start + k) for k in range(batch))
    for place in range(200):
        found = without.index(place)
        assert found not in without.excluded
        assert LABELS[found] == LABELS[order.index(place)]


@pytest.fixture
def folder(tmp_path):
    """Two classes of two shapes, one class four times as large."""
    for name, count in (("many", 8), ("few", 2)):
        (tmp_path / "things" / name).mkdir(parents=True)
        for k in range(count):
            size = (64, 32) if k % 2 else (32, 64)
            Image.new("RGB", size, (9 * k, 50, 90)).save(tmp_path / "things" / name / f"{k}.png")
    return tmp_path / "things"


def test_the_configuration_chooses_the_order(folder):
    def opened(**settings):
        return FolderData(FolderDataConfig(path=str(folder), resolution=32, **settings))

    assert isinstance(build_order(opened(), 4, 0).order, DataOrder)
    balanced = build_order(opened(balance="class"), 4, 0)
    data = opened(balance="class")
    labels = Counter(data.describe(balanced.index(k)).label for k in range(40))
    assert labels == {0: 20, 1: 20}
    data = opened(buckets={"multiple": 8})
    order = build_order(data, 4, 0)
    assert isinstance(order.order, BucketOrder)
    for step in range(6):
        shapes = {data.load(order.index(4 * step + k)).image.shape for k in range(4)}
        assert len(shapes) == 1


def recipe(tiny, folder, steps, **changes):
    data = {"kind": "folder", "path": str(folder), "resolution": 32, "buckets": {"multiple": 16}}
    changes = {
        "data": data,
        "conditioning": {"kind": "class", "width": 32},
        "accumulate": 2,
        "latent_variants": 2,
        "budget": {"max_steps": steps},
        **changes,
    }
    return tiny.diffusion(**changes)


@pytest.mark.parametrize("views", [0, 2])
def test_a_model_trains_on_buckets_and_resumes(tiny, folder, tmp_path, views):
    whole = tiny.train(recipe(tiny, folder, 5, latent_variants=views), tmp_path / "whole")
    part = tiny.train(recipe(tiny, folder, 2, latent_variants=views), tmp_path / "part")
    tiny.train(recipe(tiny, folder, 5, latent_variants=views), part, resume=True)
    a, _ = newest_checkpoint(whole / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None and a.step == b.step == 5
    for name, tensor in a.tensors["weights"].items():
        assert tensor.equal(b.tensors["weights"][name]), name


def test_what_cannot_be_trained_on_buckets_is_told(tiny, folder):
    with pytest.raises(ConfigError, match="buckets: an autoencoder is trained on squares"):
        data = {"kind": "folder", "path": str(folder), "resolution": 32}
        tiny.autoencoder(data={**data, "buckets": {"multiple": 16}})
    with pytest.raises(ConfigError, match="buckets: .*low_res.* takes squares"):
        changes = {"unet__cross_attention_dim": None, "unet__in_channels": 7}
        recipe(tiny, folder, 1, conditioning={"kind": "low_res"}, **changes)


@pytest.mark.parametrize(("count", "length"), [(16, 16_384), (16, 96), (8, 8), (8, 11), (8, 3)])
def test_previews_are_of_all_parts(count: int, length: int) -> None:
    chosen = spread(PortraitsData(PortraitsDataConfig(count=length)), count)
    count = min(count, length)
    parts = [range(k * length // count, (k + 1) * length // count) for k in range(count)]
    assert all(place in part for place, part in zip(chosen, parts, strict=True))


def test_previews_of_data_that_come_round_differ() -> None:
    data = PortraitsData(PortraitsDataConfig(count=16_384))  # 256 concepts, again and again
    assert len({data.describe(k).label for k in spread(data, 16)}) > 12
