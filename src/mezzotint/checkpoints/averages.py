"""Averaged weights (EMA) of the UNet in single files, whose names have lost their dots.

``model_ema.diffusion_modelinput_blocks10in_layers0weight`` is the average of
``model.diffusion_model.input_blocks.1.0.in_layers.0.weight``. Where the UNet's own weights stand
beside it, theirs is looked up by ours; in a file of averages alone the dots are put back.
"""

import re

from mezzotint.checkpoints.compvis import Rule
from mezzotint.checkpoints.loaded import Weights
from mezzotint.checkpoints.recognition import EMA, Recognised
from mezzotint.checkpoints.sketch import PREFIXES
from mezzotint.errors import CheckpointError
from mezzotint.storage.tensors import TensorInfo, Tensors

__all__ = ["average_of", "takes_averages", "with_averages_alone"]

_FLAT = f"{EMA}diffusion_model"
# what stands between the dots of an original UNet's names
_WORDS = re.compile(
    r"in_layers|out_layers|emb_layers|skip_connection|transformer_blocks|attn[12]|norm[123]?"
    r"|proj_in|proj_out|to_out|to_[qkv]|qkv|ff|net|proj|conv|op|weight|bias|\d+"
)
_START = re.compile(
    # a block has a number, and each of its few layers one of one digit
    r"(?P<block>input_blocks|output_blocks)(?P<number>\d+)(?P<layer>\d)"
    r"|(?P<label>label_emb)(?P<places>\d*)|(?P<word>middle_block|time_embed|out(?=\d))"
)


def average_of(name: str) -> str:
    """Return what the average of a UNet's tensor is called in the file."""
    return EMA + name.removeprefix("model.").replace(".", "")


def with_averages_alone(tensors: Tensors) -> tuple[Tensors, bool]:
    """Let the averages of a file that has no weights of the UNet but those stand for them.

    Args:
        tensors: Of a single file.

    Returns:
        The tensors, averages by the names of what they are of; and whether they are all there is.
    """
    if any(name.startswith(PREFIXES["unet"]) for name in tensors):
        return tensors, False
    names = {name: _dotted(name.removeprefix(_FLAT)) for name in tensors if name.startswith(_FLAT)}
    found = {name: PREFIXES["unet"] + dotted for name, dotted in names.items() if dotted}
    if not found:
        return tensors, False
    return tensors.renamed(found), True


def _dotted(flat: str) -> str | None:
    """The name of a UNet's tensor that has lost its dots; None if it is none."""
    start = _START.match(flat)
    if start is None:
        return None
    parts = [start[0]]
    if start["block"]:
        parts = [start["block"], start["number"], start["layer"]]
    elif start["label"]:
        parts = [start["label"], *start["places"]]
    place = start.end()
    while place < len(flat):
        word = _WORDS.match(flat, place)
        if word is None:
            return None
        parts.append(word[0])
        place = word.end()
    return ".".join(parts)


def takes_averages(
    found: Recognised, tensors: Tensors, weights: Weights, *, alone: bool = False
) -> bool:
    """Return whether the averaged weights are to be looked up beside the UNet's own.

    Args:
        found: What the file is.
        tensors: All of it.
        weights: What the user says.
        alone: Whether there are none but averages, which already stand for the UNet's own.

    Raises:
        CheckpointError: If those are asked for that are not there, or not all, or do not fit.
    """
    path = found.paths[0]
    if alone and weights == "raw":
        raise CheckpointError(
            f"{path}: has averaged weights of the UNet alone ({EMA}…) and none of its own; say"
            " --weights ema, or auto"
        )
    if alone:
        return False
    if weights == "ema" and not found.has_ema:
        raise CheckpointError(
            f"{path}: has no averaged weights ({EMA}…); say --weights raw, or auto"
        )
    if weights == "raw" or not found.has_ema:
        return False
    rules = found.maps["unet"].rules
    averages = [average_of(PREFIXES["unet"] + rule.theirs) for rule in rules]
    unfit = [
        f"{name} is {_state(tensors.get(name))} where {tuple(rule.theirs_shape)} was expected"
        for rule, name in zip(rules, averages, strict=True)
        if not _fits(tensors.get(name), rule)
    ]
    if unfit and weights == "ema":
        raise CheckpointError(
            f"{path}: {len(unfit)} of {len(averages)} averaged weights are missing or do not fit,"
            f" the first: {unfit[0]}; say --weights raw"
        )
    return not unfit


def _fits(found: TensorInfo | None, rule: Rule) -> bool:
    return (
        found is not None
        and found.shape == tuple(rule.theirs_shape)
        and found.dtype.is_floating_point
    )


def _state(found: TensorInfo | None) -> str:
    return "missing" if found is None else f"{found.shape} of {found.dtype}"
