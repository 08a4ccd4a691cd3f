"""What the pages of concepts show: their code runs, and a command draws each of their figures."""

import re
import shlex
from pathlib import Path

import pytest
from tools.docs_figures.__main__ import FIGURES

PAGES = sorted((Path(__file__).parents[2] / "docs/concepts").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_code_runs(page: Path) -> None:
    code = blocks(page, "python")
    assert code or page.stem == "index"
    for block in code:
        exec(compile(block, page.name, "exec"), {})  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_command_draws_its_figures(page: Path) -> None:
    """What the command draws is compared in tests/tools/test_docs_figures.py."""
    (command,) = blocks(page, "sh")
    python, option, module, *names = shlex.split(command)
    assert [python, option, module] == ["python", "-m", "tools.docs_figures"]
    shown = re.findall(r"\(\.\./figures/(\w+)\.webp\)", page.read_text())
    assert names == shown and set(names) <= set(FIGURES)
    assert bool(names) == (page.stem != "index")


def test_every_figure_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"figures/{name}.webp" in text for name in FIGURES)
