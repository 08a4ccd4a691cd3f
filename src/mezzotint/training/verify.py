"""Proof that a run can be stopped: N + M steps equal N, a stop, another process, and M."""

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mezzotint.errors import ConfigError, MezzotintError, TrainingError
from mezzotint.evaluation.shards import ranks
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe, TrainedFirstStage
from mezzotint.training.run import load_recipe, train

__all__ = ["Verified", "verify_resume"]

_SHOWN = 3  # names of tensors that differ


@dataclass(frozen=True)
class Verified:
    """What was the same.

    Attributes:
        before: Steps N before the stop.
        after: Steps M after it.
        tensors: How many tensors of the two last checkpoints are equal bit for bit.
        numbers: How many numbers they hold.
    """

    before: int
    after: int
    tensors: int
    numbers: int


def verify_resume(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    before: int = 5,
    after: int = 5,
    device: str = "auto",
    console: Console | None = None,
) -> Verified:
    """Train a recipe twice for some steps, once with a stop, each time in a process of its own.

    What the recipe only comes to much later is brought forward: a discriminator begins to learn
    two steps before the stop and to speak one step before it. A first stage that would be trained
    first is trained for two steps, and of prior preservation two pictures are drawn, for their
    quality does not matter here.

    Args:
        recipe: A path to a recipe, or the name of a shipped one.
        overrides: Each ``dotted.key=value``.
        before: Steps before the stop.
        after: Steps after it.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.

    Raises:
        ConfigError: If the recipe is wrong, or several processes were started.
        TrainingError: If anything differs; it names what.
    """
    if ranks()[1] > 1:
        raise ConfigError("--verify-resume is for one process: start it without torchrun")
    console = console or Console()
    with tempfile.TemporaryDirectory(prefix="mezzotint-verify-") as temporary:
        folder = Path(temporary)
        shortened = _shorten(load_recipe(recipe, overrides), before, after, folder, device, console)
        whole, parts = folder / "whole", folder / "parts"
        console.print(f"{before + after} steps in one go", highlight=False)
        _in_new_process(shortened, whole, device)
        console.print(f"{before} steps, a stop, and {after} steps", highlight=False)
        _in_new_process(shortened, parts, device, stop_after=before)
        if [p.name for p in list_checkpoints(parts / "checkpoints")] != [f"step-{before}"]:
            raise TrainingError(f"the run did not stop after {before} steps")
        _in_new_process(shortened, parts, device, resume=True)
        one, other = (_last(run) for run in (whole, parts))
        _compare(one, other)
        _compare_files(whole / "model", parts / "model")
    tensors = [t for named in one.tensors.values() for t in named.values()]
    return Verified(before, after, len(tensors), sum(t.numel() for t in tensors))


def _shorten(
    recipe: Recipe, before: int, after: int, folder: Path, device: str, console: Console
) -> Recipe:
    """The recipe for so many steps, with all that it does in them."""
    changed: dict[str, Any] = recipe.to_dict()
    changed["budget"] = {"max_steps": before + after}
    changed["run"] |= {"checkpoint_minutes": 1e6, "sample_minutes": 1e6}
    if isinstance(recipe, DiffusionRecipe):
        changed["sample_steps"] = 1
    if isinstance(recipe, DiffusionRecipe | DecoderRecipe):
        stage = recipe.first_stage
        if isinstance(stage, TrainedFirstStage) and stage.recipe is not None:
            first = load_recipe(stage.recipe, ["budget.max_steps=2"])
            train(first, output=folder / "first_stage", device=device, console=console)
            changed["first_stage"] = {"kind": "trained", "path": str(folder / "first_stage")}
    if isinstance(recipe, FinetuneRecipe) and recipe.prior is not None:
        changed["prior"] |= {"count": min(recipe.prior.count, 2), "steps": 2}
    judged = isinstance(recipe, AutoencoderRecipe | DecoderRecipe)
    if judged and recipe.loss.adversarial is not None:
        early = {"start_step": max(0, before - 1), "pretrain_steps": 1}
        changed["loss"]["adversarial"] |= early
    return type(recipe).from_dict(changed, recipe.name)


def _in_new_process(recipe: Recipe, run: Path, device: str, **options: Any) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        told = pool.submit(_train, recipe, run, device, torch.get_num_threads(), options).result()
    if told is not None:
        raise TrainingError(told)


def _train(
    recipe: Recipe, run: Path, device: str, threads: int, options: dict[str, Any]
) -> str | None:
    """What the new process does; returns what went wrong."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # the latents are the same for both: they go by content
    shared = run.parent / "latents"
    shared.mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    if not (run / "latents").exists():
        (run / "latents").symlink_to(shared, target_is_directory=True)
    try:
        train(recipe, output=run, device=device, console=Console(quiet=True), **options)
    except MezzotintError as error:
        return str(error)
    return None


def _last(run: Path) -> Checkpoint:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def _compare(one: Checkpoint, other: Checkpoint) -> None:
    different: list[str] = [] if one.step == other.step else ["step"]
    mine, theirs = (
        {f"{group}.{name}": t for group, named in c.tensors.items() for name, t in named.items()}
        for c in (one, other)
    )
    different += sorted(mine.keys() ^ theirs.keys())
    different += [n for n, t in mine.items() if n in theirs and not torch.equal(t, theirs[n])]
    # rows of the log end where a run is stopped, and so do those that its health was seen by
    for name in sorted((one.values.keys() | other.values.keys()) - {"seconds", "seen"}):
        if one.values.get(name) != other.values.get(name):
            different.append(name)
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise TrainingError(
            f"a stopped and resumed run is not the same as one that ran through:"
            f" {', '.join(different[:_SHOWN])}{more} differ"
        )


def _compare_files(one: Path, other: Path) -> None:
    for path in sorted(p for p in one.rglob("*") if p.is_file()):
        beside = other / path.relative_to(one)
        if not beside.is_file() or path.read_bytes() != beside.read_bytes():
            raise TrainingError(f"the exported models differ in {path.relative_to(one)}")
