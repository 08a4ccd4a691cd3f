"""The random model that the benchmarks share, written once."""

from pathlib import Path

import pytest
from benchmarks.random_models import stable_diffusion


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    folder = tmp_path_factory.mktemp("benchmarks")
    stable_diffusion(folder, tiny=True)
    return folder
