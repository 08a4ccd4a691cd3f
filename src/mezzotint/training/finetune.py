"""Training a trained model further: all of it, a LoRA, or a new word; never its autoencoder."""

from functools import partial
from pathlib import Path

from torch import nn

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.data.texts import TextCache
from mezzotint.device import Execution
from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.batches import DataOrder
from mezzotint.training.caching import Encode
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.finetune_data import CaptionedData, Pairs, WithPrior
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.fitting import cached_texts, open_base
from mezzotint.training.inversion import add_token
from mezzotint.training.log import RunLog
from mezzotint.training.lora import add_lora
from mezzotint.training.orders import TrainingData, build_order
from mezzotint.training.prior import draw_prior
from mezzotint.training.ranks import Ranks
from mezzotint.training.trained import Trained, stored_like

__all__ = ["finetune_task"]


def finetune_task(
    recipe: FinetuneRecipe,
    data: TrainingData,
    folder: Path,
    execution: Execution,
    ranks: Ranks,
    log: RunLog,
    encode: Encode,
) -> DiffusionTask:
    """Load the base model and make a task of what is to be trained of it.

    Args:
        recipe: What to train.
        data: The images and what is said of them.
        folder: The run folder; pictures of prior preservation are kept in its ``prior``.
        execution: Device and precision.
        ranks: This process among the others of the run.
        log: Where guesses are told, and what became of the cache of texts.
        encode: Makes the cache of latents, or nothing.

    Raises:
        CheckpointError: If there is no such base model, or it is damaged.
        ConfigError: If the recipe does not fit it.
        DataError: If the data lack what it is told.
    """
    loaded, data = open_base(recipe, data, log)
    base, model = loaded.content_hash(), loaded.model
    side = recipe.data.resolution
    _check(recipe, model)
    if (side, side) != model.image_size:
        height, width = model.image_size
        log.event(f"the base model was trained at {width} x {height} pixels, this is {side}")
    order = build_order(data, recipe.batch_size, recipe.seed)
    if model.conditioner.wants == "caption":
        token = recipe.token.word if recipe.token is not None else ""
        data = CaptionedData(data, recipe.templates, token)
    pairs: Pairs | None = None
    if recipe.prior is not None:
        where = folder / "prior"
        paths = draw_prior(recipe.prior, recipe, loaded, base, where, execution, ranks, log)
        of_prior = DataOrder(len(paths), recipe.seed + 1)
        pairs = Pairs(order.order, len(data), of_prior, recipe.prior.weight)
        data = WithPrior(data, paths, recipe.prior.prompt, side)
    model.image_size = (side, side)
    first_stage = model.first_stage.to(execution.device)
    cache = encode(data, first_stage, model.normalization)
    frozen = "conditioner" not in recipe.components and recipe.method != "textual_inversion"
    texts: TextCache | None = None
    if frozen:
        texts = cached_texts(recipe, data, model.conditioner, folder, execution, ranks, log)
    choose = partial(_choose, recipe=recipe, defaults=loaded.defaults)
    task = partial(DiffusionTask, choose=choose, base=base, order=order, pairs=pairs)
    return task(recipe, model, data, cache, execution, ranks, tokens=texts)


def _check(recipe: FinetuneRecipe, model: LatentDiffusion) -> None:
    """Refuse what of fine-tuning alone does not fit the base model."""
    if recipe.prior is not None and model.conditioner.wants != "caption":
        raise ConfigError(
            f"prior: is for models that want a prompt; this one wants"
            f" {model.conditioner.description}"
        )
    if recipe.prior is not None and model.conditioner.wants_concat is not None:
        raise ConfigError("prior: is for models that are told nothing but a prompt")
    if "conditioner" in recipe.components and not any(True for _ in model.conditioner.parameters()):
        raise ConfigError("components: the base model's conditioner has no weights; train the unet")


def _choose(model: LatentDiffusion, recipe: FinetuneRecipe, defaults: SamplingDefaults) -> Trained:
    """Freeze a model, and let a part of it or beside it be trained."""
    parts = {"unet": model.unet, "conditioner": model.conditioner}
    # some weights of a file are read by nothing; they were frozen where they were made
    able = {id(p) for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    unread = _unread(main_conditioner(model.conditioner))
    if recipe.method == "lora":
        return add_lora(model, recipe, unread)
    if recipe.method == "textual_inversion":
        return add_token(model, recipe)
    trained = {name: parts[name] for name in recipe.components}
    rates = {"unet": recipe.optimizer.learning_rate}
    rates["conditioner"] = recipe.conditioner_learning_rate or rates["unet"]
    for part in trained.values():
        for parameter in part.parameters():
            parameter.requires_grad_(id(parameter) in able)
    for name in unread:
        main_conditioner(model.conditioner).get_submodule(name).requires_grad_(False)
    groups = tuple(
        (tuple(p for p in part.parameters() if p.requires_grad), rates[name])
        for name, part in trained.items()
    )
    return Trained(nn.ModuleDict(trained), groups, stored_like(recipe.base, defaults))


def _unread(main: Conditioner) -> tuple[str, ...]:
    """The layers of a text encoder behind the one whose tokens the model takes."""
    if not isinstance(main, ClipConditioner):
        return ()
    count, last = main.config.num_hidden_layers, main.config.output_layer
    return tuple(f"text_model.encoder.layers.{k}" for k in range(count - last + 1, count))
