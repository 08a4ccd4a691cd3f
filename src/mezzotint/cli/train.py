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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Train an autoencoder or a diffusion model from a recipe."""
    from mezzotint.training.run import train as run

    print(run(recipe, overrides=overrides or (), output=output, resume=resume, device=device))
