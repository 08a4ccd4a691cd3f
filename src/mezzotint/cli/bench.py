"""``mezzotint bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli.loading import DeviceOption, EngineOption, PrecisionOption, QuantizationOption

if TYPE_CHECKING:
    from mezzotint.studies.benchmark import Benchmark

__all__ = ["bench"]


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Default: Stable Diffusion 1.5's shape, random weights."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny random model: that all works, in seconds.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of the picture.")] = 20,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    quantization: QuantizationOption = "none",
) -> None:
    """Measure how fast this machine draws, and how near that is to what it can do."""
    import sys

    from mezzotint.cli.loading import open_model
    from mezzotint.errors import ConfigError
    from mezzotint.studies.benchmark import random_pipeline, run_benchmark

    def tell(next_: str) -> None:
        print(f"measuring {next_}", file=sys.stderr)

    if model is not None and quick:
        raise ConfigError("--quick is a model of its own; leave it out, or the model")
    if json_path is not None:
        _check_folder(json_path)
    options = {"device": device, "precision": precision, "engine": engine}
    options["quantization"] = quantization
    if model is not None:
        measured = run_benchmark(open_model(model, **options), steps=steps, tell=tell)
    else:
        tell("nothing yet: making a model of random weights")
        with random_pipeline(quick=quick, **options) as pipeline:
            measured = run_benchmark(pipeline, steps=steps, tell=tell)
    _show(measured)
    if json_path is not None:
        _write(measured, json_path)


def _check_folder(path: Path) -> None:
    """Refuse, before minutes are spent, a file that could not be written."""
    from mezzotint.errors import ConfigError

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: expected a file in a folder that is there")


def _write(measured: "Benchmark", path: Path) -> None:
    import json

    from mezzotint.errors import ConfigError

    try:
        path.write_text(json.dumps(measured.to_dict(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from None


def _show(measured: "Benchmark") -> None:
    from rich.console import Console
    from rich.table import Table

    machine = measured.machine
    about = Table.grid(padding=(0, 2))
    about.add_row("model", measured.model)
    about.add_row("machine", f"{machine.processor}, {machine.threads} threads")
    for name, reason in zip(("device", "precision"), measured.reasons, strict=True):
        about.add_row(name, reason)
    about.add_row("engine", measured.engine)
    if measured.quantization != "none":
        about.add_row("quantization", measured.quantization)
    for name, peak in measured.peaks.items():
        about.add_row("peak", f"{peak / 1e12:.3f} TFLOP/s in {name}")
    times = Table("what", box=None, padding=(0, 2))
    for heading in ("seconds", "TFLOP", "TFLOP/s", "of the peak"):
        times.add_column(heading, justify="right")
    for each in measured.timings:
        counted = ("", "", "")
        if each.flops is not None and each.share is not None:
            work = each.flops / 1e12
            counted = (f"{work:.3g}", f"{work / each.seconds:.3g}", f"{each.share:.0%}")
        times.add_row(each.what, f"{each.seconds:.3g}", *counted)
    whole = sum(part.seconds for part in measured.parts)
    parts = Table("where the picture's time goes", box=None, padding=(0, 2))
    for heading in ("seconds", "calls", "share"):
        parts.add_column(heading, justify="right")
    for part in measured.parts:
        share = part.seconds / whole
        parts.add_row(part.name, f"{part.seconds:.3g}", str(part.calls), f"{share:.0%}")
    console = Console()
    for table in (about, times, parts):
        console.print(table)
        console.print()
