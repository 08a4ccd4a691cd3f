"""``mezzotint study``."""

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def study() -> None:
    """Measure what the paper measures, and write a report with plots, tables and pictures."""


@app.command()
def sampling(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The folder of a model or of a finished run.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|emoji",
            help="Real pictures to compare with; by default those that the run was trained on.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures for each point.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Numbers of steps. Default: 2,5,10,20,50")
    ] = None,
    samplers: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Default: all that any model can use.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(metavar="S,S,…", help="Guidance scales. Default: from 1 to 8")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="At which steps are varied. Default: the run's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Picture k is drawn from seed + k.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report; go on with the same.")
    ] = Path("runs/study-sampling"),
) -> None:
    """Quality by sampler, by number of steps and by guidance scale, each with its cost."""
    from mezzotint.studies.sampling import run_sampling_study

    asked: dict[str, Any] = {
        "samples": samples,
        "steps": _list("steps", steps, int),
        "samplers": _list("samplers", samplers, str),
        "scales": _list("scales", scales, float),
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    run_sampling_study(
        model,
        output,
        against=against,
        device=device,
        precision=precision,
        **{name: value for name, value in asked.items() if value is not None},
    )


@app.command()
def compression(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results and report; go on there.")
    ] = Path("runs/study-compression"),
    work: Annotated[
        Path, typer.Option(help="Folder for the training runs, which may be deleted afterwards.")
    ] = Path("runs/study-compression-work"),
    stages: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="First stages to do now. Default: all.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N,…", help="One UNet a first stage is trained for each.")
    ] = "0",
    scale: Annotated[
        float, typer.Option(min=0.01, help="So many times the minutes and the pictures.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; write the report.")
    ] = False,
) -> None:
    """How far the first stage should compress: nine of them, and a UNet in each latent space."""
    from mezzotint.studies.compression import (
        CompressionStudy,
        run_compression_study,
        write_report,
    )

    chosen = _list("seeds", seeds, int)
    study = CompressionStudy.from_dict({"seeds": chosen}, "compression study").scaled(scale)
    if not report_only:
        names = _list("stages", stages, str)
        run_compression_study(study, output, work, stages=names, device=device)
    print(write_report(output))


@app.command()
def conditions(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results and report; go on there.")
    ] = Path("runs/study-conditions"),
    work: Annotated[
        Path, typer.Option(help="Folder for the training runs; a run that was stopped goes on.")
    ] = Path("runs/study-conditions-work"),
    only: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Conditions to do now. Default: all.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=2, help="Held-out examples that are asked of each model.")
    ] = 256,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Of each training. Default: the recipes'.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; write the report.")
    ] = False,
) -> None:
    """Every condition of the paper: a model of each, with its condition and without it."""
    from mezzotint.studies.conditions import run_conditions_study, write_report

    if not report_only:
        run_conditions_study(
            output,
            work,
            only=_list("only", only, str),
            pictures=pictures,
            minutes=minutes,
            device=device,
        )
    print(write_report(output))


@app.command()
def objectives(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results and report; go on there.")
    ] = Path("runs/study-objectives"),
    work: Annotated[
        Path, typer.Option(help="Folder for the training runs; a run that was stopped goes on.")
    ] = Path("runs/study-objectives-work"),
    only: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Objectives to do now. Default: all.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N,…", help="A model of each objective is trained for each.")
    ] = "0,1",
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 3000,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Of each training, in place of steps.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=3, help="Held-out examples that are asked of each model.")
    ] = 512,
    autoencoder: Annotated[
        Path | None, typer.Option(help="A run of emoji-autoencoder. Default: train one.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a dotted key of every recipe."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; write the report.")
    ] = False,
) -> None:
    """Noise, velocity or flow: one recipe, trained to predict each, at equal compute."""
    from mezzotint.studies.objectives import run_objectives_study, write_report

    if not report_only:
        run_objectives_study(
            output,
            work,
            only=_list("only", only, str),
            seeds=_list("seeds", seeds, int) or (),
            steps=steps,
            minutes=minutes,
            pictures=pictures,
            autoencoder=autoencoder,
            overrides=overrides or (),
            device=device,
        )
    print(write_report(output))


def _list(name: str, text: str | None, kind: type[Any]) -> list[Any] | None:
    """What stands between commas."""
    from mezzotint.errors import ConfigError

    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"--{name} {text!r}: expected {what} between commas") from None
