"""Files of textual inversion (Gal et al. 2022, arXiv 2208.01618): vectors that a word stands for.

Those of the web UIs are called by the name of the file, those of diffusers by a name inside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.checkpoints.loaded import file_sha256
from mezzotint.errors import CheckpointError
from mezzotint.storage.stored import StoredTensor
from mezzotint.storage.tensors import form_of, open_tensors
from mezzotint.storage.unpickle import ParameterDict, read_pickle

__all__ = ["Embedding", "check_width", "is_embedding", "load_embedding"]

_WEB_UI_PICKLE, _WEB_UI = "string_to_param", "emb_params"
_XL = frozenset({"clip_l", "clip_g"})
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """A word and what it stands for.

    Attributes:
        word: As it stands in prompts.
        path: The file.
        sha256: Of the file.
        vectors: ``(n, d)`` float32, in place of n tokens.
    """

    word: str
    path: Path
    sha256: str
    vectors: Tensor


def is_embedding(path: Path) -> bool:
    """Tell whether a file is one of textual inversion, from its headers alone.

    Raises:
        CheckpointError: If the file is damaged or hostile.
    """
    found, web_ui = _stored(path)
    # a LoRA of which one tensor is left is a damaged LoRA
    word = len(found) == 1 and not next(iter(found)).endswith((".weight", ".alpha"))
    return web_ui or word or set(found) >= _XL


def load_embedding(path: Path | str) -> Embedding:
    """Read an embedding.

    Args:
        path: A web UI's ``.pt`` or ``.safetensors``, or ``learned_embeds.safetensors`` or ``.bin``
            of diffusers.

    Raises:
        CheckpointError: If it is damaged, holds no embedding or several, or one that no model here
            has a use for.
    """
    path = Path(path)
    found, web_ui = _stored(path)
    if _XL & found.keys():
        raise CheckpointError(
            f"{path}: is for Stable Diffusion XL, whose second text encoder no model here has; it"
            f" has {', '.join(sorted(found))}"
        )
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: expected the vectors of one word, got {len(found)} tensors:"
            f" {', '.join(sorted(map(repr, found))[:4])}"
        )
    ((name, stored),) = found.items()
    if not isinstance(stored, StoredTensor):
        raise CheckpointError(f"{path}: {name!r}: expected a tensor")
    shape = stored.shape if len(stored.shape) != 1 else (1, *stored.shape)
    if len(shape) != 2 or 0 in shape or not stored.dtype.is_floating_point:
        raise CheckpointError(
            f"{path}: {name!r}: expected fractions of shape (n, d), got {stored.dtype} of shape"
            f" {stored.shape}"
        )
    vectors = stored.read().to(torch.float32).reshape(shape)
    if not vectors.isfinite().all():
        raise CheckpointError(f"{path}: {name!r}: holds values that are infinite or no numbers")
    word = path.name.removesuffix(path.suffix) if web_ui or name == "*" else name
    return Embedding(word=word, path=path, sha256=file_sha256(path), vectors=vectors)


def check_width(embedding: Embedding, width: int) -> None:
    """Refuse an embedding that was made for another text encoder.

    Args:
        embedding: What was read.
        width: Of the text encoder's tokens.

    Raises:
        CheckpointError: Saying which family it is for.
    """
    own = embedding.vectors.shape[1]
    if own != width:
        theirs, ours = (f", as {_FAMILIES[w]} has" if w in _FAMILIES else "" for w in (own, width))
        raise CheckpointError(
            f"{embedding.path}: its vectors have the width {own}{theirs}; this model's text encoder"
            f" takes {width}{ours}"
        )


def _stored(path: Path) -> tuple[Mapping[str, Any], bool]:
    """What may be vectors, by name, and whether the file is of a form that is for nothing else."""
    root = read_pickle(path) if form_of(path) == "pickle" else None
    if not isinstance(root, dict) or _WEB_UI_PICKLE not in root:
        stored = open_tensors(path).stored
        return stored, _WEB_UI in stored
    parameters = cast(dict[str, Any], root)[_WEB_UI_PICKLE]
    if isinstance(parameters, ParameterDict):  # of the first files
        parameters = parameters.parameters
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path}: {_WEB_UI_PICKLE}: expected vectors by name")
    return {str(name): value for name, value in cast(dict[Any, Any], parameters).items()}, True
