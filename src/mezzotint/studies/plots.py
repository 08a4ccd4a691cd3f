"""Plots of the studies in one look, drawn without a window or matplotlib's global figures."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from mezzotint.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Line", "draw_lines", "line_plot", "new_figure", "plot_bytes", "plot_style"]

# Okabe and Ito's colours, which people of every colour vision tell apart; their yellow is left out
# because it cannot be read on white
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
)
# a second sign beside the colour, for print without any
_MARKERS = "osD^vPX*"

_STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot; points that are not finite are left out.

    Attributes:
        label: Written at the right end of the line, in its colour.
        x: Positions along the horizontal axis, rising.
        y: Heights, one for each position.
        errors: Standard errors of the heights, drawn as bars.
        names: A text beside each point.
        colour: matplotlib's notation; by default the next of `COLOURS`.
        dashed: Tells a second family of lines from the first.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None
    names: Sequence[str] | None = None
    colour: str | None = None
    dashed: bool = False


def plot_bytes(figure: Figure) -> bytes:
    """Return a figure as WebP, without loss: the same figure is the same bytes, half of PNG's."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    with plot_style():
        figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").save(buffer, format="WEBP", lossless=True, method=6)
    return buffer.getvalue()


@contextlib.contextmanager
def plot_style() -> Generator[None]:
    """Draw in the one look of all plots; matplotlib's settings are as before afterwards.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "train", "drawing plots") from None
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float = 7.2, height: float = 4.4) -> Figure:
    """Return an empty figure of the one look.

    Args:
        width: In inches, of 150 pixels.
        height: In inches.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with plot_style():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")


def line_plot(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> Figure:
    """Draw lines with their names at their ends.

    Args:
        lines: What to draw.
        x_label: Of the horizontal axis, with its unit.
        y_label: Of the vertical axis, with its unit.
        title: Above the plot.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        x_ticks: The only positions that are marked along the horizontal axis.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = new_figure()
    with plot_style():
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        draw_lines(axes, lines, log_x=log_x, log_y=log_y, x_ticks=x_ticks)
    return figure


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> None:
    """Draw lines into one panel of a figure; arguments as of `line_plot`."""
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    places = {x for line in lines for x in line.x}
    if log_x and len(places) == 1:  # matplotlib can leave an axis of one place without any width
        axes.set_xlim(0.5 * min(places), 1.5 * min(places))
    ends: list[tuple[float, float, str, str]] = []
    for number, line in enumerate(lines):
        colour = line.colour or COLOURS[number % len(COLOURS)]
        errors = line.errors or [0.0] * len(line.x)
        points = [
            (x, y, e)
            for x, y, e in zip(line.x, line.y, errors, strict=True)
            if _can_stand(x, log_x) and _can_stand(y, log_y)
        ]
        if not points:
            continue
        xs, ys, es = ([p[k] for p in points] for k in range(3))
        axes.errorbar(
            xs,
            ys,
            yerr=es if line.errors is not None else None,
            color=colour,
            # where there are more lines than colours the second ones of a colour are dotted
            linestyle="--" if line.dashed else ":" if number >= len(COLOURS) else "-",
            marker=_MARKERS[number % len(_MARKERS)],
            capsize=2.5,
            elinewidth=1.0,
        )
        ends.append((xs[-1], ys[-1], line.label, colour))
        for name, x, y in zip(line.names or (), line.x, line.y, strict=False):
            if _can_stand(x, log_x) and _can_stand(y, log_y):
                axes.annotate(
                    name,
                    (x, y),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=colour,
                )
    _plain_numbers(axes, x_ticks)
    _label_ends(axes, ends)


def _plain_numbers(axes: Axes, x_ticks: Sequence[float] | None) -> None:
    """Mark logarithmic axes by 0.1, 1, 10, and between these where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        if axis.get_scale() == "log":
            few, many = (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
            subs = (1.0,) if high / low > 300 else few if high / low > 8 else many
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    if x_ticks is not None:
        axes.set_xticks(list(x_ticks), [f"{x:g}" for x in x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def _can_stand(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label at its line's end; right of the panel, as near as there is room."""
    # the limits as they are now must stay: the labels' places are fractions of the panel
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    to_panel = axes.transData + axes.transAxes.inverted()
    placed = sorted(
        (float(height), float(right), label, colour)
        for (right, height), label, colour in (
            (to_panel.transform((x, y)), label, colour) for x, y, label, colour in ends
        )
    )
    # of lines that end well inside the panel the labels stand there, where other lines seldom are
    rightmost = max((right for _, right, _, _ in placed), default=1.0)
    beside = [place for place in placed if place[1] > rightmost - 0.25]
    figure = axes.get_figure()
    assert figure is not None
    panel = axes.bbox.height / figure.dpi * 72  # points
    heights = _spread([height for height, *_ in beside], 11.5 / panel)
    within = [place for place in placed if place not in beside]
    for height, (_, _, label, colour) in zip(heights, beside, strict=True):
        _write(axes, label, colour, (1.0, height))
    for height, right, label, colour in within:
        _write(axes, label, colour, (right, height))


def _write(axes: Axes, label: str, colour: str, place: tuple[float, float]) -> None:
    axes.annotate(
        label,
        place,
        xycoords="axes fraction",
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        color=colour,
        annotation_clip=False,
    )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move rising numbers as little as need be until each is ``gap`` above the one before.

    Neighbours that are too close form a block about their mean; blocks that then touch are joined
    (the pool-adjacent-violators algorithm on ``height - rank * gap``).
    """
    blocks: list[tuple[float, int]] = []  # mean of the members' height - rank * gap, and how many
    for rank, height in enumerate(heights):
        mean, count = height - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, members = blocks.pop()
            mean = (mean * count + other * members) / (count + members)
            count += members
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    return [mean + rank * gap for rank, mean in enumerate(means)]
