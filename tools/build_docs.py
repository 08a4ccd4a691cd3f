"""Build the documentation's site; a link that leads nowhere is an error.

    python -m tools.build_docs

gathers the pages in ``build/docs`` and lets Zensical write ``build/site`` from them. The pages are
those of ``docs`` and some files of the root, so that a link between any two of them works in the
repository and on the site alike; formulas become MathML, which browsers show without a script.
"""

import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["ROOT_PAGES", "build", "gather", "main"]

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
    "NOTICE": "notice.md",
}
_TITLES = {"LICENSE": "Licence", "NOTICE": "Works of others"}
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$\n]*[^$\s])?)\$", flags=re.DOTALL)


def gather(root: Path, into: Path) -> list[str]:
    """Copy what the site is made of.

    Args:
        root: The repository's root.
        into: A folder for the copy; what it holds is deleted.

    Returns:
        What is wrong with links and with the site's contents, a sentence each.
    """
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(root / "docs", into)
    places = {f"docs/{path}": path for path in _files(into)} | ROOT_PAGES
    problems: list[str] = []
    for source, place in places.items():
        if not place.endswith(".md"):
            continue
        text = (root / source).read_text()
        if source in _TITLES:
            text = f"# {_TITLES[source]}\n\n```text\n{text.rstrip()}\n```\n"
        text, wrong = _with_links(text, source, places)
        problems += wrong
        (into / place).write_text(_outside_code(text, _with_formulas))
    return problems + list(_contents(root, {p for p in places.values() if p.endswith(".md")}))


def build(root: Path) -> list[str]:
    """Build the site.

    Args:
        root: The repository's root.

    Returns:
        What is wrong, a sentence each; the site is not there then.
    """
    site = root / "build/site"
    shutil.rmtree(site, ignore_errors=True)
    if problems := gather(root, root / "build/docs"):
        return problems
    program = Path(sys.executable).with_name("zensical")
    command = [program, "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="", end="")
    # docstrings that cannot be read are told, and do not end the program
    told = [
        line for line in done.stderr.splitlines() if line.startswith(("griffe", "mkdocstrings"))
    ]
    if done.returncode:
        told.append("zensical found what stands above")
    if told:
        shutil.rmtree(site, ignore_errors=True)
    return told


def main() -> None:
    """Build the site of this repository."""
    if problems := build(ROOT):
        sys.exit("\n".join(problems))
    print(f"the site is in {ROOT / 'build/site'}")


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    end = 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def _with_links(text: str, source: str, places: dict[str, str]) -> tuple[str, list[str]]:
    """Let the links of a page, which lead through the repository, lead through the site."""
    wrong: list[str] = []

    def moved(link: re.Match[str]) -> str:
        target, mark, anchor = link.group(1).partition("#")
        if not target or "://" in target:
            return link.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path not in places:
            wrong.append(f"{source}: links to {target}, which is not on the site")
            return link.group()
        there = posixpath.relpath(places[path], posixpath.dirname(places[source]) or ".")
        return f"]({there}{mark}{anchor})"

    return _outside_code(text, lambda part: _LINK.sub(moved, part)), wrong


def _with_formulas(text: str) -> str:
    def converted(formula: re.Match[str]) -> str:
        # imported here so that links can be checked without it
        from latex2mathml.converter import convert

        block, inline = formula.groups()
        if block is None:
            return f"<span>{convert(inline)}</span>"  # a line that begins with it is still text
        return f"<div>{convert(block.strip(), display='block')}</div>"

    return _FORMULA.sub(converted, text)


def _contents(root: Path, pages: set[str]) -> Iterator[str]:
    """Compare the pages with the site's table of contents."""
    settings = tomllib.loads((root / "zensical.toml").read_text())
    named = set(_pages_of(settings["project"]["nav"]))
    yield from (f"zensical.toml: nav lacks {page}" for page in sorted(pages - named))
    yield from (f"zensical.toml: nav has {page}, which is not there" for page in named - pages)


def _pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages_of(inner)


if __name__ == "__main__":
    main()
