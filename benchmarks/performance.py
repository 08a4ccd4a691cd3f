"""The page of what was measured beside peers, from the JSON files of its benchmarks.

    python -m benchmarks.performance

Reads docs/results/performance/*.json, which the benchmarks write with --output, and writes
docs/results/performance.md and a plot of each curve beside the JSON files. Files of rehearsals
(--tiny) are refused.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth import exponents
from benchmarks.side_by_side import Record, rows
from mezzotint.studies.plots import Line, line_plot, plot_bytes
from mezzotint.studies.speed import PEAK_WORDS

PAGE = Path("docs/results/performance.md")
LABELS = {"batch": "pictures at once", "resolution": "side in pixels", "steps": "steps"}

_ABOUT = """# Performance

Each row is of one run, in which Mezzotint and the peer were measured in turns, A B A B, in one
process or, where something starts, in processes of their own; where Mezzotint draws in two ways
beside the same peer, A A B A A B. The ratio is the median over the pairs of Mezzotint's time by the
peer's: below 1, Mezzotint is faster. The peak is that of the same device,
precision and run: {peak}. Weights are random and the same for both; `differ` is the
largest difference between the results over the largest value of the peer's. `python -m
benchmarks.performance` wrote this page from the raw numbers in `docs/results/performance`.
"""


def read_records(folder: Path, *, tiny: bool) -> dict[str, Record]:
    """Read the records of a folder by the names of their files.

    Args:
        folder: With JSON files.
        tiny: Take those of rehearsals too.
    """
    records = {path.stem: Record.read(path) for path in sorted(folder.glob("*.json"))}
    if not records:
        sys.exit(f"{folder}: no JSON file of a benchmark; run one with --output {folder}/NAME.json")
    for name, record in records.items():
        if record.tiny and not tiny:
            sys.exit(f"{folder / name}.json: is of a rehearsal with tiny networks; measure anew")
    return records


def machine_words(record: Record) -> str:
    """Say on what a record was measured."""
    machine = record.machine
    where = f"{machine.threads} threads of " if machine.device == "cpu" else ""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return f"{where}{machine.processor}; {versions}"


def plot_growth(record: Record, path: Path) -> None:
    """Draw the seconds of a curve's points, Mezzotint's and the peer's."""
    assert record.axis is not None
    at = [each.at or 0.0 for each in record.comparisons]
    ours = [statistics.median(each.seconds) for each in record.comparisons]
    theirs = [statistics.median(each.peer_seconds) for each in record.comparisons]
    lines = [Line(label="Mezzotint", x=at, y=ours), Line(label="the peer", x=at, y=theirs)]
    figure = line_plot(
        lines,
        x_label=LABELS[record.axis],
        y_label="seconds",
        log_x=True,
        log_y=True,
        x_ticks=at,
    )
    path.write_bytes(plot_bytes(figure))


def growth_section(name: str, record: Record, folder: Path) -> list[str]:
    """Return the lines that tell of a curve."""
    assert record.axis is not None
    ours, theirs = exponents(record)
    of = "the pixels" if record.axis == "resolution" else LABELS[record.axis]
    plot_growth(record, folder / f"{name}.webp")
    first, peer = record.comparisons[0], record.comparisons[0].peer
    lines = [f"## Seconds by {LABELS[record.axis]}", ""]
    lines += [f"![Seconds by {LABELS[record.axis]}]({folder.name}/{name}.webp)", ""]
    lines += [f"Mezzotint in {first.mezzotint} grows with the power {ours:.2f} of {of};"]
    lines += [f"{peer} with {theirs:.2f}."]
    if record.axis == "batch":
        each = {c.images: statistics.median(c.seconds) / c.images for c in record.comparisons}
        told = ", ".join(f"{count}: {seconds:.3g} s" for count, seconds in each.items())
        lines += [f"Seconds a picture, by how many are drawn at once: {told}."]
    return [*lines, "", *rows(record.comparisons), ""]


def page(records: dict[str, Record], folder: Path) -> str:
    """Return the page, and write its plots into the folder of the JSON files."""
    lines = [_ABOUT.format(peak=PEAK_WORDS)]
    by_machine: dict[str, list[Record]] = defaultdict(list)
    for record in records.values():
        if record.axis is None:
            by_machine[machine_words(record)].append(record)
    for machine, measured in by_machine.items():
        lines += [f"## {machine}", ""]
        lines += rows([each for record in measured for each in record.comparisons])
        lines.append("")
    for name, record in records.items():
        if record.axis is not None:
            lines += [*growth_section(name, record, folder), f"On {machine_words(record)}.", ""]
    commands = [record.command for record in records.values()]
    lines += ["## Commands", "", "```sh", *commands, "```", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--tiny", action="store_true", help="take rehearsals too")
    options = parser.parse_args(arguments)
    folder = options.page.with_suffix("")
    text = page(read_records(folder, tiny=options.tiny), folder)
    options.page.write_text(text, encoding="utf-8")
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
