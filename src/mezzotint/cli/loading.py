"""Options that say how a model is read, the same for every command that reads one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from mezzotint.generation.pipeline import Pipeline

__all__ = [
    "ConfigOption",
    "DecoderOption",
    "DeviceOption",
    "EngineOption",
    "FamilyOption",
    "OffloadOption",
    "PrecisionOption",
    "PredictionOption",
    "QuantizationOption",
    "WeightsOption",
    "open_model",
]

_PANEL = "The model"

DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_PANEL)
]
PrecisionOption = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_PANEL)
]
EngineOption = Annotated[
    str,
    typer.Option(help="auto, torch or openvino: what runs the networks.", rich_help_panel=_PANEL),
]
DecoderOption = Annotated[
    Path | None,
    typer.Option(
        help="A small decoder in place of the model's own, faster and not quite the same: a run of"
        " kind decoder, or a folder of diffusers' AutoencoderTiny.",
        rich_help_panel=_PANEL,
    ),
]
OffloadOption = Annotated[
    Literal["none", "components", "sequential"],
    typer.Option(
        help="Keep weights on the CPU until they are used: less memory on the device.",
        rich_help_panel=_PANEL,
    ),
]
QuantizationOption = Annotated[
    Literal["none", "int8"],
    typer.Option(
        help="int8 rounds the UNet's large weights, on a processor: half of the memory, faster, and"
        " not quite the same.",
        rich_help_panel=_PANEL,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The YAML of a single file.", rich_help_panel=_PANEL),
]
FamilyOption = Annotated[
    str | None,
    typer.Option(help="What a single file is, if guessed wrongly.", rich_help_panel=_PANEL),
]
PredictionOption = Annotated[
    Literal["epsilon", "v_prediction"] | None,
    typer.Option(help="What it predicts, if guessed wrongly.", rich_help_panel=_PANEL),
]
WeightsOption = Annotated[
    Literal["auto", "ema", "raw"],
    typer.Option(help="Averaged weights or not; auto: if there.", rich_help_panel=_PANEL),
]


def open_model(model: str, **options: Any) -> "Pipeline":
    """Load a model and say on standard error what was guessed or left out."""
    import sys

    from mezzotint.generation.pipeline import load

    pipeline = load(model, **options)
    for note in pipeline.notes:
        print(f"note: {note}", file=sys.stderr)
    return pipeline
