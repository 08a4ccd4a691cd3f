"""Networks in OpenVINO's form: converted once, and kept under what they were made from."""

import contextlib
import copy
import hashlib
import json
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError, MissingExtraError
from mezzotint.models.weights import cache_directory
from mezzotint.nn.packed import is_packed

__all__ = ["convert", "import_openvino", "keep", "version"]

_NETWORK, _SUMS = "network.xml", "sums.json"
_FILES = (_NETWORK, "network.bin")
_ABANDONED_SECONDS = 3600.0


def import_openvino() -> Any:
    """Import OpenVINO, without the package that tells its makers who uses it.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    if find_spec("openvino") is None:
        raise MissingExtraError("openvino", "openvino", "the engine openvino")
    # which, as soon as it is imported, notes an identity and a count of uses in the home folder;
    # OpenVINO does without where it is not installed, which None stands for
    modules, telemetry = cast(dict[str, ModuleType | None], sys.modules), "openvino_telemetry"
    before = modules.get(telemetry)
    modules[telemetry] = None
    try:
        return import_module("openvino")
    finally:
        del modules[telemetry]
        if before is not None:
            modules[telemetry] = before


def version() -> str:
    """Return OpenVINO's version and build, ``2026.0.0-20965`` for example."""
    return "-".join(str(import_openvino().__version__).split("-")[:2])


def convert(network: nn.Module, example: Sequence[Tensor]) -> Any:
    """Convert a network; the sizes of its inputs stay open, but for channels that weights fix.

    Args:
        network: In evaluation mode. It is converted in float32, whatever its weights are in.
        example: Inputs to trace it with, of any size.

    Returns:
        An ``openvino.Model`` with an input for each of the example's, in their order.
    """
    import_openvino()
    # not openvino.convert_model, which reports every use to its makers
    decoders = import_module("openvino.frontend.pytorch.ts_decoder")
    frontend: Any = import_module("openvino.frontend").FrontEndManager()
    frontend = frontend.load_by_framework("pytorch")
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        # torch deprecates tracing in favour of its export, which fixes sizes that must stay open;
        # and it warns of checks of shapes inside torch, which a trace leaves out rightly
        warnings.simplefilter("ignore")
        wide = all(parameter.dtype is torch.float32 for parameter in network.parameters())
        if not wide or is_packed(network):  # whose copies are plain, while a trace knows no packed
            network = copy.deepcopy(network).float()
        traced = decoders.TorchScriptPythonDecoder(
            network,
            example_input=tuple(tensor.clone() for tensor in example),
            trace_kwargs={"check_trace": False},
        )
        return frontend.convert(frontend.load(traced))


def keep(made_from: Sequence[object], make: Callable[[], Any], *, half: bool) -> Path:
    """Return the file of a converted network, which is made if it is not there, or is damaged.

    It lies in `cache_directory`, which may be emptied at any time.

    Args:
        made_from: All that decides it beside OpenVINO's version, as plain values.
        make: Converts it.
        half: Keep its weights in float16, which is enough for a network that computes in bfloat16.

    Raises:
        CheckpointError: If it cannot be written.
    """
    digest = hashlib.sha256(json.dumps([*made_from, half], sort_keys=True).encode())
    folder = cache_directory() / "engines" / f"openvino-{version()}" / digest.hexdigest()[:32]
    if not _is_whole(folder):
        _write(folder, make(), half=half)
    return folder / _NETWORK


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / _SUMS).read_text(encoding="utf-8")) == _sums(folder)
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for name in _FILES:
        with (folder / name).open("rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _write(folder: Path, network: Any, *, half: bool) -> None:
    """Write it under another name first, so that what bears the right one is whole."""
    for other in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # another process is done with it
            if time.time() - other.stat().st_mtime > _ABANDONED_SECONDS:  # or was killed
                shutil.rmtree(other, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        import_openvino().save_model(network, str(temporary / _NETWORK), compress_to_fp16=half)
        (temporary / _SUMS).write_text(json.dumps(_sums(temporary)), encoding="utf-8")
        if _is_whole(folder):
            return  # another process has made it meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:
        if _is_whole(folder):
            return
        raise CheckpointError(
            f"{folder}: the converted network cannot be written: {error}; MEZZOTINT_CACHE can name"
            " another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
