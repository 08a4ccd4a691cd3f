"""``mezzotint train``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a dotted key of the recipe."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")
    ] = False,
    stop_after: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", min=1, help="Save and end after so many steps, to go on by --resume."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify-resume", help="Train a few steps twice, once with a stop, and compare."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Train or fine-tune a model by a recipe, or an autoencoder; under torchrun, in parallel."""
    if verify:
        from mezzotint.training.verify import verify_resume

        same = verify_resume(recipe, overrides or (), device=device)
        print(
            f"{same.before} + {same.after} steps equal {same.before}, a stop and {same.after}:"
            f" {same.tensors:,} tensors of {same.numbers:,} numbers, bit for bit"
        )
        return
    from mezzotint.evaluation.shards import ranks
    from mezzotint.training.run import train as run

    folder = run(
        recipe,
        overrides=overrides or (),
        output=output,
        resume=resume,
        device=device,
        stop_after=stop_after,
    )
    if ranks()[0] == 0:
        print(folder)
