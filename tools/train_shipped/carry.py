"""Programmes that travel between machines in small files.

A checkpoint holds weights, their average, and the optimizer's two moments, in float32: sixteen
bytes a weight. What travels is the average in float16, two bytes a weight, and what is finished.
From there the weights go on as that average, and the optimizer begins anew with its warm-up; the
step, and so the learning rate and the data's order, go on where they stood.
"""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mezzotint.config import to_yaml
from mezzotint.errors import CheckpointError, TrainingError
from mezzotint.storage.safetensors_file import narrowed
from mezzotint.training.checkpoint import newest_checkpoint, save_checkpoint
from tools.train_shipped.programme import (
    HALF,
    PLANNED,
    STAGES,
    Programme,
    is_finished,
    must_follow,
    pieces_of,
    record,
    steps_done,
)

__all__ = ["carry_in", "carry_out"]

_FORMAT = 1
_STATE, _AVERAGE = "state.json", "average.safetensors"
_RECIPE, _TOKENIZER = "recipe.yaml", "tokenizer.json"
_WEIGHTS = ("weights", "autoencoder")  # the group of a checkpoint of either kind of stage


def carry_out(programme: Programme, folder: Path) -> None:
    """Write what another machine needs to go on, anew.

    Args:
        programme: What was trained.
        folder: To be carried; what an earlier piece wrote into it is replaced.

    Raises:
        TrainingError: If a stage has a discriminator, which does not travel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in programme.stages:
        run, place = programme.work / stage, folder / stage
        shutil.rmtree(place, ignore_errors=True)
        if is_finished(run):
            shutil.copytree(run / HALF, place / HALF)
        elif steps_done(run):
            _write_average(run, place)
            shutil.copyfile(programme.plan / f"{stage}.yaml", place / PLANNED)
    record(folder, pieces_of(programme.work))


def _write_average(run: Path, place: Path) -> None:
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    tensors = checkpoint.tensors
    group = next(name for name in _WEIGHTS if name in tensors)
    averages = tensors.get("ema", {}).keys() - {"updates"}
    # one average of these weights, and nothing else that has a state: a discriminator, a codebook
    alone = tensors.keys() <= {group, "ema", "optimizer"}
    if not (alone and averages and averages <= tensors[group].keys()):
        raise TrainingError(
            f"{run}: only weights with one average travel, and no discriminator or codebook; go on"
            " where its state is"
        )
    average = {name: tensors["ema"].get(name, t) for name, t in tensors[group].items()}
    half = {
        name: narrowed(name, tensor, torch.float16) if tensor.is_floating_point() else tensor
        for name, tensor in average.items()
    }
    place.mkdir(parents=True)
    safetensors.torch.save_file(half, place / _AVERAGE)
    state = {
        "format_version": _FORMAT,
        "step": checkpoint.step,
        "group": group,
        "updates": int(tensors["ema"]["updates"]),
        "values": checkpoint.values,
    }
    (place / _STATE).write_text(json.dumps(state) + "\n")
    if (run / _TOKENIZER).is_file():
        shutil.copyfile(run / _TOKENIZER, place / _TOKENIZER)


def carry_in(programme: Programme, folder: Path) -> None:
    """Take of what `carry_out` wrote the stages in which the work folder is not as far itself.

    Args:
        programme: What is trained.
        folder: That was carried.

    Raises:
        CheckpointError: If nothing was carried, it is not whole, or a newer Mezzotint
            wrote it.
        ConfigError: If it was trained by another plan.
    """
    if not pieces_of(folder):
        raise CheckpointError(f"{folder}: nothing was carried here; expected history.json in it")
    for stage in programme.stages:
        run, place = programme.work / stage, folder / stage
        if is_finished(run) or not place.is_dir():
            continue
        must_follow(programme, stage, place / HALF if is_finished(place) else place)
        if is_finished(place):
            run.mkdir(parents=True, exist_ok=True)
            temporary = run / f".{HALF}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(place / HALF, temporary)
            temporary.replace(run / HALF)
        elif not _read_average(programme, stage, place):
            continue
        others = [piece for piece in pieces_of(programme.work) if piece.stage != stage]
        theirs = [piece for piece in pieces_of(folder) if piece.stage == stage]
        record(programme.work, sorted([*others, *theirs], key=lambda p: STAGES.index(p.stage)))


def _read_average(programme: Programme, stage: str, place: Path) -> bool:
    """Make a checkpoint without an optimizer of what was carried; returns whether it is further."""
    run = programme.work / stage
    try:
        state = json.loads((place / _STATE).read_text())
        if state["format_version"] > _FORMAT:
            raise CheckpointError(f"{place}: written by a newer Mezzotint; upgrade Mezzotint")
        if state["step"] <= steps_done(run):
            return False
        half = safetensors.torch.load_file(place / _AVERAGE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{place}: what was carried is not whole: {error}; carry it out again"
        ) from None
    weights = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    average: dict[str, Tensor] = {n: t for n, t in weights.items() if t.is_floating_point()}
    average["updates"] = torch.tensor(state["updates"])
    run.mkdir(parents=True, exist_ok=True)
    if (place / _TOKENIZER).is_file():
        shutil.copyfile(place / _TOKENIZER, run / _TOKENIZER)
    # with paths of this machine; the checkpoint knows its data and latents itself
    (run / _RECIPE).write_text(to_yaml(programme.recipe(stage)), encoding="utf-8")
    groups = {state["group"]: weights, "ema": average}
    save_checkpoint(run / "checkpoints", state["step"], groups, state["values"])
    return True
