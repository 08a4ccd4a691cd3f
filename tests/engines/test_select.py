"""Which engine is taken, and what is said where it is not installed."""

import sys
from pathlib import Path

import pytest

from mezzotint.device import select_device, select_precision
from mezzotint.engines.select import ENGINES, select_engine
from mezzotint.errors import ConfigError, MissingExtraError
from mezzotint.generation.pipeline import load

EXECUTION = select_precision("float32", select_device("cpu"))


def test_torch_is_taken_unless_another_is_asked_for() -> None:
    assert [select_engine(name, EXECUTION).name for name in ("auto", "torch")] == ["torch"] * 2
    assert list(ENGINES) == ["torch", "openvino"]
    with pytest.raises(ConfigError, match="engine 'opnvino': did you mean 'openvino'"):
        select_engine("opnvino", EXECUTION)


def test_what_is_not_installed_is_named_before_a_model_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr("mezzotint.engines.openvino_files.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mezzotint\[openvino\]'"):
        load(tmp_path / "none", engine="openvino")
