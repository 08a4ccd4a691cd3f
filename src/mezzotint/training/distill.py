"""Distilling a student of few steps from a trained model."""

import copy
from pathlib import Path

import torch
from torch import nn

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.device import Execution
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.unet import UNet
from mezzotint.rng import mix
from mezzotint.training.caching import Encode
from mezzotint.training.consistency_loss import ConsistencyLoss
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.fitting import cached_texts, open_base
from mezzotint.training.log import RunLog
from mezzotint.training.orders import TrainingData
from mezzotint.training.ranks import Ranks
from mezzotint.training.trained import Trained, stored_like

__all__ = ["distill_task", "student_of"]


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
    loaded, data = open_base(recipe, data, log)
    base, model = loaded.content_hash(), loaded.model
    model.image_size = (recipe.data.resolution, recipe.data.resolution)
    first_stage = model.first_stage.to(execution.device)
    cache = encode(data, first_stage, model.normalization)
    texts = cached_texts(recipe, data, model.conditioner, folder, execution, ranks, log)
    teacher = model.unet.to(execution.device, execution.weights)
    torch.manual_seed(mix(recipe.seed, 0x1217))
    guided = model.conditioner.wants is not None
    model.unet = student_of(teacher, recipe.guidance_embed_dim if guided else None)
    defaults = SamplingDefaults(
        sampler="lcm", guidance_scale=recipe.guidance_scale, steps=recipe.sample_steps
    )

    def choose(model: LatentDiffusion) -> Trained:
        model.conditioner.requires_grad_(False)
        group = tuple(model.unet.parameters()), recipe.optimizer.learning_rate
        export = stored_like(recipe.teacher, defaults)
        return Trained(nn.ModuleDict({"unet": model.unet}), (group,), export, "lcm")

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
