"""The table of the study of objectives, from the results that are there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from mezzotint.errors import DataError
from mezzotint.studies.objectives.results import (
    PICTURE,
    ObjectiveResult,
    Point,
    read_results,
    require_same,
    result_path,
)
from mezzotint.studies.objectives.runs import OBJECTIVES, RECIPE

__all__ = ["write_report"]


def write_report(output: Path) -> Path:
    """Write ``objectives.md`` beside the results.

    Args:
        output: Folder of the results.

    Returns:
        The report.

    Raises:
        DataError: If there is no result.
        ConfigError: If the results are not of equal budgets.
    """
    results = read_results(output)
    if not results:
        raise DataError(f"{output}: holds no results; run the study first")
    first = results[0]
    require_same(output, results, first.budget, first.pictures, first.settings)
    told = "".join(f", `{setting}`" for setting in first.settings)
    lines = [
        "# What the network predicts, at equal compute",
        "",
        f"Printed by `mezzotint study objectives`. Each model is `{RECIPE}` with the overrides"
        f" below{told}, trained for {first.budget} in one latent space, and asked for the classes"
        f" of {first.pictures} held-out scenes, from the same noise ({first.sampler}). KID is of"
        " MobileNetV2's features, times 1000, against these scenes: lower is better. Class accuracy"
        " is a linear classifier's on the same features, trained on real scenes; retrieval is by"
        " the nearest class mean. Numbers are means over the seeds, ± half of what lies between"
        " the least and the greatest.",
        "",
        *_table(results),
        "",
        "| objective | overrides |",
        "|---|---|",
        *(
            f"| {name} | {' '.join(f'`{override}`' for override in overrides)} |"
            for name, overrides in OBJECTIVES.items()
        ),
        "",
        *_machines(results),
        *_pictures(results, output),
    ]
    path = output / "objectives.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _table(results: Sequence[ObjectiveResult]) -> list[str]:
    plain = [point for point in results[0].points if point.guidance_scale == 1.0]
    most = plain[-1].steps
    guided = results[0].points[-1].guidance_scale
    columns: list[tuple[str, Callable[[ObjectiveResult], float], str]] = [
        *(
            (f"KID, {point.steps} steps", lambda r, k=k: 1000 * r.points[k].kid, ".1f")
            for k, point in enumerate(plain)
        ),
        (f"class accuracy, {most} steps", _of(len(plain) - 1, "class_accuracy"), ".3f"),
        (f"retrieval, {most} steps", _of(len(plain) - 1, "retrieval"), ".3f"),
        (f"KID, guidance {guided:g}", lambda r: 1000 * r.points[-1].kid, ".1f"),
        (f"class accuracy, guidance {guided:g}", _of(-1, "class_accuracy"), ".3f"),
        ("training steps", lambda r: float(r.steps), ",.0f"),
        ("minutes", lambda r: r.minutes, ".1f"),
    ]
    lines = [
        f"| objective | seeds | {' | '.join(title for title, _, _ in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name in OBJECTIVES:
        own = [result for result in results if result.objective == name]
        if own:
            cells = [_cell([value(r) for r in own], form) for _, value, form in columns]
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return lines


def _of(k: int, name: str) -> Callable[[ObjectiveResult], float]:
    def value(result: ObjectiveResult) -> float:
        point: Point = result.points[k]
        return float(getattr(point, name))

    return value


def _cell(values: Sequence[float], form: str) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):{form}}" + (f" ± {half:{form}}" if half else "")


def _machines(results: Sequence[ObjectiveResult]) -> list[str]:
    told = dict.fromkeys(
        f"{r.machine.processor}, {r.machine.threads} threads, {r.machine.precision}"
        for r in results
    )
    first = results[0]
    return [
        f"The held-out scenes themselves: class accuracy {first.real_class_accuracy:.3f}, retrieval"
        f" {first.real_retrieval:.3f}. Trained and measured on: {'; '.join(told)}.",
        "",
    ]


def _pictures(results: Sequence[ObjectiveResult], output: Path) -> list[str]:
    lines = ["## The first classes, with guidance, from the same noise", ""]
    for name in OBJECTIVES:
        for result in results:
            path = result_path(output, name, result.seed).with_suffix(PICTURE)
            if result.objective == name and path.is_file():
                lines += [f"![{name}, seed {result.seed}]({path.name})", ""]
    return lines
