"""The page of the compression study: tables, plots, pictures, and what they say of the paper."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mezzotint.config import read_yaml, to_yaml
from mezzotint.errors import ConfigError
from mezzotint.evaluation.distributions import Estimate
from mezzotint.evaluation.grids import labelled_rows
from mezzotint.studies.compression.claims import final_kid, judge, kid_at, spread_of_seeds
from mezzotint.studies.compression.recipes import PATCH, STAGES
from mezzotint.studies.compression.results import (
    CompressionStudy,
    DiffusionResult,
    FirstStageResult,
    Point,
    read_results,
)
from mezzotint.studies.plots import COLOURS, Line, line_plot
from mezzotint.studies.report import Cell, Report

__all__ = ["write_report"]

_FACTOR_COLOURS = {1: "#000000", 2: COLOURS[5], 4: COLOURS[0], 8: COLOURS[2], 16: COLOURS[4]}
_STAGES = {stage.name: stage for stage in STAGES}


def write_report(output: Path) -> Path:
    """Write ``report.html``, its plots and CSV files from the results in a folder.

    Args:
        output: Where `run_compression_study` wrote.

    Returns:
        The page.

    Raises:
        ConfigError: If there is no study.
        MissingExtraError: If matplotlib is not installed.
    """
    record = output / "study.yaml"
    if not record.is_file():
        raise ConfigError(f"{output}: holds no compression study; run it with this --output first")
    study = CompressionStudy.from_dict(read_yaml(record), str(record))
    first_stages, diffusions = read_results(output)
    report = Report("How far should the first stage compress?", output)
    _what_was_done(report, study, first_stages, diffusions)
    report.heading("Which of the paper's claims hold here")
    report.paragraph(_how_it_is_judged(diffusions))
    claims = judge(first_stages, diffusions)
    report.table(
        ["claim of the paper", "verdict", "numbers"],
        [[claim.text, claim.verdict, claim.finding] for claim in claims],
    )
    _reconstruction(report, first_stages)
    _restored(report, output, first_stages)
    _quality(report, study, diffusions)
    _drawn(report, output, diffusions)
    report.heading("Settings")
    report.details("study.yaml", to_yaml(study))
    return report.write()


def _what_was_done(
    report: Report,
    study: CompressionStudy,
    first_stages: Sequence[FirstStageResult],
    diffusions: Sequence[DiffusionResult],
) -> None:
    report.paragraph(
        "The central study of Rombach et al. 2022 (section 4.1, figures 1, 6 and table 8), on the"
        f" emoji at {study.resolution} pixels: the same minutes of training for every first stage,"
        " then the same minutes for a class-conditional UNet of the same number of parameters in"
        " each latent space. First stages are measured on the 160 emoji that nothing was trained"
        f" on; the UNets' pictures, {study.samples} at each point, drawn by {study.sampler} in"
        f" {study.steps} steps without guidance, against the training emoji, as in the paper."
    )
    machines = sorted({_machine(result) for result in (*first_stages, *diffusions)})
    planned = len(STAGES) * (1 + len(study.seeds))
    done = len({r.stage for r in first_stages}) + len(diffusions)
    report.paragraph(
        f"Trained for {study.first_stage_minutes:g} and {study.diffusion_minutes:g} minutes on"
        f" {'; '.join(machines) or 'nothing yet'}. {done} of {planned} runs are done"
        f" (seeds {', '.join(map(str, study.seeds))})."
    )
    report.paragraph(
        "How it differs from the paper: minutes in place of GPU days, 1,430 drawings in place of"
        f" 1.2 million photographs, first stages trained on squares of {PATCH} pixels and without a"
        " discriminator in so few steps, v-prediction with zero terminal SNR in place of ε,"
        " MobileNetV2 in place of Inception, and KID in place of FID, which is biased for so few"
        " pictures."
    )
    weights = {
        r.stage: {d.first_stage_weights for d in diffusions if d.stage == r.stage}
        for r in first_stages
    }
    again = [stage for stage, hashes in weights.items() if len(hashes) > 1]
    report.paragraph(
        "The seeds are those of the UNets; the first stage under them is the same one."
        if not again
        else "The seeds are those of the UNets; the first stage under them was trained anew for"
        f" some of them ({', '.join(again)}), and its spread is in theirs."
    )


def _how_it_is_judged(diffusions: Sequence[DiffusionResult]) -> str:
    counts = {r.stage: sum(other.stage == r.stage for other in diffusions) for r in diffusions}
    spread = spread_of_seeds(diffusions)
    if spread is None:
        seeds = "There is one seed so far, so that its part in the errors is not in them."
    else:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        seeds = f"Seeds: {told}; KID deviates by {spread:.0%} between them, pooled over all."
    return (
        "KID is that on MobileNetV2, ± its standard error; a difference counts from two standard"
        f" errors of it, and otherwise cannot be told. {seeds}"
    )


def _machine(result: FirstStageResult | DiffusionResult) -> str:
    machine = result.machine
    return f"{machine.processor} ({machine.threads} threads, {machine.precision})"


def _reconstruction(report: Report, first_stages: Sequence[FirstStageResult]) -> None:
    report.heading("First stages: rate and distortion")
    columns = [
        "first stage",
        "f",
        "c",
        "codes",
        "codes used",
        "bits per pixel",
        "PSNR [dB]",
        "SSIM",
        "LPIPS (MobileNetV2)",
        "rKID (MobileNetV2)",
        "rFID (MobileNetV2)",
        "parameters",
        "steps",
        "images/s",
    ]
    rows: list[list[Cell]] = []
    for result in first_stages:
        stage, scores = _STAGES[result.stage], result.scores
        rows.append(
            [
                result.stage,
                stage.factor,
                stage.channels,
                stage.codes,
                scores["codes_used"],
                scores["rate"],
                math.inf if scores["psnr"] is None else scores["psnr"],
                scores["ssim"],
                scores["lpips_mobilenet_v2"],
                Estimate(**scores["rkid_mobilenet_v2"]),
                scores["rfid_mobilenet_v2"],
                result.parameters,
                result.steps,
                result.images_per_second,
            ]
        )
    report.table(columns, rows, "on the validation emoji (compare table 8 of the paper)")
    report.csv("first-stages", columns, rows)
    report.paragraph(
        "Bits per pixel: log2 of the codes for VQ; for KL what a sample of the posterior takes"
        " under a Gaussian fitted to each channel (bits back); 24 for pixels."
    )
    trained = [r for r in first_stages if r.stage != "identity"]
    if not trained:
        return
    for key, name, label in (
        ("psnr", "rate-distortion", "PSNR [dB]"),
        ("lpips_mobilenet_v2", "rate-perception", "LPIPS (MobileNetV2)"),
    ):
        figure = line_plot(
            [_rate_line(trained, kind, key) for kind in ("kl", "vq")],
            x_label="rate [bits per pixel]",
            y_label=label,
            log_x=True,
        )
        report.figure(figure, name, f"{label} against rate; each point is a first stage.")
    lines = [
        Line(
            label=result.stage,
            x=result.scores["spectrum"]["frequencies"],
            y=[
                error / original
                for error, original in zip(
                    result.scores["spectrum"]["error"],
                    result.scores["spectrum"]["original"],
                    strict=True,
                )
            ],
            colour=_colour(result.stage),
            dashed=result.stage.startswith("vq"),
        )
        for result in trained
    ]
    figure = line_plot(
        lines,
        x_label="spatial frequency [cycles per pixel]",
        y_label="power of the error / power of the picture",
        log_y=True,
    )
    report.figure(
        figure,
        "frequency",
        "What is lost, by spatial frequency: at 1 a first stage keeps nothing of a frequency.",
    )


def _rate_line(results: Sequence[FirstStageResult], kind: str, key: str) -> Line:
    chosen = [r for r in results if _STAGES[r.stage].kind == kind]
    chosen.sort(key=lambda r: r.scores["rate"])
    return Line(
        label=kind.upper(),
        x=[r.scores["rate"] for r in chosen],
        y=[r.scores[key] for r in chosen],
        names=[f"f = {_STAGES[r.stage].factor}" for r in chosen],
    )


def _colour(stage: str) -> str:
    return _FACTOR_COLOURS.get(_STAGES[stage].factor, COLOURS[1])


def _restored(report: Report, output: Path, first_stages: Sequence[FirstStageResult]) -> None:
    names = dict.fromkeys(r.stage for r in first_stages if r.stage != "identity")
    rows = {"original": "originals", **{name: f"{name}-restored" for name in names}}
    sheet = _sheet(output, rows)
    if sheet is not None:
        report.picture(sheet, "reconstructions", "Validation emoji and what is left of them.")


def _sheet(output: Path, rows: Mapping[str, str]) -> Image.Image | None:
    """Rows of pictures that were kept side by side, by what stands at their left."""
    pictures: dict[str, list[Image.Image]] = {}
    for label, name in rows.items():
        path = output / "pictures" / f"{name}.webp"
        if path.is_file():
            with Image.open(path) as row:
                side = row.height
                pictures[label] = [
                    row.convert("RGB").crop((left, 0, left + side, side))
                    for left in range(0, row.width, side)
                ]
    return labelled_rows(pictures) if pictures else None


def _quality(
    report: Report, study: CompressionStudy, diffusions: Sequence[DiffusionResult]
) -> None:
    report.heading("Diffusion: quality against training")
    if not diffusions:
        report.paragraph("Not measured yet.")
        return
    kid = final_kid(diffusions)
    columns = [
        "latent space",
        "seeds",
        "UNet parameters",
        "GFLOP per call",
        "training [images/s]",
        "steps",
        "sampling [images/s]",
        "KID (MobileNetV2)",
        "precision (MobileNetV2)",
        "recall (MobileNetV2)",
    ]
    rows: list[list[Cell]] = []
    by_stage = {name: [r for r in diffusions if r.stage == name] for name in kid}
    for name, results in by_stage.items():
        ends = [result.points[-1] for result in results]
        rows.append(
            [
                name,
                len(results),
                results[0].parameters,
                results[0].gflops,
                statistics.fmean(r.images_per_second for r in results),
                round(statistics.fmean(end.step for end in ends)),
                1.0 / statistics.fmean(r.sampling_seconds for r in results),
                kid[name],
                _mean(ends, "precision_mobilenet_v2"),
                _mean(ends, "recall_mobilenet_v2"),
            ]
        )
    report.table(columns, rows, f"after {study.diffusion_minutes:g} minutes of training")
    report.csv("diffusion", columns, rows)
    every: list[list[Cell]] = [
        [r.stage, r.seed, p.step, p.minutes, kid_at([r], k)]
        for r in diffusions
        for k, p in enumerate(r.points)
    ]
    heads = ["latent space", "seed", "step", "minutes", "kid_mobilenet_v2"]
    report.csv("points", heads, every)
    spread = spread_of_seeds(diffusions)
    for name, label, log_x in (("minutes", "minutes of training", False), ("steps", "steps", True)):
        lines = [_curve(stage, results, name, spread) for stage, results in by_stage.items()]
        figure = line_plot(
            lines, x_label=label, y_label="KID (MobileNetV2)", log_x=log_x, log_y=True
        )
        report.figure(
            figure,
            f"quality-{name}",
            f"KID against {label}; bars are standard errors. Dashed: VQ.",
        )


def _mean(points: Sequence[Point], name: str) -> float:
    return statistics.fmean(point.card.numbers[name].value for point in points)


def _curve(
    stage: str, results: Sequence[DiffusionResult], against: str, spread: float | None
) -> Line:
    count = min(len(result.points) for result in results)
    kids = [kid_at(results, k, spread) for k in range(count)]

    def position(k: int) -> float:
        points = [result.points[k] for result in results]
        values = [p.minutes if against == "minutes" else float(p.step) for p in points]
        return statistics.fmean(values)

    return Line(
        label=stage,
        x=[position(k) for k in range(count)],
        y=[kid.value for kid in kids],
        errors=[kid.standard_error for kid in kids],
        colour=_colour(stage),
        dashed=stage.startswith("vq"),
    )


def _drawn(report: Report, output: Path, diffusions: Sequence[DiffusionResult]) -> None:
    first = min((r.seed for r in diffusions), default=0)
    names = [r.stage for r in diffusions if r.seed == first]
    sheet = _sheet(output, {name: f"{name}-seed{first}-drawn" for name in names})
    if sheet is not None:
        report.picture(sheet, "drawn", "Drawn at the end of the training, a class in each column.")
