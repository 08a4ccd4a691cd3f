"""``mezzotint convert``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mezzotint.cli.loading import ConfigOption, FamilyOption, PredictionOption, WeightsOption

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model folder, a run, or a single file.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder, or a *.safetensors or *.ckpt file.")
    ],
    to: Annotated[Literal["diffusers", "compvis"], typer.Option(help="The layout.")],
    precision: Annotated[
        Literal["as-is", "float32", "float16", "bfloat16"],
        typer.Option(help="Of the weights that are written."),
    ] = "as-is",
    weights: WeightsOption = "auto",
    config: ConfigOption = None,
    family: FamilyOption = None,
    prediction: PredictionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a model in another layout; what that cannot hold is listed, the rest stays equal."""
    from mezzotint.checkpoints.convert import convert as write
    from mezzotint.device import PRECISIONS

    told = write(
        source,
        target,
        to,
        dtype=None if precision == "as-is" else PRECISIONS[precision],
        weights=weights,
        config=config,
        family=family,
        prediction=prediction,
        overwrite=overwrite,
    )
    for sentence in told:
        print(sentence)
    print(target)
