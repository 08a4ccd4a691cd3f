"""Folders of tiny models that several tests read, and some damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import CONDITIONERS, kl, model

from mezzotint.checkpoints.pipelines import save_pipeline


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by condition, each written once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("saved") / kind
            save_pipeline(model(CONDITIONERS[kind](), kl(4 if kind == "bert" else 2)), path)
            made[kind] = path
        return made[kind]

    return folder


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda kind: Path(shutil.copytree(saved(kind), tmp_path / kind))
