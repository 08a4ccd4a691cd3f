"""One of several processes that train a stage; started by torchrun, see `run_piece`.

python -m tools.train_shipped.stage MODEL PLAN WORK STAGE STOP
"""

import sys
from pathlib import Path

from mezzotint.errors import MezzotintError
from tools.train_shipped.programme import Programme, train_stage


def main() -> int:
    """Train until the time is up; exit code 2 for a mistake that is told in words."""
    model, plan, work, stage, stop = sys.argv[1:]
    try:
        train_stage(Programme(model, Path(plan), Path(work)), stage, float(stop), "cpu")
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
