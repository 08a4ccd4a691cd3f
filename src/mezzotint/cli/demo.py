"""``mezzotint demo``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the models and the pictures.")
    ] = Path("runs/demo"),
) -> None:
    """Train both stages on 48 emoji within minutes, and draw them from their captions."""
    from mezzotint.studies.demo import run_demo

    run_demo(output)
