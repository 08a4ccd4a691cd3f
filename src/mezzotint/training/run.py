"""From a recipe to a run folder with a trained model in it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.config import apply_overrides, read_yaml
from mezzotint.data import ShardStream
from mezzotint.data.latents import LatentCache
from mezzotint.device import Execution, keep_freed_memory, select_device, select_precision
from mezzotint.errors import ConfigError, TrainingError, nearest
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import IdentityFirstStage
from mezzotint.models.unet import UNet
from mezzotint.rng import mix
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.autoencoder import AutoencoderTask
from mezzotint.training.caching import cache_sentences, open_latent_cache
from mezzotint.training.callbacks import Callback, SampleSheets
from mezzotint.training.checkpoint import list_checkpoints, newest_checkpoint
from mezzotint.training.claim import claim
from mezzotint.training.conditions import check_data, check_degradation
from mezzotint.training.decoder import DecoderTask
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.distill import distill_task
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.evaluations import Evaluations, Measurement
from mezzotint.training.finetune import finetune_task
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.first_stage import stored_first_stage
from mezzotint.training.health import Health
from mezzotint.training.initial import begin_from
from mezzotint.training.log import RunLog
from mezzotint.training.loop import Task, run_loop
from mezzotint.training.low_rank import train_changes
from mezzotint.training.orders import TrainingData, epoch_length, open_training_data
from mezzotint.training.parts import (
    check_buckets,
    check_factor,
    check_map,
    check_side,
    conditioner_of,
)
from mezzotint.training.ranks import Ranks, join_ranks, rank_device
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe, TrainedFirstStage
from mezzotint.training.symptoms import Facts, before_training

__all__ = ["execution_for", "load_recipe", "recipe_names", "train"]

_KINDS: dict[str, type[Recipe]] = {
    "autoencoder": AutoencoderRecipe,
    "diffusion": DiffusionRecipe,
    "finetune": FinetuneRecipe,
    "distill": DistillRecipe,
    "decoder": DecoderRecipe,
}


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("mezzotint").joinpath("recipes")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A path to a YAML file, or the name of a shipped recipe.
        overrides: Each ``dotted.key=value``.

    Raises:
        ConfigError: If there is no such recipe, or a key or value is wrong; all of them at once.
    """
    path = Path(recipe)
    if not path.is_file():
        names = recipe_names()
        if str(recipe) not in names:
            raise ConfigError(
                f"{recipe}: no such recipe file, and no shipped recipe of this name;"
                f" {nearest(str(recipe), names)}"
            )
        path = Path(str(resources.files("mezzotint").joinpath("recipes", f"{recipe}.yaml")))
    data = apply_overrides(read_yaml(path), overrides)
    kind = data.get("kind")
    if str(kind) not in _KINDS:
        given = "missing" if kind is None else f"{kind!r}"
        raise ConfigError(f"{path}: kind is {given}; {nearest(str(kind), _KINDS)}")
    return _KINDS[str(kind)].from_dict(data, str(recipe))


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
    stop_after: int | None = None,
    stop_minutes: float | None = None,
) -> Path:
    """Train what a recipe says, on one process or, started by torchrun, on several.

    Args:
        recipe: A recipe, a path to one, or the name of a shipped one.
        overrides: Each ``dotted.key=value``; only for a path or a name.
        output: The run folder; by default ``runs/<name of the recipe>``.
        resume: Go on from the newest whole checkpoint of the run folder.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.
        stop_after: Save a checkpoint and return after so many steps, to be gone on with.
        stop_minutes: The same after so many minutes of this call, whatever it did in them.

    Returns:
        The run folder; the trained model is in its ``model/``.

    Raises:
        ConfigError: If the recipe is wrong, or does not fit the run that is to be resumed.
        DataError: If the data cannot be read.
        TrainingError: If the run cannot start or go on.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    stop_at = None if stop_minutes is None else time.monotonic() + 60 * stop_minutes
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = type(recipe).from_dict(apply_overrides(recipe.to_dict(), overrides))
    folder = Path(output) if output is not None else Path("runs") / recipe.name
    execution = execution_for(recipe.precision, rank_device(select_device(device)))
    if execution.device.type == "cpu":
        keep_freed_memory()
    with join_ranks(execution.device) as ranks:
        setting = _Setting(execution, ranks, resume, console or Console(), stop_at)
        _train(recipe, folder, setting, stop_after)
    return folder


@dataclass(frozen=True)
class _Setting:
    """How recipes are carried out: the first stage's own, where it is trained first, likewise."""

    execution: Execution
    ranks: Ranks
    resume: bool
    console: Console
    stop_at: float | None


class _FirstStageStopped(Exception):
    """The time was up before the first stage was trained."""


def execution_for(precision: str, device: torch.device) -> Execution:
    """Return what a recipe of a precision runs on; see `select_precision`, and ``float64``."""
    if precision != "float64":
        return select_precision(precision, device)
    reasons = (*select_precision("float32", device).reasons[:1], "float64: asked for, to compare")
    return Execution(device=device, precision=torch.float64, reasons=reasons)


def _train(
    recipe: Recipe,
    folder: Path,
    setting: _Setting,
    stop_after: int | None = None,
) -> None:
    execution, ranks = setting.execution, setting.ranks
    _check_share(recipe, ranks)
    data = open_training_data(recipe.data, recipe.seed, recipe.batch_size)
    measurement = Measurement.of(recipe)
    if ranks.is_first:
        claim(folder, recipe, setting.resume)
    ranks.wait()
    log: RunLog | None = None
    try:
        log = RunLog(folder, recipe.name, setting.console, ranks, recipe.run.wandb)
        for reason in execution.reasons:
            log.event(reason)
        if ranks.several:
            shared = "shared by" if recipe.run.sharding else "on each of"
            log.event(f"{ranks.world} processes; the weights are {shared} them")
        if isinstance(data, ShardStream):
            log.event(f"a stream of {len(data.shards):,} shards")
            data.on_fault = log.skipped
        else:
            log.event(f"{len(data):,} images")
        if data.faults:
            log.event(f"{len(data.faults):,} broken images are skipped")
        for fault in data.faults:
            log.event(f"skipped {fault.name}: {fault.reason}")
        task = _task(recipe, data, folder, setting, log)
        checkpoint, damaged = newest_checkpoint(folder / "checkpoints", ranks)
        for sentence in damaged:
            log.event(f"passed by a damaged checkpoint: {sentence}")
        run_loop(
            task,
            folder=folder,
            budget=recipe.budget,
            run=recipe.run,
            log=log,
            health=_health(recipe, task, setting, log),
            callbacks=_callbacks(recipe, measurement, task, folder, setting, log),
            checkpoint=checkpoint,
            ranks=ranks,
            stop_after=stop_after,
            stop_at=setting.stop_at,
        )
    except _FirstStageStopped:
        assert log is not None
        log.event("stopped before the first stage was trained; go on with --resume")
    # safetensors raises an error of its own where a file cannot be written
    except (OSError, SafetensorError) as error:
        saved = list_checkpoints(folder / "checkpoints")
        kept = f"; {saved[-1]} is intact, free space and go on with --resume" if saved else ""
        reason = "the disk is full" if "o space left" in str(error) else str(error)
        raise TrainingError(f"{folder}: cannot be written: {reason}{kept}") from error
    finally:
        if log is not None:
            log.close()


def _task(recipe: Recipe, data: TrainingData, folder: Path, setting: _Setting, log: RunLog) -> Task:
    execution, ranks = setting.execution, setting.ranks
    match recipe:
        case AutoencoderRecipe():
            return AutoencoderTask(recipe, data, execution, ranks)
        case DiffusionRecipe():
            return _diffusion_task(recipe, data, folder, setting, log)
        case DecoderRecipe():
            first_stage, normalization = _first_stage(recipe, folder, setting, log)
            check_side(recipe, first_stage.factor)
            first_stage = first_stage.to(execution.device)
            normalization = normalization.to(execution.device)
            return DecoderTask(recipe, first_stage, normalization, data, execution, ranks)
        case FinetuneRecipe():
            encode = partial(_cached_latents, recipe, folder, setting, log)
            return finetune_task(recipe, data, folder, execution, ranks, log, encode)
        case DistillRecipe():
            encode = partial(_cached_latents, recipe, folder, setting, log)
            return distill_task(recipe, data, folder, execution, ranks, log, encode)


def _health(recipe: Recipe, task: Task, setting: _Setting, log: RunLog) -> Health:
    pixels = isinstance(task, DiffusionTask) and isinstance(
        task.model.first_stage, IdentityFirstStage
    )
    # a student is held against itself: its loss is least where it has learned nothing yet
    judged = not isinstance(recipe, DistillRecipe)
    facts = Facts.of(recipe, epoch_length(task.data), pixels=pixels) if judged else None
    return Health(
        recipe.run.health,
        log,
        setting.execution,
        images_per_step=task.images_per_step,
        facts=facts,
        before=tuple(before_training(recipe, task.data)),
        compiled=recipe.run.compile,
        ranks=setting.ranks,
    )


def _callbacks(
    recipe: Recipe,
    measurement: Measurement | None,
    task: Task,
    folder: Path,
    setting: _Setting,
    log: RunLog,
) -> list[Callback]:
    callbacks: list[Callback] = [SampleSheets(task, folder, recipe.run.sample_minutes)]
    if measurement is not None:
        device, ranks = setting.execution.device, setting.ranks
        evaluations = Evaluations(measurement, recipe, task, folder, log, device, ranks)
        callbacks.append(evaluations)
    return callbacks


def _check_share(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.batch_size % ranks.world:
        lower = recipe.batch_size // ranks.world * ranks.world
        near = f"{lower} or {lower + ranks.world}" if lower else str(ranks.world)
        raise ConfigError(
            f"batch_size {recipe.batch_size}, which is of all processes together, is not divisible"
            f" by {ranks.world} processes; the nearest is {near}"
        )


def _diffusion_task(
    recipe: DiffusionRecipe, data: TrainingData, folder: Path, setting: _Setting, log: RunLog
) -> DiffusionTask:
    execution, ranks = setting.execution, setting.ranks
    check_data(data, recipe.conditioning)
    first_stage, normalization = _first_stage(recipe, folder, setting, log)
    first_stage = first_stage.to(execution.device)
    check_factor(recipe, first_stage.factor)
    levels = len(recipe.unet.block_out_channels)
    check_buckets(recipe.data, first_stage.factor, levels)
    check_map(recipe, first_stage.factor)
    check_degradation(recipe.conditioning, recipe.degradation, first_stage.factor)
    conditioner = conditioner_of(recipe, data, folder, ranks)
    cache = _cached_latents(recipe, folder, setting, log, data, first_stage, normalization)
    torch.manual_seed(mix(recipe.seed, 0x1217))
    model = LatentDiffusion(
        first_stage,
        UNet(recipe.unet),
        conditioner,
        recipe.schedule,
        normalization,
        (recipe.data.resolution, recipe.data.resolution),
    )
    if recipe.initial is not None:
        base = begin_from(model, Path(recipe.initial).expanduser())
        log.event(f"begun from the weights of {recipe.initial}")
        if recipe.lora_rank is not None:
            choose = partial(train_changes, recipe=recipe)
            return DiffusionTask(
                recipe, model, data, cache, execution, ranks, choose=choose, base=base
            )
    return DiffusionTask(recipe, model, data, cache, execution, ranks)


def _cached_latents(
    recipe: DiffusionRecipe | FinetuneRecipe | DistillRecipe,
    folder: Path,
    setting: _Setting,
    log: RunLog,
    data: TrainingData,
    first_stage: FirstStage,
    normalization: LatentNormalization,
) -> LatentCache | None:
    """Encode the data, if the recipe says so; the ranks share the work."""
    if not recipe.latent_variants or isinstance(data, ShardStream):
        return None
    log.event(f"encoding {len(data):,} images, {recipe.latent_variants} views of each")
    device, ranks = setting.execution.device, setting.ranks
    cache = open_latent_cache(recipe, data, first_stage, normalization, folder, device, ranks)
    for sentence in cache_sentences(cache):
        log.event(sentence)
    return cache


def _first_stage(
    recipe: DiffusionRecipe | DecoderRecipe, folder: Path, setting: _Setting, log: RunLog
) -> tuple[FirstStage, LatentNormalization]:
    """Load the first stage with the statistics of its latents; train it first if need be."""
    found = stored_first_stage(recipe, folder)
    if found is not None:
        return found
    config = recipe.first_stage
    assert isinstance(config, TrainedFirstStage) and config.recipe is not None
    stage = folder / "first_stage"
    first = load_recipe(config.recipe)
    if not isinstance(first, AutoencoderRecipe):
        raise ConfigError(f"first_stage.recipe: {config.recipe} does not train an autoencoder")
    check_factor(recipe, first.model.factor)
    log.event(f"training the first stage by its own recipe, {config.recipe}")
    resume = setting.resume and (stage / "recipe.yaml").is_file()
    execution = execution_for(first.precision, setting.execution.device)
    _train(first, stage, replace(setting, resume=resume, execution=execution))
    setting.ranks.wait()  # for the first, which writes it
    if not (stage / "model" / "vae" / "config.json").is_file():
        raise _FirstStageStopped
    return load_first_stage(stage / "model" / "vae")
