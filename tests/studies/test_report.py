"""Reports: what is written can be read, stands alone, and shows text as it is."""

import csv
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from PIL import Image

from mezzotint.studies.plots import COLOURS, Line, _spread, line_plot, new_figure, plot_style
from mezzotint.studies.report import Report


@dataclass(frozen=True)
class Known:
    value: float
    standard_error: float


class Page(HTMLParser):
    """Every element with its attributes, the text of each, and whether all are closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], data.strip()))

    def texts(self, tag: str) -> list[str]:
        return [text for element, text in self.text if element == tag]


def test_the_page_holds_what_was_said_in_order_and_as_it_is(tmp_path: Path) -> None:
    report = Report("<A> & B", tmp_path)
    report.heading("One <i>")
    report.paragraph("x < y & </p><script>alert(1)</script>")
    report.items(["<b>", "two"])
    report.details("Settings", "a: <1>\nb: 2")
    report.heading("Two")
    page = Page(report.write())
    assert page.texts("title") == page.texts("h1") == ["<A> & B"]
    assert page.texts("h2") == page.texts("a") == ["One <i>", "Two"]
    assert page.texts("p") == ["x < y & </p><script>alert(1)</script>"]
    assert page.texts("li") == ["<b>", "two"]
    assert page.texts("pre") == ["a: <1>\nb: 2"]
    assert "script" not in {tag for tag, _ in page.elements}
    anchors = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert anchors == [f"#{name}" for name in ids]


def test_the_page_asks_nothing_of_any_network_or_file(tmp_path: Path) -> None:
    report = Report("alone", tmp_path)
    report.figure(line_plot([Line(label="a", x=[1, 2], y=[3, 4])], x_label="", y_label=""), "p", "")
    report.picture(Image.new("RGB", (4, 4)), "q", "")
    page = report.write()
    text = page.read_text(encoding="utf-8")
    for attributes in (a for _, a in Page(page).elements):
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", text)


def test_pictures_lie_inside_the_page_and_beside_it(tmp_path: Path) -> None:
    report = Report("pictures", tmp_path)
    shade = np.linspace(0, 255, 5 * 7 * 3).reshape(5, 7, 3).round().astype(np.uint8)
    report.picture(Image.fromarray(shade), "shade", "Noise & more", alt="grey <dots>")
    report.picture(Image.fromarray(shade), "again", "Only a caption")
    page = Page(report.write())
    kept = np.asarray(Image.open(tmp_path / "shade.webp"), dtype=np.int16)
    assert np.abs(kept - shade).max() <= 16  # WebP keeps colour at half the resolution
    first, second = (a for tag, a in page.elements if tag == "img")
    assert (first["alt"], second["alt"]) == ("grey <dots>", "Only a caption")
    assert (first["width"], first["height"]) == ("7", "5")
    assert page.texts("figcaption") == ["Noise & more", "Only a caption"]


def test_tables_show_four_digits_and_files_all_of_them(tmp_path: Path) -> None:
    report = Report("tables", tmp_path)
    columns = ["name", "count", "KID", "PSNR [dB]"]
    rows = [["a,b", 12345, Known(0.0123456, 0.00123), math.inf], ["c", None, None, -24.19151]]
    report.table(columns, rows, caption="All")
    path = report.csv("all", columns, rows)
    page = Page(report.write())
    assert page.texts("caption") == ["All"]
    assert page.texts("th") == columns
    assert page.texts("td") == ["a,b", "12,345", "0.01235 ± 0.0012", "∞", "c", "–", "–", "−24.19"]
    numeric = [a.get("class") for tag, a in page.elements if tag == "td"]
    assert numeric[:4] == [None, "n", "n", "n"]
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read == [
        ["name", "count", "KID", "KID_standard_error", "PSNR [dB]"],
        ["a,b", "12345", "0.0123456", "0.00123", "inf"],
        ["c", "", "", "", "-24.19151"],
    ]


def test_the_same_plot_is_the_same_file_and_leaves_no_trace_in_matplotlib(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report = Report("twice", tmp_path)
    for name in ("a", "b"):
        lines = [Line(label="x", x=[1, 10], y=[1, 0.1], errors=[0.1, 0.01], names=["p", "q"])]
        plot = line_plot(lines, x_label="x", y_label="y", log_x=True, log_y=True, x_ticks=[1, 10])
        report.figure(plot, name, "the same")
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    with Image.open(tmp_path / "a.webp") as image:
        assert image.size == (1080, 660)


def test_every_line_is_drawn_in_its_colour_and_named(tmp_path: Path) -> None:
    names = "abcdefgh"
    lines = [Line(label=n, x=[2, 5], y=[1, 0.5 + 0.01 * k]) for k, n in enumerate(names)]
    figure = line_plot(lines, x_label="steps", y_label="KID", title="T")
    axes = figure.axes[0]
    labels = {t.get_text(): t for t in axes.texts}
    assert set(labels) == set(names)
    assert [labels[n].get_color() for n in names] == list(COLOURS)
    heights = [labels[n].xy[1] for n in names]
    assert heights == sorted(heights)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.02
    Report("colours", tmp_path).figure(figure, "lines", "")
    pixels = np.asarray(Image.open(tmp_path / "lines.webp").convert("RGB")).reshape(-1, 3)
    seen = set(map(tuple, pixels.tolist()))
    for colour in COLOURS:
        assert tuple(bytes.fromhex(colour[1:])) in seen


def test_what_no_axis_can_show_is_left_out() -> None:
    lines = [
        Line(label="one", x=[0, 1, 2], y=[1.0, math.inf, 3.0]),
        Line(label="none", x=[1], y=[math.nan]),
    ]
    axes = line_plot(lines, x_label="", y_label="", log_x=True).axes[0]
    assert [t.get_text() for t in axes.texts] == ["one"]
    assert [c.lines[0].get_xydata().tolist() for c in axes.containers] == [[[2.0, 3.0]]]


def test_one_point_has_an_axis_too() -> None:
    one = Line(label="one", x=[2], y=[0.1])
    axes = line_plot([one], x_label="", y_label="", log_x=True, log_y=True, x_ticks=[2]).axes[0]
    assert axes.get_xlim()[0] < 2 < axes.get_xlim()[1]
    assert 0 < axes.texts[0].xy[1] < 1


def test_labels_give_way_by_as_little_as_there_is_need() -> None:
    assert _spread([0.0, 1.0, 2.0], 0.5) == [0.0, 1.0, 2.0]
    np.testing.assert_allclose(_spread([1.0, 1.0], 0.5), [0.75, 1.25])
    np.testing.assert_allclose(_spread([0.0, 1.0, 1.1, 1.2, 9.0], 0.5), [0.0, 0.6, 1.1, 1.6, 9.0])
    # a block that grows into its neighbour takes it along
    np.testing.assert_allclose(_spread([0.6, 1.0, 1.0], 0.5), [0.3667, 0.8667, 1.3667], atol=1e-4)


def test_without_matplotlib_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mezzotint.errors import MissingExtraError\n"
        "from mezzotint.studies.plots import new_figure\n"
        "try:\n    new_figure()\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "'matplotlib'" in done.stdout, done.stderr
    assert "mezzotint[train]" in done.stdout


def test_an_empty_figure_is_as_large_as_asked() -> None:
    with plot_style():
        figure = new_figure(3, 2)
    assert figure.get_size_inches().tolist() == [3, 2]


def test_markdown_says_the_same(tmp_path: Path) -> None:
    report = Report("A *study*", tmp_path)
    report.heading("One")
    report.paragraph("kid_x < [y]")
    report.items(["a", "b"])
    report.table(["name", "PSNR"], [["a|b", 24.191], ["c", None]], "in dB")
    report.picture(Image.new("RGB", (4, 4)), "sheet", "Drawn [here]")
    report.details("study.yaml", "a: 1\n")
    report.write()
    assert (tmp_path / "report.md").read_text().split("\n\n") == [
        "# A \\*study\\*",
        "## One",
        "kid\\_x \\< \\[y\\]",
        "- a\n- b",
        "in dB:",
        "| name | PSNR |\n| :-- | --: |\n| a\\|b | 24.19 |\n| c | – |",
        "![Drawn \\(here\\)](sheet.webp)",
        "Drawn \\[here\\]",
        "study.yaml:",
        "```\na: 1\n```\n",
    ]
