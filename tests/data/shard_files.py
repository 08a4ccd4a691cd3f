"""Shards for tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture of one colour, which is its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, number: int) -> dict[str, bytes]:
    told = {"caption": f"told {number}", "kind_of": f"class {number % 3}"}
    return {
        f"{key}.png": picture(number),
        f"{key}.txt": f"number {number}".encode(),
        f"{key}.json": json.dumps(told).encode(),
    }


def write_shards(folder: Path, shards: int, each: int) -> Path:
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for k in range(each):
            members |= sample(f"{shard:05d}{k:04d}", shard * each + k)
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder
