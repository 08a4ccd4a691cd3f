"""Distilling a student of few steps from a trained model."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import CLASS, save_model
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.registry import INDEX, resolve_model
from mezzotint.data import ShardStream
from mezzotint.data.base import ImageData
from mezzotint.data.latents import LatentCache
from mezzotint.device import Execution
from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.unet import UNet
from mezzotint.rng import mix
from mezzotint.training.base_model import load_base
from mezzotint.training.consistency_loss import ConsistencyLoss
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.fitting import cached_texts, check_fits
from mezzotint.training.log import RunLog
from mezzotint.training.orders import TrainingData
from mezzotint.training.ranks import Ranks
from mezzotint.training.trained import Trained

__all__ = ["distill_task", "student_of"]

Encode = Callable[[ImageData, FirstStage, LatentNormalization], LatentCache | None]


def distill_task(
    recipe: DistillRecipe,
    data: TrainingData,
    folder: Path,
    execution: Execution,
    ranks: Ranks,
    log: RunLog,
    encode: Encode,
) -> DiffusionTask:
    """Load the teacher and make a task of teaching its student.

    Args:
        recipe: Says which, and how.
        data: The images and what is said of them.
        folder: The run folder.
        execution: Device and precision.
        ranks: This process among the others of the run.
        log: Where guesses are told, and what became of the cache of texts.
        encode: Makes the cache of latents, or nothing.

    Raises:
        CheckpointError: If there is no such teacher, or it is damaged.
        ConfigError: If the recipe does not fit it.
        DataError: If the data lack what it is told.
    """
    if isinstance(data, ShardStream):
        raise ConfigError("data.stream: distillation wants data with an index; set it to false")
    loaded = load_base(recipe.teacher)
    for note in loaded.notes:
        log.event(note)
    base, model = loaded.content_hash(), loaded.model
    check_fits(recipe, "teacher", recipe.teacher, model, data)
    model.image_size = (recipe.data.resolution, recipe.data.resolution)
    first_stage = model.first_stage.to(execution.device)
    cache = encode(data, first_stage, model.normalization)
    texts = cached_texts(recipe, data, model.conditioner, folder, execution, ranks, log)
    teacher = model.unet.to(execution.device, execution.weights)
    torch.manual_seed(mix(recipe.seed, 0x1217))
    guided = model.conditioner.wants is not None
    model.unet = student_of(teacher, recipe.guidance_embed_dim if guided else None)

    def choose(model: LatentDiffusion) -> Trained:
        model.conditioner.requires_grad_(False)
        group = tuple(model.unet.parameters()), recipe.optimizer.learning_rate
        return Trained(nn.ModuleDict({"unet": model.unet}), (group,), _export(recipe), "lcm")

    def objective(
        model: LatentDiffusion, _: nn.Module, average: ExponentialMovingAverage
    ) -> ConsistencyLoss:
        return ConsistencyLoss(model, average, teacher, recipe, execution)

    return DiffusionTask(
        recipe,
        model,
        data,
        cache,
        execution,
        ranks,
        choose=choose,
        objective=objective,
        base=base,
        tokens=texts,
    )


def student_of(teacher: UNet, guidance_embed_dim: int | None) -> UNet:
    """Return a UNet that predicts what the teacher does, whatever guidance it is told.

    Args:
        teacher: Stays as it is.
        guidance_embed_dim: Width of the embedding of the guidance, whose projection begins at
            zero; None leaves it out.
    """
    told = {"guidance_embed_dim": guidance_embed_dim}
    student = UNet(teacher.config.model_copy(update=told)).to(teacher.conv_in.weight)
    weights = copy.copy(teacher.state_dict())
    projection = student.time_embedding.cond_proj
    if projection is not None:
        nn.init.zeros_(projection.weight)
        weights["time_embedding.cond_proj.weight"] = projection.weight.detach()
    student.load_state_dict(weights)
    return student.requires_grad_(True)


def _export(recipe: DistillRecipe) -> Callable[[LatentDiffusion, Path], None]:
    """Write the student as its teacher lies on the disk."""
    index = resolve_model(Path(recipe.teacher.model).expanduser()) / INDEX
    own = index.is_file() and read_json(index).get("_class_name") == CLASS
    defaults = SamplingDefaults(
        sampler="lcm", guidance_scale=recipe.guidance_scale, steps=recipe.sample_steps
    )

    def export(model: LatentDiffusion, folder: Path) -> None:
        (save_model if own else save_pipeline)(model, folder, defaults=defaults)

    return export
