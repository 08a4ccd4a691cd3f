"""Tar files of samples: which there are, what stands in them, and where they are damaged."""

import contextlib
import functools
import gzip
import http.server
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import picture, sample, write_shards, write_tar

from mezzotint.data import ShardData, WebDatasetConfig, open_data
from mezzotint.data.shards import DamagedShard, find_shards, index_shard, read_shard
from mezzotint.errors import ConfigError, DataError


def open_shards(urls: object, **settings: object) -> ShardData:
    values = {"urls": str(urls), "resolution": 16, "stream": False, **settings}
    data = open_data(WebDatasetConfig.from_dict(values))
    assert isinstance(data, ShardData)
    return data


def test_patterns_name_shards_once_and_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 1)
    names = [str(tmp_path / f"0000{k}.tar") for k in range(3)]
    for pattern in ("0000{0..2}.tar", "*.tar", "{00000,00001,00002}.tar", "0000[0-2].tar", ""):
        assert list(find_shards(str(tmp_path / pattern))) == names, pattern
    both = [str(tmp_path / "00002.tar"), str(tmp_path / "*.tar")]
    assert list(find_shards(both)) == [names[2], *names[:2]]
    assert len(find_shards("s3://bucket/{000..011}-{a,b}.tar")) == 24
    with pytest.raises(DataError, match="no such shard.*did you mean"):
        find_shards(str(tmp_path / "00007.tar"))
    with pytest.raises(DataError, match="no range of shards"):
        find_shards("{9..1}.tar")


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_samples_are_what_tarfile_reads(tmp_path: Path, tar_format: int) -> None:
    """Names beyond 100 letters stand in headers of their own, which each format has of its kind."""
    members = sample("a", 1) | sample("folder/b.c", 2)
    if tar_format != tarfile.USTAR_FORMAT:
        members |= sample("long/" * 30 + "ä", 3)
    path = write_tar(tmp_path / "one.tar", members | {"z.mp4": b"film", "z.jpeg": picture(4)})
    found = {
        f"{s.name.removeprefix('one.tar/')}.{kind}": part
        for s in read_shard(str(path))
        for kind, part in s.parts.items()
    }
    wanted = {name.replace("b.c.", "b."): part for name, part in members.items()}
    kinds = {f"folder/b.c.{kind}" for kind in ("png", "txt", "json")}
    assert {name for name in found if not name.startswith("folder/b")} == {
        *(name for name in members if not name.startswith("folder/b")),
        "z.jpeg",
    }
    # a key ends at the first dot, so these are of no known kind
    assert not kinds & set(found) and "folder/b.png" in wanted
    with path.open("rb") as file:
        for name, parts in index_shard(path):
            for kind, member in parts.items():
                file.seek(member.offset)
                assert file.read(member.size) == found[f"{name.removeprefix('one.tar/')}.{kind}"]


def test_skipping_is_reading_from_the_middle(tmp_path: Path) -> None:
    path = str(write_shards(tmp_path, 1, 7) / "00000.tar")
    whole = list(read_shard(path))
    for skip in (0, 1, 6, 7, 9):
        assert list(read_shard(path, skip)) == whole[skip:]


def test_damage_is_told_where_tarfile_would_stop_in_silence(tmp_path: Path) -> None:
    path = write_shards(tmp_path, 1, 6) / "00000.tar"
    content = path.read_bytes()
    with path.open("rb") as file:
        offsets = [m.offset for _, parts in index_shard(path) for m in parts.values()]
        del file
    damaged = bytearray(content)
    damaged[offsets[9] - 512 : offsets[9]] = b"\xff" * 512  # the header of the fourth picture
    path.write_bytes(damaged)
    read: list[str] = []
    with pytest.raises(DamagedShard, match=f"damaged at byte {offsets[9] - 512:,}"):
        read.extend(s.name for s in read_shard(str(path)))
    assert len(read) == 2  # the third is not known to be complete
    path.write_bytes(content[: offsets[9] + 10])
    with pytest.raises(DamagedShard, match="within a file"):
        list(read_shard(str(path)))
    path.write_bytes(b"this is no tar file, but text" * 100)
    with pytest.raises(DamagedShard, match="damaged at byte 0"):
        list(read_shard(str(path)))
    data = open_shards(write_shards(tmp_path / "b", 2, 6), max_broken=1.0)
    (tmp_path / "b/00001.tar").write_bytes(content[: offsets[9] + 10])
    data = open_shards(tmp_path / "b", max_broken=1.0)
    assert len(data) == 9
    assert [fault.name for fault in data.faults] == ["00001.tar"]


@pytest.mark.parametrize("kept", [0, 9, 18])
def test_an_end_between_two_files_is_damage(tmp_path: Path, kept: int) -> None:
    """Cut there, a tar file has whole members alone: only the zeros at its end are missing."""
    path = write_shards(tmp_path, 1, 6) / "00000.tar"
    content = path.read_bytes()
    headers = [m.offset - 512 for _, parts in index_shard(path) for m in parts.values()]
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    part = content[: [*headers, end][kept]]
    path.write_bytes(part)
    (tmp_path / "00000.tar.gz").write_bytes(gzip.compress(part))
    for place in (path, tmp_path / "00000.tar.gz"):
        read: list[str] = []
        with pytest.raises(DamagedShard, match=f"ends at byte {len(part):,}, without a tar file's"):
            read.extend(s.name for s in read_shard(str(place)))
        assert len(read) == max(kept // 3 - 1, 0)
    with pytest.raises(DamagedShard, match="without a tar file's end mark"):
        list(index_shard(path))


def test_shards_have_an_index(tmp_path: Path) -> None:
    data = open_shards(write_shards(tmp_path, 3, 4), class_column="kind_of")
    assert (len(data), data.class_names) == (12, ("class 0", "class 1", "class 2"))
    for k in range(12):
        example = data.load(k)
        assert int(example.image[0, 0, 0]) == k
        assert (example.caption, example.label) == (f"number {k}", k % 3)
    assert open_shards(tmp_path, caption_column="caption").load(5).caption == "told 5"
    assert open_shards(tmp_path, caption_column=None).load(5).caption is None
    again = open_shards(tmp_path, cache_limit_mib=0, class_column="kind_of")
    assert torch.equal(again.load(7).image, data.load(7).image)
    assert again.fingerprint == data.fingerprint


def test_samples_of_no_use_are_named(tmp_path: Path) -> None:
    members = sample("a", 1) | {"b.png": picture(2), "c.txt": b"nothing to see"}
    members |= {"d.png": b"no picture", "d.txt": b"words"}
    data = open_shards(write_tar(tmp_path / "one.tar", members), max_broken=0.8)
    assert len(data) == 1
    reasons = {fault.name: fault.reason for fault in data.faults}
    assert reasons["one.tar/b"] == "no text in 'txt'" and reasons["one.tar/c"] == "no image"
    assert "cannot identify" in reasons["one.tar/d"]
    with pytest.raises(DataError, match="3 of 4 images are broken"):
        open_shards(tmp_path / "one.tar")
    with pytest.raises(DataError, match="no JSON beside it"):
        open_shards(tmp_path / "one.tar", caption_column="told")


def test_what_a_stream_cannot_do_is_told() -> None:
    for settings, told in (
        ({"balance": "class"}, "balance: a stream has no index"),
        ({"class_column": "cls"}, "classes: a stream does not know its classes"),
        ({"shuffle_buffer": 3}, "shuffle_buffer 3 is less than one image for each of the 16"),
    ):
        with pytest.raises(ConfigError, match=told):
            WebDatasetConfig.from_dict({"urls": "x", **settings})
    with pytest.raises(DataError, match="only uncompressed shards on the disk have an index"):
        open_shards("https://example.org/0.tar")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the folder over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with serving(functools.partial(Quiet, directory=str(tmp_path))) as address:
        yield address


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_shards_are_read_over_http_and_unpacked(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, 1, 5)
    wanted = [s.parts for s in read_shard(str(tmp_path / "00000.tar"))]
    assert [s.parts for s in read_shard(f"{server}/00000.tar?token=1")] == wanted
    assert [s.parts for s in read_shard(f"{server}/00000.tar", skip=3)] == wanted[3:]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    assert [s.parts for s in read_shard(f"{server}/a.tar.gz")] == wanted
    assert [s.parts for s in read_shard(str(tmp_path / "a.tar.gz"))] == wanted
    monkeypatch.setattr("mezzotint.data.shards.time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"00009.tar: cannot be read: HTTP Error 404"):
        list(read_shard(f"{server}/00009.tar"))


def test_a_connection_that_drops_between_two_files_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path, 1, 5) / "00000.tar"
    content, wanted = path.read_bytes(), [s.parts for s in read_shard(str(path))]
    cut = [m.offset - 512 for _, parts in index_shard(path) for m in parts.values()][6]
    asked: list[str] = []

    class Dropping(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if len(asked) % 3 == 0 else content[:cut])

        def log_message(self, format: str, *args: object) -> None: ...

    monkeypatch.setattr("mezzotint.data.shards.time.sleep", lambda seconds: None)
    with serving(Dropping) as address:
        assert [s.parts for s in read_shard(f"{address}/00000.tar")] == wanted
    assert len(asked) == 3
