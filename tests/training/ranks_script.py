"""What each rank does in test_ranks.py: trains recipes one after the other, then says who it is."""

import sys
from pathlib import Path

from rich.console import Console

from mezzotint.training.run import train

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
