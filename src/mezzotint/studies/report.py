"""What a study found, as one HTML file that needs no other, with its plots and tables beside it.

The same stands in Markdown, for where code is read.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL import Image

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.studies.plots import plot_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Measured", "Report"]

_LONG = 40  # letters; longer texts in a table are wrapped
_QUALITY = 85  # of WebP: little difference to be seen
_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


@runtime_checkable
class Measured(Protocol):
    """A number and how well it is known."""

    @property
    def value(self) -> float:
        """The estimate."""
        ...

    @property
    def standard_error(self) -> float | None:
        """Its standard error, if it is known."""
        ...


Cell = str | int | float | Measured | None
"""What stands in a table; ``None`` is what was not measured."""


class Report:
    """Gathers text, tables, plots and pictures in order; `write` makes the page.

    The page stands alone: its pictures are inside it, and it asks nothing of any network. Plots,
    pictures and tables also lie beside it as PNG, WebP and CSV. Every text is shown as it is; there
    is no markup in it.

    Args:
        title: What the page is called.
        folder: Where it is written; made if need be.

    Example:
        >>> import tempfile
        >>> report = Report("A study", Path(tempfile.mkdtemp()))
        >>> report.heading("What was found")
        >>> report.table(["f", "PSNR [dB]"], [[4, 27.39], [8, 24.191]])
        >>> report.write().name
        'report.html'
    """

    def __init__(self, title: str, folder: Path) -> None:
        self.title = title
        self.folder = folder
        self._parts: list[str] = []
        self._markdown: list[str] = [f"# {_plain(title)}"]
        self._headings: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._headings.append(text)
        self._parts.append(f'<h2 id="s{len(self._headings)}">{html.escape(text)}</h2>')
        self._markdown.append(f"## {_plain(text)}")

    def paragraph(self, text: str) -> None:
        """Say something."""
        self._parts.append(f"<p>{html.escape(text)}</p>")
        self._markdown.append(_plain(text))

    def items(self, texts: Sequence[str]) -> None:
        """Say several things, as a list."""
        self._parts.append(f"<ul>{''.join(f'<li>{html.escape(t)}</li>' for t in texts)}</ul>")
        self._markdown.append("\n".join(f"- {_plain(text)}" for text in texts))

    def details(self, summary: str, text: str) -> None:
        """Keep a longer text, settings for example, folded away under one line."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>"
        )
        self._markdown.append(f"{_plain(summary)}:\n\n```\n{text.rstrip()}\n```")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = ""
    ) -> None:
        """Show a table; it scrolls in its own box where the page is narrow.

        Args:
            columns: Heads of the columns, with units.
            rows: As many cells each; floats are shown with four digits.
            caption: A line above the table.
        """
        for row in rows:
            assert len(row) == len(columns), f"{len(row)} cells under {len(columns)} heads"
        numeric = [
            bool(rows) and all(not isinstance(row[k], str) for row in rows)
            for k in range(len(columns))
        ]

        def line(tag: str, texts: Sequence[str]) -> str:
            cells = (_cell(tag, text, n) for text, n in zip(texts, numeric, strict=True))
            return f"<tr>{''.join(cells)}</tr>"

        head = line('th scope="col"', columns)
        body = "".join(line("td", [_shown(cell) for cell in row]) for row in rows)
        above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        # focusable, so that a keyboard can scroll it
        self._parts.append(
            f'<div class="scroll" role="region" aria-label="{html.escape(caption or "table")}"'
            f' tabindex="0"><table>{above}<thead>{head}</thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
        shown = [columns, ["--:" if n else ":--" for n in numeric]]
        shown += [[_shown(cell) for cell in row] for row in rows]
        lines = [
            "| " + " | ".join(_plain(t).replace("|", "\\|") for t in row) + " |" for row in shown
        ]
        self._markdown += [f"{_plain(caption)}:"] * bool(caption) + ["\n".join(lines)]

    def figure(self, figure: Figure, name: str, caption: str, alt: str = "") -> None:
        """Show a plot, and write it as ``<name>.webp``, without loss and in half the space of PNG.

        Args:
            figure: A matplotlib figure.
            name: Its file's, in lower case.
            caption: What is to be seen, under the plot.
            alt: For those who cannot see it; the caption if left out.
        """
        self._picture(plot_bytes(figure), name, caption, alt)

    def picture(self, image: Image.Image, name: str, caption: str, alt: str = "") -> None:
        """Show a picture, and write it as ``<name>.webp``; arguments as of `figure`.

        As PNG a sheet of drawn pictures would take some megabytes.
        """
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="WEBP", quality=_QUALITY, method=6)
        self._picture(buffer.getvalue(), name, caption, alt)

    def csv(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Path:
        """Write a table as ``<name>.csv``, at full precision.

        Args:
            name: The file's, in lower case.
            columns: Heads of the columns.
            rows: As many cells each. A column that holds a `Measured` becomes two, the second of
                them ``<head>_standard_error``; what was not measured is empty.

        Returns:
            The file.
        """
        doubled = [any(isinstance(row[k], Measured) for row in rows) for k in range(len(columns))]
        heads: list[str] = []
        for column, both in zip(columns, doubled, strict=True):
            heads += [column, f"{column}_standard_error"] if both else [column]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(heads)
        for row in rows:
            cells: list[str | int | float | None] = []
            for cell, both in zip(row, doubled, strict=True):
                if isinstance(cell, Measured):
                    cells += [cell.value, cell.standard_error]
                else:
                    cells += [cell, None] if both else [cell]
            writer.writerow(cells)
        path = self.folder / f"{_checked(name)}.csv"
        write_atomically(path, text.getvalue().encode())
        return path

    def write(self) -> Path:
        """Write the page, and the same in Markdown as ``report.md``.

        Returns:
            ``report.html`` in the folder.

        Raises:
            CheckpointError: If it cannot be written there.
        """
        title = html.escape(self.title)
        links = "".join(
            f'<li><a href="#s{number}">{html.escape(text)}</a></li>'
            for number, text in enumerate(self._headings, 1)
        )
        contents = f'<nav aria-label="Sections"><ol>{links}</ol></nav>' if links else ""
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{title}</h1>\n{contents}\n" + "\n".join(self._parts) + "\n</main>\n"
            "</body>\n</html>\n"
        )
        path = self.folder / "report.html"
        write_atomically(path, page.encode())
        write_atomically(self.folder / "report.md", ("\n\n".join(self._markdown) + "\n").encode())
        return path

    def _picture(self, content: bytes, name: str, caption: str, alt: str) -> None:
        write_atomically(self.folder / f"{_checked(name)}.webp", content)
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        data = base64.b64encode(content).decode()
        self._parts.append(
            f'<figure><img src="data:image/webp;base64,{data}" width="{width}" height="{height}"'
            f' alt="{html.escape(alt or caption)}"><figcaption>{html.escape(caption)}</figcaption>'
            "</figure>"
        )
        alone = _plain(alt or caption).translate(str.maketrans("[]", "()"))
        self._markdown.append(f"![{alone}]({name}.webp)\n\n{_plain(caption)}")


def _checked(name: str) -> str:
    assert _NAME.fullmatch(name), f"{name!r} is no name for a file"
    return name


def _plain(text: str) -> str:
    """Let no letter of a text be markup."""
    return re.sub(r"([\\`*_\[\]<])", r"\\\1", text)


def _cell(tag: str, text: str, numeric: bool) -> str:
    kind = ' class="n"' if numeric else ' class="w"' if len(text) > _LONG else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag.partition(' ')[0]}>"


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return "–"
        case str():
            return cell
        case int():
            return f"{cell:,}"
        case float():
            return _digits(cell)
        case _ if cell.standard_error is None:
            return _digits(cell.value)
        case _:
            return f"{_digits(cell.value)} ± {cell.standard_error:.2g}"


def _digits(number: float) -> str:
    if math.isnan(number):
        return "–"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:.4g}".replace("-", "−") if abs(number) < 1e4 else f"{number:,.0f}"


_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #5f6368;
  --rule: #d9d9de; --band: #f5f5f7; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161618; --ink: #e8e8ea; --faint: #a5a5ab; --rule: #3a3a40;
    --band: #212124; --link: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .6rem; }
p, ul { max-width: 44rem; }
a { color: var(--link); }
nav ol { margin: 0 0 1.5rem; padding-left: 1.4rem; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: .5rem .7rem; }
th, td { padding: .4rem .7rem; text-align: left; white-space: nowrap;
  border-top: 1px solid var(--rule); }
thead th { border-top: 0; background: var(--band); }
.n { text-align: right; }
.w { white-space: normal; min-width: 14rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--rule); }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .4rem; max-width: 44rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--band); padding: .8rem; border-radius: 6px;
  font-size: .85rem; }
"""
