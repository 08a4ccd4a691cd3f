"""Memory and time of one pass of many pictures through a feature network.

    python -m benchmarks.features [FOLDER] [--count 50000] [--size 64] [--network mobilenet-v2]

Without FOLDER, that many pictures of random blocks are written to a temporary folder first, which
is not measured. Prints the peak of resident memory, the time a picture took, and the FID between
every other picture and the rest, and writes all of it as JSON.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from mezzotint.cli.progress import progress
from mezzotint.device import threads
from mezzotint.evaluation.distributions import FeatureStatistics, frechet_distance
from mezzotint.evaluation.pictures import PictureFolder
from mezzotint.evaluation.shards import FeaturePass, NetworkSpec, run_pass
from mezzotint.models.features import FEATURE_NETWORKS, load_features, metric_name

BATCH = 32
LIMIT_GIB = 2.0


def write_pictures(folder: Path, count: int, size: int) -> None:
    """Write pictures of 8 x 8 blocks in random colours, a thousand to a sub-folder."""
    rng = np.random.default_rng(0)
    for k in range(count):
        place = folder / f"{k // 1000:03d}"
        place.mkdir(exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        blocks.resize((size, size), Image.Resampling.BICUBIC).save(
            place / f"{k:06d}.png", compress_level=1
        )


def peak_mib(who: int) -> float:
    """Return the most resident memory that this process, or one that it started, ever had."""
    return resource.getrusage(who).ru_maxrss / 1024


def measure(folder: Path, network: str, count: int, processes: int) -> dict[str, float | int | str]:
    """See the pictures of a folder through a network, and compare one half with the other."""
    opened = time.perf_counter()
    pictures = PictureFolder(folder, limit=count)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work, progress("features") as on_progress:
        job = FeaturePass(
            source=pictures,
            networks=(NetworkSpec(network),),
            resize=FEATURE_NETWORKS[network].resize,
            batch_size=BATCH,
            folder=Path(work),
            device="cpu",
        )
        seen = run_pass(job, processes=processes, on_progress=on_progress)
        assert seen is not None
    seconds = time.perf_counter() - begun
    features = seen.features[network]
    fid = frechet_distance(
        FeatureStatistics.of(features[::2]), FeatureStatistics.of(features[1::2])
    )
    size = pictures.record
    return {
        "pictures": len(pictures),
        "size": f"{size.width} x {size.height}",
        "network": network,
        "processes": processes,
        "threads": threads(),
        "opening_ms_per_picture": 1000 * (begun - opened) / len(pictures),
        "ms_per_picture": 1000 * seconds / len(pictures),
        "decoding_ms_per_picture": 1000 * seen.pictures_seconds / len(pictures),
        "network_ms_per_picture": 1000 * seen.features_seconds / len(pictures),
        "peak_mib": peak_mib(resource.RUSAGE_SELF),
        "peak_mib_of_a_worker": peak_mib(resource.RUSAGE_CHILDREN) if processes > 1 else 0.0,
        metric_name("fid_of_halves", network): fid,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--network", default="mobilenet-v2", choices=sorted(FEATURE_NETWORKS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/features.json"))
    options = parser.parse_args()
    load_features(options.network)  # weights that are missing are told before pictures are written
    with tempfile.TemporaryDirectory() as temporary:
        if options.folder is None:
            write_pictures(Path(temporary), options.count, options.size)
        result = measure(
            options.folder or Path(temporary), options.network, options.count, options.processes
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(soft_wrap=True)
    console.print(result)
    peak = max(float(result["peak_mib"]), float(result["peak_mib_of_a_worker"])) / 1024
    console.print(
        f"{result['pictures']:,} pictures at {result['ms_per_picture']:.2f} ms each; at most"
        f" {peak:.2f} GiB ({LIMIT_GIB:.0f} are allowed)"
    )


if __name__ == "__main__":
    main()
