"""``mezzotint demo``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    train: Annotated[
        bool, typer.Option("--train", help="Train both stages on 48 emoji first, in minutes.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the pictures, with --train of the models too: outputs/demo, or"
            " runs/demo.",
        ),
    ] = None,
) -> None:
    """Draw sixteen emoji from captions with the shipped model, half of them never shown to it."""
    if train:
        from mezzotint.studies.training_demo import run_training_demo

        run_training_demo(output or Path("runs/demo"))
    else:
        from mezzotint.studies.demo import run_demo

        run_demo(output or Path("outputs/demo"))
