"""The tiny programme that tests of training and of shipping share, trained once."""

from pathlib import Path

import pytest
import yaml
from tiny_programme import AUTOENCODER, TEXT, train
from tools.train_shipped.programme import Programme


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its recipes."""
    folder = tmp_path_factory.mktemp("plans") / "tiny"
    folder.mkdir()
    for name, recipe in (("autoencoder", AUTOENCODER), ("text-to-image", TEXT)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Programme:
    """Trained in one piece."""
    programme = Programme("tiny", plan, tmp_path_factory.mktemp("whole") / "work")
    assert train(programme)
    return programme
