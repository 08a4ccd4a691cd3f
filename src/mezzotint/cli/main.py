"""The command ``mezzotint``: its commands, and what becomes of errors."""

import gc
import os
import sys
from typing import Annotated

import typer

import mezzotint
from mezzotint.cli.average import average
from mezzotint.cli.bench import bench
from mezzotint.cli.convert import convert
from mezzotint.cli.data import app as data
from mezzotint.cli.demo import demo
from mezzotint.cli.doctor import doctor
from mezzotint.cli.evaluate import evaluate
from mezzotint.cli.inspect import inspect
from mezzotint.cli.replay import replay
from mezzotint.cli.sample import sample
from mezzotint.cli.study import app as study
from mezzotint.cli.train import train
from mezzotint.errors import MezzotintError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mezzotint",
    help="Latent diffusion: train both stages, draw, and draw the same again.",
    no_args_is_help=True,
    add_completion=False,
    # a fault of Mezzotint's own shows Python's traceback, which a report can quote
    pretty_exceptions_enable=False,
)
for command in (
    demo,
    train,
    sample,
    replay,
    evaluate,
    inspect,
    convert,
    average,
    bench,
    doctor,
):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(study, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mezzotint {mezzotint.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Latent diffusion: train both stages, draw, and draw the same again."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad usage or input, 130 interrupted."""
    brief = sys.argv[1:2] == ["inspect"]
    if brief:
        # it reads headers and ends: nothing that it makes is worth being looked through for waste
        gc.disable()
    try:
        app()
    except MezzotintError as error:
        print(f"mezzotint: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as done:
        if brief and not done.code:
            # nor is there anything for Python to end, and torch takes half a second to take apart
            sys.stdout.flush()
            os._exit(0)
        raise
