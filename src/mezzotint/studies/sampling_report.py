"""The page of a sampling study: plots, tables, and the pictures that the numbers are of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mezzotint.config import to_yaml
from mezzotint.evaluation.grids import denoising_strip, interpolation_strip, labelled_rows
from mezzotint.studies.plots import Line, line_plot
from mezzotint.studies.report import Cell, Report
from mezzotint.studies.sampling_points import Bench, Key, MeasuredPoint

__all__ = ["write_report"]

_KID = "KID (MobileNetV2)"
_COLUMNS = (
    "sampler",
    "steps",
    "guidance scale",
    "kid_mobilenet_v2",
    "precision_mobilenet_v2",
    "recall_mobilenet_v2",
    "retrieval_mobilenet_v2",
    "seconds per image",
    "network calls",
)
_STRIP_SIDE = 96  # at least, so that small pictures can be seen


def write_report(bench: Bench, points: Mapping[Key, MeasuredPoint], folder: Path) -> Path:
    """Write the page, its plots and its tables.

    Args:
        bench: Where the points were measured.
        points: All of them.
        folder: Of the study.

    Returns:
        ``report.html``.
    """
    study = bench.study
    report = Report(f"Sampling from {Path(study.model).name}", folder)
    by_steps = [points[key] for key in study.by_steps()]
    by_scale = [points[key] for key in study.by_scale() if key in points]
    text = any(point.retrieval is not None for point in points.values())
    report.paragraph(
        f"Each point is {study.samples:,} pictures, drawn from the same seeds and the same"
        " conditions, those of the real pictures that they are compared with. KID is the unbiased"
        " kernel distance between the two on MobileNetV2 features: 0 where they cannot be told"
        " apart. Precision is the share of drawn pictures that are among the real ones, recall the"
        " share of real pictures that are among the drawn ones."
        + (
            " Retrieval is the share of drawn pictures whose nearest real one bears the caption"
            " that they were drawn from."
            if text
            else ""
        )
    )
    _steps_section(report, bench, by_steps, text)
    if by_scale:
        _scale_section(report, bench, by_scale, text)
    _strips_section(report, bench)
    report.heading("All points")
    rows = [_row(point) for point in points.values()]
    keep = [k for k, name in enumerate(_COLUMNS) if text or not name.startswith("retrieval")]
    columns, rows = [_COLUMNS[k] for k in keep], [[row[k] for k in keep] for row in rows]
    report.table(columns, rows)
    report.csv("points", [name.replace(" ", "_") for name in columns], rows)
    any_point = next(iter(points.values()))
    report.paragraph(
        f"Drawn in {any_point.settings.precision} on {any_point.settings.device} with"
        f" {any_point.threads} threads. Seconds are of the whole way from condition to pixels, in"
        " batches; network calls are those that one picture waits for, each of them twice as"
        " large under guidance."
    )
    report.details("What was asked for", to_yaml(study))
    return report.write()


def _steps_section(
    report: Report, bench: Bench, points: Sequence[MeasuredPoint], text: bool
) -> None:
    study = bench.study
    report.heading("Quality against steps")
    report.items(_findings(points))
    steps = sorted(study.steps)
    log_y = all(point.kid > 0 for point in points)
    lines = {name: [p for p in points if p.settings.sampler == name] for name in study.samplers}
    figure = line_plot(
        [_kid_line(n, [p.settings.steps for p in ps], ps) for n, ps in lines.items()],
        title="Quality against steps",
        x_label="steps",
        y_label=_KID,
        log_x=True,
        log_y=log_y,
        x_ticks=steps,
    )
    report.figure(
        figure,
        "kid-steps",
        f"KID by the number of steps, at guidance scale {study.guidance_scale:g}; lower is better."
        " Bars are standard errors.",
    )
    figure = line_plot(
        [_kid_line(n, [p.seconds_per_image for p in ps], ps) for n, ps in lines.items()],
        title="Quality against cost",
        x_label="seconds per picture",
        y_label=_KID,
        log_x=True,
        log_y=log_y,
    )
    report.figure(figure, "kid-seconds", "The same by the time that a picture takes.")
    if text:
        figure = line_plot(
            [
                Line(
                    label=name,
                    x=[p.settings.steps for p in ps],
                    y=[p.retrieval or 0.0 for p in ps],
                )
                for name, ps in lines.items()
            ],
            title="What is drawn is what was asked for",
            x_label="steps",
            y_label="retrieval accuracy (MobileNetV2)",
            log_x=True,
            x_ticks=steps,
        )
        report.figure(
            figure,
            "retrieval-steps",
            "Share of pictures whose nearest real picture bears the caption that was given.",
        )
    rows = {
        name: [bench.pictures((name, n, study.guidance_scale)) for n in steps]
        for name in study.samplers
    }
    report.picture(
        labelled_rows(rows, headings=[f"{n} steps" for n in steps]),
        "pictures-steps",
        "The first four pictures of each point: the same seeds and conditions everywhere.",
    )


def _scale_section(
    report: Report, bench: Bench, points: Sequence[MeasuredPoint], text: bool
) -> None:
    study = bench.study
    report.heading("Quality against guidance scale")
    how = f"{study.scale_sampler}, {study.scale_steps} steps"
    best = min(points, key=lambda point: point.kid)
    report.items(
        [
            f"The lowest KID is {_estimate(best)}, at scale {best.settings.guidance_scale:g}.",
            f"From scale {points[0].settings.guidance_scale:g} to"
            f" {points[-1].settings.guidance_scale:g} precision goes from"
            f" {points[0].precision:.2f} to {points[-1].precision:.2f} and recall from"
            f" {points[0].recall:.2f} to {points[-1].recall:.2f}.",
        ]
    )
    scales = [p.settings.guidance_scale for p in points]
    figure = line_plot(
        [_kid_line(study.scale_sampler, scales, points)],
        title="Quality against guidance scale",
        x_label="guidance scale",
        y_label=_KID,
    )
    report.figure(figure, "kid-scale", f"KID by guidance scale ({how}); 1 is no guidance.")
    lines = [
        Line(label="precision", x=scales, y=[p.precision for p in points]),
        Line(label="recall", x=scales, y=[p.recall for p in points]),
    ]
    if text:
        lines.append(Line(label="retrieval", x=scales, y=[p.retrieval or 0.0 for p in points]))
    figure = line_plot(
        lines,
        title="Precision and recall against guidance scale",
        x_label="guidance scale",
        y_label="share of pictures (MobileNetV2)",
    )
    report.figure(figure, "precision-recall-scale", f"Shares by guidance scale ({how}).")
    report.picture(
        labelled_rows(
            {"": [bench.pictures(key) for key in study.by_scale()]},
            headings=[f"scale {scale:g}" for scale in scales],
        ),
        "pictures-scale",
        f"The first four pictures of each scale ({how}).",
    )


def _strips_section(report: Report, bench: Bench) -> None:
    study = bench.study
    key = (study.scale_sampler, study.scale_steps, study.guidance_scale)
    request = bench.requests(key)[0]
    scale = max(1, _STRIP_SIDE // bench.pipeline.model.image_size[1])
    shown = request.prompt or request.class_label
    what = "" if shown is None else f" of “{shown}”"
    how = f"{study.scale_sampler}, {study.scale_steps} steps, guidance {study.guidance_scale:g}"
    report.heading("How a picture comes about")
    report.picture(
        denoising_strip(bench.pipeline, request, noisy=True, scale=scale),
        "denoising",
        f"A picture{what} ({how}): what the sampler holds after a step, and the clean picture that"
        " the network makes out in it, both decoded.",
    )
    seeds = (study.seed, study.seed + 1)
    report.picture(
        interpolation_strip(bench.pipeline, request, seeds, scale=scale),
        "interpolation",
        f"From the starting noise of seed {seeds[0]} to that of seed {seeds[1]}{what} ({how}).",
    )


def _findings(points: Sequence[MeasuredPoint]) -> list[str]:
    """The best at each number of steps, and the cheapest that is as good as the best of all."""
    said: list[str] = []
    for steps in sorted({p.settings.steps for p in points}):
        best = min((p for p in points if p.settings.steps == steps), key=lambda p: p.kid)
        said.append(
            f"{steps} steps: the lowest KID is {_estimate(best)}, of {best.settings.sampler}."
        )
    best = min(points, key=lambda p: p.kid)
    near = [
        p
        for p in points
        if p.kid - best.kid <= 2 * (p.kid_standard_error**2 + best.kid_standard_error**2) ** 0.5
    ]
    cheapest = min(near, key=lambda p: p.network_calls)
    said.append(
        f"The cheapest within two standard errors of the best is {cheapest.settings.sampler} with"
        f" {cheapest.settings.steps} steps: {cheapest.network_calls} network calls,"
        f" {cheapest.seconds_per_image:.3g} s a picture, KID {_estimate(cheapest)}."
    )
    return said


def _estimate(point: MeasuredPoint) -> str:
    return f"{point.kid:.4f} ± {point.kid_standard_error:.4f}"


def _kid_line(label: str, x: Sequence[float], points: Sequence[MeasuredPoint]) -> Line:
    return Line(
        label=label,
        x=x,
        y=[p.kid for p in points],
        errors=[p.kid_standard_error for p in points],
    )


def _row(point: MeasuredPoint) -> list[Cell]:
    settings = point.settings
    return [
        settings.sampler,
        settings.steps,
        settings.guidance_scale,
        point.kid_estimate,
        point.precision,
        point.recall,
        point.retrieval,
        point.seconds_per_image,
        point.network_calls,
    ]
