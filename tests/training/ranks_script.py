"""What each rank does in test_ranks.py: trains recipes one after the other, names its threads."""

import atexit
import sys
from pathlib import Path


def name_threads() -> None:
    """Say which of the kernel's threads are left; of a library's own Python knows nothing."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    sys.stdout.write(f"left at the end: {' '.join(sorted(names))}\n")  # one write: ranks interleave
    sys.stdout.flush()


atexit.register(name_threads)  # before all others, so that it is called last

from rich.console import Console  # noqa: E402

from mezzotint.training.run import train  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for line in sys.argv[2:]:
        recipe, _, resume = line.partition(":")
        train(
            folder / f"{recipe}.yaml",
            output=folder / "runs" / recipe,
            resume=resume == "resume",
            console=Console(quiet=True),
        )
