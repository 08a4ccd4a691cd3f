"""The trained model that a recipe goes on from, and whether it, data and recipe fit together."""

from pathlib import Path

from mezzotint.checkpoints.loaded import LoadedModel
from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.bert import BertTextConditioner
from mezzotint.conditioning.classes import ClassConditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.layout import LayoutConditioner
from mezzotint.conditioning.spatial import (
    LowResConditioner,
    SemanticMapConditioner,
    main_conditioner,
    spatial_conditioner,
)
from mezzotint.data import ShardStream
from mezzotint.data.base import ImageData
from mezzotint.data.texts import TextCache, all_captions
from mezzotint.device import Execution
from mezzotint.errors import ConfigError, DataError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.base_model import load_base
from mezzotint.training.caching import cache_sentences, open_text_cache
from mezzotint.training.conditions import check_degradation
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.log import RunLog
from mezzotint.training.orders import TrainingData
from mezzotint.training.parts import check_buckets
from mezzotint.training.ranks import Ranks

__all__ = ["cached_texts", "open_base"]


def open_base(
    recipe: FinetuneRecipe | DistillRecipe, data: TrainingData, log: RunLog
) -> tuple[LoadedModel, ImageData]:
    """Read the model that a recipe goes on from, and tell what was guessed of it.

    Args:
        recipe: Says which, and what becomes of it.
        data: The images and what is said of them.
        log: Where guesses are told.

    Returns:
        The model, and the data, which have an index.

    Raises:
        CheckpointError: If there is no such model, or it is damaged.
        ConfigError: If the recipe does not fit it.
        DataError: If the data lack what it is told.
    """
    distilled = isinstance(recipe, DistillRecipe)
    if isinstance(data, ShardStream):
        what = "distillation" if distilled else "fine-tuning"
        raise ConfigError(f"data.stream: {what} wants data with an index; set it to false")
    loaded = load_base(recipe.teacher if distilled else recipe.base)
    for note in loaded.notes:
        log.event(note)
    _check_fits(recipe, loaded.model, data)
    return loaded, data


def cached_texts(
    recipe: FinetuneRecipe | DistillRecipe,
    data: ImageData,
    conditioner: Conditioner,
    folder: Path,
    execution: Execution,
    ranks: Ranks,
    log: RunLog,
) -> TextCache | None:
    """Encode all that the data can say, for a text encoder that stays as it is.

    Args:
        recipe: Says how many captions at most, and where they are kept.
        data: What is said.
        conditioner: With the text encoder, if there is one.
        folder: The run folder.
        execution: Device and precision.
        ranks: This process among the others of the run.
        log: Where it is told.
    """
    main, most = main_conditioner(conditioner), recipe.cached_captions
    if not most or not isinstance(main, ClipConditioner | BertTextConditioner):
        return None
    captions = all_captions(data, most)
    if captions is None:
        log.event(
            f"the data can say more than cached_captions {most:,}: each batch encodes its captions"
        )
        return None
    cache = open_text_cache(recipe, captions, main, folder, execution.device, ranks)
    for sentence in cache_sentences(cache):
        log.event(sentence)
    return cache


def _check_fits(
    recipe: FinetuneRecipe | DistillRecipe, model: LatentDiffusion, data: ImageData
) -> None:
    """Refuse what does not fit the model that a recipe goes on from."""
    factor = model.first_stage.factor
    if recipe.data.resolution % factor:
        raise ConfigError(
            f"data.resolution {recipe.data.resolution} is not divisible by the base model's"
            f" f = {factor}"
        )
    check_buckets(recipe.data, factor, len(model.unet.config.block_out_channels))
    if getattr(recipe.data, "buckets", None) and model.conditioner.wants_concat is not None:
        raise ConfigError(
            f"data.buckets: the base model wants {model.conditioner.description}, which takes"
            " squares; leave them out"
        )
    if model.unet.config.guidance_embed_dim is not None:
        distilled = isinstance(recipe, DistillRecipe)
        key, base = ("teacher", recipe.teacher) if distilled else ("base", recipe.base)
        raise ConfigError(
            f"{key}: {base.model} was distilled to be told its guidance, of which the data"
            " say nothing; use the model that it was distilled from"
        )
    steps = model.schedule_config.num_train_timesteps
    if recipe.sample_steps > steps:
        raise ConfigError(f"sample_steps {recipe.sample_steps} is more than the base's {steps}")
    if recipe.spatial_dropout and model.conditioner.wants_concat is None:
        raise ConfigError("spatial_dropout: is for a hybrid; use condition_dropout")
    _check_data(recipe, model.conditioner, data, factor)


def _check_data(
    recipe: FinetuneRecipe | DistillRecipe, conditioner: Conditioner, data: ImageData, factor: int
) -> None:
    """Refuse data that lack what the base model is told, or number it otherwise."""
    main, spatial = main_conditioner(conditioner), spatial_conditioner(conditioner)
    known = data.describe(0, None, with_map=conditioner.wants_concat == "map")
    for wanted, there, words in (
        ("label", known.label, "a class"),
        ("layout", known.boxes, "a layout"),
        ("map", known.map, "a semantic map"),
        ("regions", known.boxes if data.class_names else None, "boxes with words"),
    ):
        if wanted in (conditioner.wants, conditioner.wants_concat) and there is None:
            raise DataError(f"the base model is told {words} of each image; the data have none")
    names = data.class_names
    if isinstance(main, ClassConditioner | LayoutConditioner) and main.config.class_names:
        theirs = main.config.class_names
        if names is not None and names != theirs[: len(names)]:
            raise ConfigError(
                f"the data's classes are {', '.join(names)}, but the base model counts"
                f" {', '.join(theirs)}; number them alike, of a folder by data.classes"
            )
    needed = 0 if names is None else len(names) + 1  # 0 is what is of no class
    if isinstance(spatial, SemanticMapConditioner) and spatial.config.classes < needed:
        raise ConfigError(
            f"the base model's maps have {spatial.config.classes} classes, but the data's need"
            f" {needed}"
        )
    if isinstance(spatial, LowResConditioner):
        check_degradation(spatial.config, recipe.degradation, factor)
