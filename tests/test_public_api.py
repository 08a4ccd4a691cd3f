"""The public surface, frozen: what is written here may be added to, but not changed in passing."""

import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint


def test_the_names_that_the_package_offers() -> None:
    assert set(mezzotint.__all__) == {
        "GenerationRequest",
        "MezzotintError",
        "Pipeline",
        "__version__",
        "checkpoints",
        "evaluate",
        "generate",
        "load",
        "models",
        "train",
    }
    assert dir(mezzotint) == sorted(mezzotint.__all__)


@pytest.mark.parametrize("name", sorted(mezzotint.__all__))
def test_each_of_them_is_there(name: str) -> None:
    value = getattr(mezzotint, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] in (name, "0.1.0")


def test_the_networks_are_offered_beside_their_configs() -> None:
    for name in ("UNet", "AutoencoderKL", "VQModel", "IdentityFirstStage"):
        assert callable(getattr(mezzotint.models, name))
        assert callable(getattr(mezzotint.models, f"{name}Config"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mezzotint' has no attribute 'diffuse'"):
        mezzotint.diffuse  # noqa: B018  # pyright: ignore


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("mezzotint") == mezzotint.__version__


@pytest.mark.parametrize("statement", ["import mezzotint", "import mezzotint.cli.main"])
def test_import_does_not_import_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_component_folder_loads_through_the_package(tmp_path: Path) -> None:
    script = (
        "import sys, mezzotint;"
        "c = mezzotint.models.AutoencoderKLConfig(block_out_channels=(32,), layers_per_block=1);"
        "m = mezzotint.models.AutoencoderKL(c);"
        "mezzotint.checkpoints.folder.save_component(m, __import__('pathlib').Path(sys.argv[1]));"
        "n = mezzotint.checkpoints.folder.load_component(sys.argv[1]);"
        "sys.exit(any((a != b).any() for a, b in zip(m.parameters(), n.parameters())))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "vae")]).returncode == 0
