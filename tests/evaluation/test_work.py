"""The folder of an evaluation belongs to one at a time, and ranks do not wait for the dead."""

import os
from pathlib import Path
from typing import Any

import pytest

from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluation import shards
from mezzotint.evaluation.shards import tell_failure, wait_for
from mezzotint.evaluation.work import working_folder

SETTINGS: dict[str, Any] = {"protocol": {"name": "tiny"}}


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_two_at_once_do_not_share_a_folder() -> None:
    with working_folder(None, SETTINGS) as first, working_folder(None, SETTINGS) as second:
        assert first != second and second.parent == first.parent
        (second / "evaluated").mkdir()
    assert not first.exists() and not second.exists()
    with working_folder(None, SETTINGS) as again:
        assert again == first


def test_a_chosen_folder_in_use_is_refused(tmp_path: Path) -> None:
    with working_folder(tmp_path / "work", SETTINGS) as folder:
        with (
            pytest.raises(ConfigError, match="another evaluation is at work there"),
            working_folder(folder, SETTINGS),
        ):
            pass
        assert folder.is_dir()
    with working_folder(tmp_path / "work", SETTINGS) as again:
        assert again == folder


def test_what_an_error_stopped_stays() -> None:
    with pytest.raises(DataError), working_folder(None, SETTINGS) as folder:
        (folder / "evaluated").mkdir()
        raise DataError("a disk is full")
    with working_folder(None, SETTINGS) as again:
        assert again == folder and (folder / "evaluated").is_dir()


@pytest.mark.parametrize("last", [0, 1])
def test_the_last_rank_removes_the_folder(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    contexts = [working_folder(None, SETTINGS) for _ in range(2)]
    folders: list[Path] = []
    for rank, context in enumerate(contexts):
        as_rank(monkeypatch, rank)
        folders.append(context.__enter__())
    assert folders[0] == folders[1]
    for rank in (1 - last, last):
        assert folders[0].is_dir()
        as_rank(monkeypatch, rank)
        contexts[rank].__exit__(None, None, None)
    assert not folders[0].exists()


def test_a_rank_that_fails_tells_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 1)
    with pytest.raises(DataError), working_folder(tmp_path / "work", SETTINGS):
        raise DataError("007.png: broken")
    as_rank(monkeypatch, 0)
    with pytest.raises(DataError, match=r"process 1 failed: 007\.png: broken"):
        wait_for(tmp_path / "work", lambda: False)


def test_what_failed_in_an_earlier_run_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 1)
    tell_failure(tmp_path, DataError("long ago"))
    (marker,) = tmp_path.iterdir()
    os.utime(marker, (1.0, 1.0))
    asked: list[None] = []
    wait_for(tmp_path, lambda: asked.append(None) or len(asked) > 2)
    assert len(asked) == 3


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(DataError, match="have done nothing for 0 minutes; run it again"):
        wait_for(tmp_path, lambda: False)


def test_one_process_alone_leaves_no_word(tmp_path: Path) -> None:
    with pytest.raises(DataError), working_folder(tmp_path / "work", SETTINGS):
        raise DataError("007.png: broken")
    assert not list((tmp_path / "work").glob(".failed-*"))
