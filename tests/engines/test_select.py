"""Which engine is taken, and what is said where it is not installed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.device import Execution, quantizes_weights, select_device, select_precision
from mezzotint.engines.select import ENGINES, select_engine, select_quantization
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


@pytest.mark.skipif(not quantizes_weights(EXECUTION)[0], reason="torch has no oneDNN here")
def test_int8_is_for_processors_by_torch_with_weights_in_place() -> None:
    def chosen(name: str, **more: Any) -> str:
        told = {"execution": EXECUTION, "engine": "torch", "offload": "none"} | more
        return select_quantization(name, **told)

    cuda = Execution(device=torch.device("cuda"), precision=torch.bfloat16, reasons=("", ""))
    assert chosen("none", execution=cuda, engine="openvino", offload="sequential") == "none"
    assert chosen("int8") == "int8"
    for more, message in (
        ({"engine": "openvino"}, "is for the engine torch; 'openvino' keeps weights of its own"),
        ({"execution": cuda}, "weights stay as they are: packing is for processors, not cuda"),
        ({"offload": "sequential"}, "and offload 'sequential' exclude each other"),
    ):
        with pytest.raises(ConfigError, match=f"^quantization 'int8'.*{message}"):
            chosen("int8", **more)
    with pytest.raises(ConfigError, match="quantization 'int3': did you mean 'int8'?"):
        chosen("int3")
