"""Memory over time while shards of images are streamed.

    python -m benchmarks.stream_memory [COUNT] [--size 64] [--folder FOLDER]

COUNT pictures (200,000 by default) are written as WebDataset shards of a thousand, unless FOLDER
holds them already, and read once as training would read them: decoded, with random crops, in
batches. Prints the resident memory every few seconds and how much it grew after the first minute,
or after the first quarter where the whole takes less than four minutes.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mezzotint.cli.progress import progress
from mezzotint.data import ShardStream, WebDatasetConfig
from mezzotint.rng import keyed_generator

ALLOWED_MIB = 100.0
EACH = 1000  # pictures in a shard
BATCH = 64


def write_shards(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of random colours with captions, a thousand to a shard."""
    rng = np.random.default_rng(0)
    with progress("pictures written") as on_progress:
        for start in range(0, count, EACH):
            with tarfile.open(folder / f"{start // EACH:05d}.tar", "w") as tar:
                for k in range(start, min(count, start + EACH)):
                    blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                    file = io.BytesIO()
                    blocks.resize((size, size), Image.Resampling.BILINEAR).save(file, "JPEG")
                    parts = {"jpg": file.getvalue(), "txt": f"picture {k}".encode()}
                    for kind, content in parts.items():
                        member = tarfile.TarInfo(f"{k:09d}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            on_progress(min(count, start + EACH), count)


def resident_mib() -> float:
    """Return the memory of this process that is in use now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def measure(folder: Path, count: int, size: int) -> dict[str, object]:
    """Read all pictures, and the memory meanwhile."""
    config = {
        "urls": str(folder),
        "resolution": size * 3 // 4,
        "crop": "random",
        "flip": True,
    }
    stream = ShardStream(WebDatasetConfig.from_dict(config), 0, BATCH)
    console = Console(soft_wrap=True)
    begun, shown = time.perf_counter(), 0.0
    samples: list[tuple[float, float, int]] = []
    for start in range(0, count - BATCH + 1, BATCH):
        torch.stack(
            [stream.load(p, keyed_generator(0, p)).image for p in range(start, start + BATCH)]
        )
        passed = time.perf_counter() - begun
        if passed - shown >= 2.0:
            shown = passed
            samples.append((passed, resident_mib(), start + BATCH))
            console.print(f"{passed:7.1f} s  {samples[-1][1]:8.1f} MiB  {start + BATCH:,} pictures")
    seconds = time.perf_counter() - begun
    samples.append((seconds, resident_mib(), count))
    settled = next(mib for passed, mib, _ in samples if passed >= min(60.0, seconds / 4))
    growth = max(mib for passed, mib, _ in samples if passed >= min(60.0, seconds / 4)) - settled
    return {
        "pictures": count,
        "size": size,
        "seconds": seconds,
        "pictures_per_second": count / seconds,
        "settled_mib": settled,
        "growth_mib": growth,
        "faults": len(stream.faults),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/stream-memory.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.tar")):
            write_shards(folder, options.count, options.size)
        result = measure(folder, options.count, options.size)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(soft_wrap=True)
    console.print(result)
    console.print(f"grew by {result['growth_mib']:.1f} MiB ({ALLOWED_MIB:.0f} are allowed)")


if __name__ == "__main__":
    main()
