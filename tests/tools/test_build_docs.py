"""Links that work in the repository work on the site, and those that lead nowhere are told."""

from pathlib import Path

import pytest

from tools import build_docs

NAV = """
[project]
nav = [{ "Start" = "index.md" }, { "Guides" = ["guides/one.md"] }, %s
  "changelog.md", "contributing.md", "license.md", "notice.md"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs/guides").mkdir(parents=True)
    (tmp_path / "docs/index.md").write_text("# Start\n")
    (tmp_path / "docs/guides/one.md").write_text("# One\n")
    (tmp_path / "docs/plot.png").write_bytes(b"")
    for name in build_docs.ROOT_PAGES:
        (tmp_path / name).write_text(f"of {name}\n")
    (tmp_path / "zensical.toml").write_text(NAV % "")
    return tmp_path


def gathered(root: Path, page: str) -> str:
    assert build_docs.gather(root, root / "build") == []
    return (root / "build" / page).read_text()


def test_links_lead_to_the_same_page(root: Path) -> None:
    (root / "docs/guides/one.md").write_text(
        "[a](../../CHANGELOG.md#added) [b](../index.md) ![c](../plot.png) [d](https://x.org/y.md)\n"
        "[e](#here) `[f](gone.md)`\n\n```sh\n[g](gone.md)\n```\n"
    )
    (root / "CHANGELOG.md").write_text("[h](docs/guides/one.md) [i](LICENSE)\n")
    text = gathered(root, "guides/one.md")
    assert text == (
        "[a](../changelog.md#added) [b](../index.md) ![c](../plot.png) [d](https://x.org/y.md)\n"
        "[e](#here) `[f](gone.md)`\n\n```sh\n[g](gone.md)\n```\n"
    )
    assert gathered(root, "changelog.md") == "[h](guides/one.md) [i](license.md)\n"


def test_links_that_lead_nowhere_are_told(root: Path) -> None:
    (root / "docs/guides/one.md").write_text("[a](two.md) ![b](plot.png) [c](../../pyproject.toml)")
    assert build_docs.gather(root, root / "build") == [
        "docs/guides/one.md: links to two.md, which is not on the site",
        "docs/guides/one.md: links to plot.png, which is not on the site",
        "docs/guides/one.md: links to ../../pyproject.toml, which is not on the site",
    ]


def test_pages_and_contents_are_the_same(root: Path) -> None:
    (root / "docs/guides/two.md").write_text("# Two\n")
    (root / "zensical.toml").write_text(NAV % '"guides/three.md",')
    assert build_docs.gather(root, root / "build") == [
        "zensical.toml: nav lacks guides/two.md",
        "zensical.toml: nav has guides/three.md, which is not there",
    ]


def test_formulas_are_mathml_outside_of_code(root: Path) -> None:
    (root / "docs/index.md").write_text(
        "$x^2$ costs `$5` and `$6`\n\n$$\\sqrt{x}$$\n\n```sh\necho $a $b\n```\n"
    )
    text = gathered(root, "index.md")
    assert text.startswith('<span><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline')
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in text and "<msqrt>" in text
    assert "`$5` and `$6`" in text and "echo $a $b" in text
    assert text.count("<math") == 2


def test_plain_texts_are_shown_as_they_are(root: Path) -> None:
    assert gathered(root, "license.md") == "# Licence\n\n```text\nof LICENSE\n```\n"


def test_a_second_call_leaves_nothing_of_the_first(root: Path) -> None:
    (root / "docs/index.md").write_text("# Start\n")
    gathered(root, "index.md")
    (root / "docs/plot.png").unlink()
    gathered(root, "index.md")
    assert not (root / "build/plot.png").exists()


def test_this_repository_has_no_faults(tmp_path: Path) -> None:
    assert build_docs.gather(build_docs.ROOT, tmp_path / "docs") == []
