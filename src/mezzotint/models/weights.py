"""Files of published weights, by path or by URL, held to their checksum."""

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mezzotint.errors import CheckpointError

__all__ = ["cache_directory", "is_url", "load_tensors", "locate_weights"]


_CHECKSUM = re.compile("[0-9a-fA-F]{8,64}")


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
        sha256: Hexadecimal checksum, or its first 8 digits and more, as names of published files
            carry them; a URL must have one, a path may.

    Raises:
        CheckpointError: If there is no such file, it cannot be fetched, or its checksum differs or
            is none.
    """
    if sha256 is not None and not _CHECKSUM.fullmatch(sha256):
        raise CheckpointError(
            f"{location}: {sha256!r} is not a sha256: give its 64 hexadecimal digits, or the first"
            " 8 and more"
        )
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
    if not found.startswith(expected.lower()):
        more = "" if len(expected) == len(found) else "…"
        raise CheckpointError(
            f"{location}: its sha256 is {found}, expected {expected.lower()}{more}"
        )


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


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    unused: tuple[str, ...] = (),
) -> None:
    """Load tensors into a module, strictly.

    Args:
        module: What they are for.
        tensors: By name. Counts of batches, which some files of one network have and others lack,
            are ignored.
        source: What an error calls the origin.
        unused: Beginnings of the names of tensors that are not for the module; "" is all others.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of the wrong shape.
    """
    counts = "num_batches_tracked"
    wanted = {n: v for n, v in module.state_dict().items() if not n.endswith(counts)}
    given = {n for n in tensors if not n.endswith(counts)}
    missing = sorted(wanted.keys() - given)
    if missing:
        raise CheckpointError(
            f"{source}: not the weights of {type(module).__name__}: {len(missing)} tensors are"
            f" missing, the first is {missing[0]!r}"
        )
    foreign = sorted(n for n in given - wanted.keys() if not n.startswith(unused))
    if foreign:
        raise CheckpointError(
            f"{source}: not the weights of {type(module).__name__}: {len(foreign)} tensors are"
            f" unexpected, the first is {foreign[0]!r}"
        )
    for name, expected in wanted.items():
        if tensors[name].shape != expected.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)},"
                f" expected {tuple(expected.shape)}"
            )
    module.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
