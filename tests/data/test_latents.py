"""Latents that are kept: encoded once, anew where anything changed, and never taken for others."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import EmojiData, EmojiDataConfig, FolderData, FolderDataConfig, ImageData
from mezzotint.data.latent_store import find_shards
from mezzotint.data.latents import LatentCache, build_latent_cache, load_view
from mezzotint.errors import DataError
from mezzotint.latent_diffusion import LatentNormalization, encode_moments
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig

T = TypeVar("T")
CPU = torch.device("cpu")


def autoencoder(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    config = AutoencoderKLConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    return AutoencoderKL(config).eval()


@pytest.fixture(scope="module")
def stage() -> AutoencoderKL:
    return autoencoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(10):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k:02d}.png")
    return tmp_path / "images"


def opened(folder: Path, **settings: object) -> FolderData:
    values = {"path": str(folder), "resolution": 16, "crop": "random", "flip": True, **settings}
    return FolderData(FolderDataConfig.from_dict(values))


def build(data: ImageData, stage: AutoencoderKL, place: Path, **settings: Any) -> LatentCache:
    settings = {"variants": 2, "seed": 7, "device": CPU, **settings}
    return build_latent_cache(data, stage, folder=place, **settings)


def check(cache: LatentCache, data: ImageData, stage: AutoencoderKL, views: int = 2) -> None:
    """Every latent is that of its image and view."""
    assert len(cache) == len(data)
    for index in range(len(data)):
        for view in range(views):
            image = load_view(data, index, view, 7).image
            with torch.no_grad():
                wanted = encode_moments(stage, image[None].float() / 127.5 - 1.0)[0]
            # one image at a time and 32 at once may differ in the last bits
            torch.testing.assert_close(cache.moments(index, view), wanted, rtol=1e-4, atol=1e-5)


def test_what_was_encoded_is_found(folder: Path, stage: AutoencoderKL, tmp_path: Path) -> None:
    data = opened(folder)
    done: list[tuple[int, int]] = []
    cache = build(data, stage, tmp_path / "c", on_progress=lambda *told: done.append(told))
    assert (cache.report.encoded, cache.report.kept) == (20, 0) and done[-1] == (20, 20)
    check(cache, data, stage)
    again = build(opened(folder), stage, tmp_path / "c")
    assert (again.report.encoded, again.report.kept) == (0, 20) and again.key == cache.key
    for index in range(10):
        assert torch.equal(again.moments(index, 1), cache.moments(index, 1))
    more = build(data, stage, tmp_path / "c", variants=3)
    assert (more.report.encoded, more.report.kept) == (10, 20)
    check(more, data, stage, 3)


def test_an_edited_image_alone_is_encoded_anew(
    folder: Path, stage: AutoencoderKL, tmp_path: Path
) -> None:
    first = build(opened(folder), stage, tmp_path / "c")
    Image.new("RGB", (24, 32), (9, 99, 200)).save(folder / "04.png")
    (folder / "00.png").unlink()  # and all others stand elsewhere
    Image.new("RGB", (24, 32), (99, 9, 200)).save(folder / "99.png")
    data = opened(folder)
    cache = build(data, stage, tmp_path / "c")
    assert (cache.report.encoded, cache.report.kept, cache.report.unused) == (4, 16, 4)
    check(cache, data, stage)
    assert torch.equal(cache.moments(0, 1), first.moments(1, 1))


def test_another_crop_view_autoencoder_or_statistics_are_other_latents(
    folder: Path, stage: AutoencoderKL, tmp_path: Path
) -> None:
    data = opened(folder)
    build(data, stage, tmp_path / "c", variants=1)
    other = autoencoder(1)
    wide = opened(folder, resolution=32, buckets={"multiple": 8})
    measured = LatentNormalization.from_scale_factor(0.5)
    settings: list[tuple[ImageData, AutoencoderKL, dict[str, Any]]] = [
        (opened(folder, crop="center"), stage, {}),
        (opened(folder, resolution=20), stage, {}),
        (wide, stage, {}),
        (data, other, {}),
        (data, stage, {"normalization": measured}),
        (data, stage, {"dtype": torch.float16}),
    ]
    for changed, encoder, more in settings:
        cache = build(changed, encoder, tmp_path / "c", variants=1, **more)
        assert (cache.report.encoded, cache.report.kept) == (10, 0)
        if more.get("dtype") is None:
            check(cache, changed, encoder, 1)
    assert build(wide, stage, tmp_path / "c").moments(0, 0).shape == (8, 12, 20)
    found = build(data, stage, tmp_path / "c", variants=1)
    assert (found.report.encoded, found.report.kept) == (0, 10)
    assert len(found.unused) == len(find_shards(tmp_path / "c")) - 1


def test_equal_images_are_encoded_once(folder: Path, stage: AutoencoderKL, tmp_path: Path) -> None:
    (folder / "twin.png").write_bytes((folder / "03.png").read_bytes())
    data = opened(folder)
    cache = build(data, stage, tmp_path / "c")
    assert (len(cache), cache.report.encoded) == (11, 20)
    check(cache, data, stage)


def test_data_drawn_by_a_rule_are_kept_as_a_whole(stage: AutoencoderKL, tmp_path: Path) -> None:
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=16))
    assert build(data, stage, tmp_path / "c").report.encoded == 2 * len(data)
    cache = build(data, stage, tmp_path / "c")
    assert cache.report.encoded == 0
    check(cache, data, stage)
    other = EmojiData(EmojiDataConfig(subset="demo-48", resolution=16, background="grey"))
    assert build(other, stage, tmp_path / "c").report.kept == 0


@pytest.mark.parametrize("damage", ["a byte", "the header", "its end", "all"])
def test_a_damaged_shard_is_found_and_rebuilt(
    folder: Path,
    stage: AutoencoderKL,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mezzotint.data.kept._SHARD", 1 << 14)  # eight views
    data, place = opened(folder), tmp_path / "c"
    whole = build(data, stage, place)
    names = find_shards(place)
    assert len(names) == 3
    path = place / names[1]
    content = bytearray(path.read_bytes())
    if damage == "a byte":
        content[-100] ^= 1
    elif damage == "the header":
        content[20] ^= 1
    elif damage == "its end":
        content = content[:-8]
    else:
        content.clear()
    before = [whole.moments(index, view) for index in range(10) for view in range(2)]
    path.unlink()  # what is mapped keeps the old one
    path.write_bytes(content)
    cache = build(data, stage, place)
    assert len(cache.report.damaged) == 1 and names[1] in cache.report.damaged[0]
    assert 0 < cache.report.encoded <= 8 and cache.report.kept == 20 - cache.report.encoded
    after = [cache.moments(index, view) for index in range(10) for view in range(2)]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert build(data, stage, place).report.encoded == 0


def test_whoever_is_stopped_goes_on(
    folder: Path, stage: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.data.kept._SHARD", 1 << 12)  # two views

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(opened(folder), stage, tmp_path / "c", on_progress=stop)
    cache = build(opened(folder), stage, tmp_path / "c")
    assert (cache.report.kept, cache.report.encoded) == (8, 12)
    check(cache, opened(folder), stage)


def test_float16_is_close_and_refuses_what_it_cannot_hold(
    folder: Path, stage: AutoencoderKL, tmp_path: Path
) -> None:
    data = opened(folder)
    whole = build(data, stage, tmp_path / "a")
    half = build(data, stage, tmp_path / "b", dtype=torch.float16)
    for index in range(10):
        torch.testing.assert_close(
            half.moments(index, 0), whole.moments(index, 0), rtol=2**-11, atol=1e-7
        )
    assert half.moments(0, 0).dtype == torch.float32
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    loud = autoencoder()
    with torch.no_grad():
        loud.quant_conv.weight *= 1e7
    with pytest.raises(DataError, match="beyond what float16 holds"):
        build(data, loud, tmp_path / "b", dtype=torch.float16)


class Threads:
    """Processes that build together, as threads."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world)
        self.values: list[Any] = [None] * world


class Peer:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.world = threads, rank, threads.world

    def gather_values(self, value: T) -> list[T]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait()
        found = list(self.threads.values)
        self.threads.barrier.wait()
        return found


def test_ranks_share_the_work(folder: Path, stage: AutoencoderKL, tmp_path: Path) -> None:
    data, threads = opened(folder), Threads(3)
    done: Counter[int] = Counter()
    caches: dict[int, LatentCache] = {}

    def run(rank: int) -> None:
        def count(number: int, total: int) -> None:
            done[rank] = number

        caches[rank] = build(
            data, stage, tmp_path / "c", peers=Peer(threads, rank), on_progress=count
        )

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert done == {0: 7, 1: 7, 2: 6}
    assert {cache.report.encoded for cache in caches.values()} == {20}
    assert len({cache.key for cache in caches.values()}) == 1
    for cache in caches.values():
        check(cache, data, stage)
    assert build(data, stage, tmp_path / "c").report.encoded == 0
