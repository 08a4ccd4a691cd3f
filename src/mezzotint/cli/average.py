"""``mezzotint average``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["average"]


def average(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run whose recipe says ema: {kind: power}.")
    ],
    sigma_rel: Annotated[
        float,
        typer.Option("--sigma-rel", help="Length of the average, as a share of the training."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the model.", show_default=False)
    ],
    at_step: Annotated[
        int | None,
        typer.Option("--at-step", help="Where it ends; the last snapshot if left out."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Make a model of another average of a run's weights, from its snapshots."""
    import sys

    from mezzotint.training.posthoc_ema import average_run

    made = average_run(run, output, sigma_rel=sigma_rel, at_step=at_step, device=device)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    print(output)
