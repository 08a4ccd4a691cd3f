"""The page of a sampling study: plots, tables, and the pictures that the numbers are of."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mezzotint.config import to_yaml
from mezzotint.evaluation.card import EvaluationCard, Number
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


def write_report(
    bench: Bench,
    points: Mapping[Key, MeasuredPoint],
    held_out: EvaluationCard | None,
    folder: Path,
) -> Path:
    """Write the page, its plots and its tables.

    Args:
        bench: Where the points were measured.
        points: All of them.
        held_out: Real pictures that were kept from training, compared with those of the training.
        folder: Of the study.

    Returns:
        ``report.html``.
    """
    study = bench.study
    report = Report(f"Sampling from {Path(study.model).name}", folder)
    by_steps = [points[key] for key in study.by_steps()]
    by_scale = [points[key] for key in study.by_scale() if key in points]
    text = _has_retrieval(points.values())
    floor = None if held_out is None else next(iter(held_out.numbers.values()))
    report.paragraph(
        f"Each point is {study.samples:,} pictures, drawn from the same seeds and the same"
        f" conditions, those of the real pictures that they are compared with. {_KID} is the"
        " unbiased kernel distance between the two on features of that network: 0 where they cannot"
        " be told apart. Precision is the share of drawn pictures that are among the real ones,"
        " recall the share of real pictures that are among the drawn ones."
        + (
            " Retrieval is the share of drawn pictures whose nearest real one bears the caption"
            " that they were drawn from."
            if text
            else ""
        )
    )
    if floor is not None:
        report.paragraph(
            f"{_KID} of real pictures that were kept from training to those of the training is"
            f" {_estimate(floor)}: no model can be expected to come below that."
        )
    _steps_section(report, bench, by_steps, floor)
    if by_scale:
        _scale_section(report, bench, by_scale, floor)
    _strips_section(report, bench)
    report.heading("All points")
    rows = [_row(point) for point in points.values()]
    keep = [k for k, name in enumerate(_COLUMNS) if text or not name.startswith("retrieval")]
    columns, rows = [_COLUMNS[k] for k in keep], [[row[k] for k in keep] for row in rows]
    report.table(columns, rows)
    report.csv("points", [name.replace(" ", "_") for name in columns], rows)
    machine = bench.machine
    report.paragraph(
        f"Drawn in {machine.precision} on {machine.device} ({machine.processor}) with"
        f" {machine.threads} threads. Seconds are of the whole way from condition to pixels, in"
        " batches; network calls are those that one picture waits for, each of them twice as"
        " large under guidance. The cards with all that decided the numbers lie in points/."
    )
    report.details("What was asked for", to_yaml(study))
    return report.write()


def _steps_section(
    report: Report, bench: Bench, points: Sequence[MeasuredPoint], floor: Number | None
) -> None:
    study = bench.study
    report.heading("Quality against steps")
    report.items(_findings(points))
    steps = sorted(study.steps)
    log_y = all(point.kid.value > 0 for point in points)
    lines = {name: [p for p in points if p.drawn_with.sampler == name] for name in study.samplers}
    figure = line_plot(
        [
            *(_kid_line(n, [p.drawn_with.steps for p in ps], ps) for n, ps in lines.items()),
            *_floor_line(floor, steps),
        ],
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
        f"{_KID} by the number of steps, at guidance scale {study.guidance_scale:g}; lower is"
        " better. Bars are standard errors.",
    )
    figure = line_plot(
        [
            *(_kid_line(n, [p.seconds_per_image for p in ps], ps) for n, ps in lines.items()),
            *_floor_line(floor, [p.seconds_per_image for p in points]),
        ],
        title="Quality against cost",
        x_label="seconds per picture",
        y_label=_KID,
        log_x=True,
        log_y=log_y,
    )
    report.figure(figure, "kid-seconds", "The same by the time that a picture takes.")
    if _has_retrieval(points):
        figure = line_plot(
            [
                Line(
                    label=name,
                    x=[p.drawn_with.steps for p in ps],
                    y=[p.share("retrieval") or 0.0 for p in ps],
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
    report: Report, bench: Bench, points: Sequence[MeasuredPoint], floor: Number | None
) -> None:
    study = bench.study
    report.heading("Quality against guidance scale")
    how = f"{study.scale_sampler}, {study.scale_steps} steps"
    best = min(points, key=_kid)
    scales = [p.drawn_with.guidance_scale for p in points]
    shares = {
        name: [p.share(name) or 0.0 for p in points]
        for name in ("precision", "recall", *(["retrieval"] if _has_retrieval(points) else []))
    }
    ends = [f"{name} from {ys[0]:.2f} to {ys[-1]:.2f}" for name, ys in shares.items()]
    report.items(
        [
            f"The lowest {_KID} is {_estimate(best.kid)}, at scale"
            f" {best.drawn_with.guidance_scale:g}.",
            f"From scale {scales[0]:g} to {scales[-1]:g}, {', '.join(ends)} (MobileNetV2).",
        ]
    )
    figure = line_plot(
        [_kid_line(study.scale_sampler, scales, points), *_floor_line(floor, scales)],
        title="Quality against guidance scale",
        x_label="guidance scale",
        y_label=_KID,
    )
    report.figure(figure, "kid-scale", f"{_KID} by guidance scale ({how}); 1 is no guidance.")
    figure = line_plot(
        [Line(label=name, x=scales, y=ys) for name, ys in shares.items()],
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
    request = bench.requests(study.of_strips())[0]
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
    for steps in sorted({p.drawn_with.steps for p in points}):
        best = min((p for p in points if p.drawn_with.steps == steps), key=_kid)
        said.append(
            f"{steps} steps: the lowest {_KID} is {_estimate(best.kid)}, of"
            f" {best.drawn_with.sampler}."
        )
    best = min(points, key=_kid)
    near = [
        p for p in points if _kid(p) - _kid(best) <= 2 * (p.kid_error**2 + best.kid_error**2) ** 0.5
    ]
    cheapest = min(near, key=lambda p: p.network_calls)
    said.append(
        f"The cheapest within two standard errors of the best is {cheapest.drawn_with.sampler} with"
        f" {cheapest.drawn_with.steps} steps: {cheapest.network_calls} network calls,"
        f" {cheapest.seconds_per_image:.3g} s a picture, {_KID} {_estimate(cheapest.kid)}."
    )
    return said


def _has_retrieval(points: Iterable[MeasuredPoint]) -> bool:
    return any(point.share("retrieval") is not None for point in points)


def _kid(point: MeasuredPoint) -> float:
    return point.kid.value


def _estimate(kid: Number) -> str:
    return f"{kid.value:.4f} ± {kid.standard_error or 0.0:.4f}"


def _kid_line(label: str, x: Sequence[float], points: Sequence[MeasuredPoint]) -> Line:
    return Line(label=label, x=x, y=[_kid(p) for p in points], errors=[p.kid_error for p in points])


def _floor_line(floor: Number | None, x: Sequence[float]) -> list[Line]:
    """What real pictures have, from the left of the plot to its right."""
    if floor is None:
        return []
    ends = [min(x), max(x)]
    return [Line(label="real", x=ends, y=[floor.value] * 2, colour="#555555", dashed=True)]


def _row(point: MeasuredPoint) -> list[Cell]:
    how = point.drawn_with
    return [
        how.sampler,
        how.steps,
        how.guidance_scale,
        point.kid,
        point.share("precision"),
        point.share("recall"),
        point.share("retrieval"),
        point.seconds_per_image,
        point.network_calls,
    ]
