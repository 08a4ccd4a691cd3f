"""Train a shipped model in pieces of a time budget; the same command goes on.

python -m tools.train_shipped emoji --budget 9m
"""

import argparse
import re
import sys
import time
from pathlib import Path

from mezzotint.device import select_device
from mezzotint.errors import ConfigError, MezzotintError
from tools.train_shipped.carry import carry_in, carry_out
from tools.train_shipped.programme import (
    Programme,
    is_finished,
    is_spent,
    open_programme,
    run_piece,
    steps_done,
)
from tools.train_shipped.ship import ship, take_shipped

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(budget: str) -> float:
    """Return a time such as ``9m``, ``90s`` or ``1.5h`` in seconds.

    Raises:
        ConfigError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if found is None or not float(found[1]):
        raise ConfigError(f"--budget {budget}: expected a time such as 9m, 90s or 1.5h")
    return float(found[1]) * _UNITS[found[2]]


def standing(programme: Programme) -> list[str]:
    """Say how far each stage is."""
    lines: list[str] = []
    for stage in programme.stages:
        run, most = programme.work / stage, programme.recipe(stage).budget.max_steps
        done = f"step {steps_done(run):,}" + (f" of {most:,}" if most is not None else "")
        if is_finished(run):
            done = "finished"
        elif is_spent(programme, stage):
            done = "not needed, as what was begun from it is finished"
        lines.append(f"{programme.model}, {stage}: {done}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Train a piece; exit code 2 for a mistake of the user's, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_shipped", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", help="the shipped model's name, such as emoji")
    parser.add_argument("--budget", default="9m", help="time of this piece: 9m, 90s, 1.5h")
    parser.add_argument("--plan", default="auto", help="auto, cpu, gpu, or a folder of recipes")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where the runs are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--processes", type=int, help="on the processor; one a core by default")
    parser.add_argument(
        "--from-shipped", action="store_true", help="train other tasks from the shipped model"
    )
    parser.add_argument("--carry-in", type=Path, metavar="FOLDER", help="go on from small files")
    parser.add_argument("--carry-out", type=Path, metavar="FOLDER", help="write small files")
    parser.add_argument("--ship", action="store_true", help="write what was trained to the assets")
    told = parser.parse_args(arguments)
    begun = time.time()
    try:
        until = begun + seconds_of(told.budget)
        device = select_device(told.device)
        programme = open_programme(told.model, told.plan, told.work, device)
        if told.from_shipped:
            take_shipped(programme)
        if told.carry_in is not None:
            carry_in(programme, told.carry_in)
        if told.ship:
            print(*ship(programme), sep="\n")
            return 0
        run_piece(programme, until, device, told.processes)
        if told.carry_out is not None:
            carry_out(programme, told.carry_out)
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(standing(programme)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
