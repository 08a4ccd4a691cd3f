"""Files of published weights, by path or by URL, held to their checksum."""

import hashlib
import os
import pickle
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mezzotint.errors import CheckpointError

__all__ = ["cache_directory", "is_url", "locate_weights", "read_state_dict"]


def is_url(location: str) -> bool:
    """Say whether a location is a URL and not a path."""
    return location.startswith(("https://", "http://"))


def cache_directory() -> Path:
    """Return the folder of downloads, made at the first: ``$MEZZOTINT_CACHE`` or XDG's."""
    if chosen := os.environ.get("MEZZOTINT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint"


def locate_weights(location: str, sha256: str | None) -> Path:
    """Return the path of a file of weights, downloading it once if it is a URL.

    Args:
        location: A path, or a URL whose file is kept in `cache_directory` under its checksum.
        sha256: Hexadecimal checksum; a URL must have one, a path may.

    Raises:
        CheckpointError: If there is no such file, it cannot be fetched, or its checksum differs.
    """
    if is_url(location):
        if sha256 is None:
            raise CheckpointError(f"{location}: a download needs its sha256")
        path = cache_directory() / "weights" / f"{sha256.lower()}-{location.rsplit('/', 1)[-1]}"
        if not path.is_file():
            _download(location, sha256, path)
        return path
    path = Path(location).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights")
    if sha256 is not None:
        with path.open("rb") as file:
            _check(location, hashlib.file_digest(file, "sha256").hexdigest(), sha256)
    return path


def _check(location: str, found: str, expected: str) -> None:
    if found != expected.lower():
        raise CheckpointError(f"{location}: its sha256 is {found}, expected {expected.lower()}")


def _download(url: str, sha256: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    # under a temporary name until the checksum is right: a file of this name is a whole one
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(descriptor, "wb") as file:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        _check(url, digest.hexdigest(), sha256)
        Path(temporary).replace(path)
    except (OSError, urllib.error.URLError) as error:
        raise CheckpointError(f"{url}: cannot be downloaded: {error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read named tensors from safetensors, or from a file of ``torch.save`` without running it.

    Raises:
        CheckpointError: If the file is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: damaged, or not a file of weights: {first_line}") from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds no named tensors")
    return {
        str(name): value
        for name, value in cast(dict[Any, Any], data).items()
        if isinstance(value, Tensor)
    }
