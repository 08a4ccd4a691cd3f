"""Training epsilon_theta and tau_theta in the latent space of a frozen first stage."""

import contextlib
import copy
from collections.abc import Generator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.spatial import HybridConditioner
from mezzotint.data.latents import LatentCache
from mezzotint.device import Execution, autocast
from mezzotint.diffusion.loss import diffusion_loss
from mezzotint.diffusion.times import draw_time
from mezzotint.errors import TrainingError
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.latent_diffusion import LatentDiffusion, encode_moments, fingerprint
from mezzotint.models.autoencoder import AutoencoderKL
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.autoencoder import to_pixels
from mezzotint.training.batches import Batches
from mezzotint.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from mezzotint.training.conditions import ConditionMaker, Told
from mezzotint.training.ema import ExponentialMovingAverage
from mezzotint.training.gauges import latent_gauges, noise_gauges, worse_gauge
from mezzotint.training.health import Sample
from mezzotint.training.optimizer import (
    apply_gradients,
    build_optimizer,
    learning_rate_factor,
    loss_scaler,
    use_channels_last,
)
from mezzotint.training.orders import (
    TrainingData,
    build_order,
    load_stream_state,
    stream_state,
)
from mezzotint.training.parallel import Parallel, laid_out, load_whole, shard, whole_tensors
from mezzotint.training.previews import Preview, make_previews, preview_sheet, request_fields
from mezzotint.training.ranks import ALONE, Ranks, positions_of
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.snapshots import save_if_due

__all__ = ["DiffusionTask"]

_PREVIEWS = 16


@dataclass(frozen=True)
class _Batch:
    latents: list[Tensor]  # moments (C', h, w) if cached, else uint8 images (3, H, W)
    told: list[Told]
    drop: Tensor  # (B,) bool
    drop_spatial: Tensor  # (B,) bool
    t: Tensor  # (B,) int64; float32 for a flow
    seeds: list[int]


class _Loss(nn.Module):
    """What a step minimises (paper, eq. 2 and 3), as one module: torch's engines wrap modules."""

    def __init__(
        self, model: LatentDiffusion, recipe: DiffusionRecipe, execution: Execution
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.execution = model, recipe, execution

    def forward(
        self, z: Tensor, t: Tensor, noise: Tensor, inputs: ConditionInputs, drop: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch of latents ``(B, C, h, w)``, and gauges of it."""
        model, recipe = self.model, self.recipe
        with autocast(self.execution):
            cond = model.conditioner(inputs, *drop)
            losses = diffusion_loss(
                model.predict,
                model.schedule,
                z,
                t,
                noise,
                cond,
                weighting=recipe.weighting,
                deviation=recipe.deviation,
            )
        with torch.no_grad():
            silent = diffusion_loss(
                _silent,
                model.schedule,
                z,
                t,
                noise,
                cond,
                weighting=recipe.weighting,
                deviation=recipe.deviation,
            )
            told = noise_gauges(losses, t / model.schedule.num_train_timesteps)
            told |= latent_gauges(z)
            told["loss_of_zero"] = silent.mean()
            told["worse_than_nothing"] = worse_gauge(losses.mean(), told["loss_of_zero"])
        return losses.mean(), told


def _silent(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """A network that predicts nothing: its loss is what there is to explain."""
    return torch.zeros_like(x)


class DiffusionTask:
    """Trains the UNet and the conditioner jointly (paper, eq. 2 and 3).

    Args:
        recipe: What to train.
        model: Untrained UNet and conditioner around a trained first stage.
        data: The images and what is said of them.
        cache: Their latents, or None to encode every batch anew.
        execution: Device and precision.
        ranks: This process among the others of the run.
    """

    def __init__(
        self,
        recipe: DiffusionRecipe,
        model: LatentDiffusion,
        data: TrainingData,
        cache: LatentCache | None,
        execution: Execution,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.data, self.cache, self.execution = recipe, data, cache, execution
        self.ranks = ranks
        self.inputs = _inputs(model, data)
        self.sharded = recipe.run.sharding and ranks.several
        # what is drawn and written: sharded weights are gathered into it, by the first rank alone
        self.plain = copy.deepcopy(model) if self.sharded and ranks.is_first else model
        self.model = model.to(execution.device, execution.weights)
        if recipe.channels_last:
            use_channels_last(self.model.unet)
        if recipe.run.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        if recipe.run.compile:
            self.model.unet.compile()
        if self.sharded:
            shard(self.model)
        self.trained = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
        rate = recipe.optimizer.learning_rate
        groups: list[dict[str, Any]] = [{"params": list(model.unet.parameters()), "lr": rate}]
        if conditioner := list(model.conditioner.parameters()):
            own = recipe.conditioner_learning_rate or rate
            groups.append({"params": conditioner, "lr": own})
        self.optimizer = build_optimizer(groups, recipe.optimizer)
        self.ema = ExponentialMovingAverage(self.trained, recipe.average)
        self.order = build_order(data, recipe.batch_size, recipe.seed)
        self.conditions = ConditionMaker(
            model,
            data,
            seed=recipe.seed,
            degradation=recipe.degradation,
            masks=recipe.masks,
        )
        self.loss = Parallel(
            _Loss(self.model, recipe, execution), ranks, replicated=not self.sharded
        )
        self.scaler = loss_scaler(execution)
        self.batches = Batches(self._make_batch)
        self.steps = 0
        self.rate = 1.0

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees."""
        return self.recipe.batch_size * self.recipe.accumulate

    def _make_batch(self, step: int) -> _Batch:
        recipe, model = self.recipe, self.model
        images: list[Tensor] = []
        told: list[Told] = []
        drop: list[bool] = []
        drop_spatial: list[bool] = []
        times: list[float] = []
        seeds: list[int] = []
        for position in positions_of(step, recipe.batch_size, recipe.accumulate, self.ranks):
            index = self.order.index(position)
            generator = keyed_generator(recipe.seed, 0xDA7A, position)
            if self.cache is None:
                example = self.data.load(index, generator)
                images.append(example.image)
                told.append(self.conditions.of_example(example, generator))
            else:
                view = int(torch.randint(self.cache.views, (1,), generator=generator))
                images.append(self.cache.moments(index, view))
                told.append(self.conditions.of_view(index, view, generator))
            drop.append(bool(torch.rand(1, generator=generator) < recipe.condition_dropout))
            times.append(draw_time(recipe.times, model.schedule, generator))
            seeds.append(mix(recipe.seed, 0x701, position))
            chance = torch.rand(1, generator=keyed_generator(recipe.seed, 0x5DA, position))
            drop_spatial.append(bool(chance < recipe.spatial_dropout))
        return _Batch(
            latents=images,
            told=told,
            drop=torch.tensor(drop),
            drop_spatial=torch.tensor(drop_spatial),
            t=torch.tensor(times),
            seeds=seeds,
        )

    def _latents(self, images: list[Tensor], seeds: list[int]) -> Tensor:
        """Normalised latents: posterior samples for KL, the latent itself for the others."""
        first_stage, execution = self.model.first_stage, self.execution
        batch = torch.stack(images)  # one part is of one size, whatever that of the next
        if self.cache is None:
            pixels = to_pixels(batch, execution.device).to(execution.weights)
            with torch.no_grad():
                batch = encode_moments(first_stage, pixels)
        batch = batch.to(execution.device, execution.weights)
        if isinstance(first_stage, AutoencoderKL):
            batch = DiagonalGaussian(batch).sample(SampleNoise([mix(s, 1) for s in seeds]))
        return self.model.normalization.normalize(batch)

    def train_step(self, step: int, progress: float) -> Mapping[str, Tensor | float]:
        """Do one optimizer step of UNet and conditioner together."""
        recipe = self.recipe
        torch.manual_seed(self.ranks.own_seed(mix(recipe.seed, step)))  # dropout
        factor = self.rate * learning_rate_factor(recipe.optimizer, step, progress)
        self.model.train()
        batch = self.batches.get(step)
        values: dict[str, Tensor | float] = {}
        each = recipe.batch_size // self.ranks.world
        for number in range(recipe.accumulate):
            part = slice(number * each, (number + 1) * each)
            with self.loss.part(last=number == recipe.accumulate - 1):
                loss, told = self._loss(batch, part)
                self.scaler.scale(loss / recipe.accumulate).backward()
            for name, value in {"loss": loss.detach(), **told}.items():
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
        norm = apply_gradients(self.optimizer, recipe.optimizer, factor, self.scaler)
        self.scaler.update()
        self.ema.update()
        self.steps = step + 1
        rate = recipe.optimizer.learning_rate * factor
        return {**values, "gradient_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def faulty_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step whose loss is no number with the weights now."""
        recipe, batch = self.recipe, self.batches.get(step)
        positions = positions_of(step, recipe.batch_size, recipe.accumulate, self.ranks)
        self.model.eval()
        faulty: list[Sample] = []
        for k, position in enumerate(positions):
            if not torch.isfinite(self._loss(batch, slice(k, k + 1))[0]):
                index = self.order.index(position)
                faulty.append((index, self.data.load(index).name))
        return faulty

    def exclude(self, samples: Set[int]) -> None:
        """Leave out samples, by their indices, from now on."""
        if samples != self.order.excluded:
            self.batches.forget()
            self.order.excluded = frozenset(samples)

    def gauges(self) -> dict[str, float]:
        """Return what is worth a look at intervals; all ranks must ask."""
        return {"ema_distance": self.ema.distance()}

    def _loss(self, batch: _Batch, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        device, dtype = self.execution.device, self.execution.weights
        seeds = batch.seeds[part]
        z = self._latents(batch.latents[part], seeds)
        noise = SampleNoise(seeds).normal(z.shape[1:]).to(device, dtype)
        inputs = self.conditions.inputs(batch.told[part], device, dtype)
        drop = [batch.drop[part]]
        if isinstance(self.model.conditioner, HybridConditioner):
            drop.append(batch.drop_spatial[part])
        return self.loss(z, batch.t[part].to(device), noise, inputs, drop)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors = {
            "weights": dict(self.trained.state_dict()),
            "ema": self.ema.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer),
        }
        position = self.steps * self.images_per_step
        values = {"inputs": self.inputs, "scaler": self.scaler.state_dict()}
        return tensors, values | stream_state(self.data, position, self.ranks)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the first stage or the data are not those of the checkpoint.
        """
        saved = checkpoint.values["inputs"]
        for name, words in (
            ("first_stage", "the autoencoder, or the statistics of its latents,"),
            ("classes", "the classes of the data"),
            ("data", "the images, or what is said of them,"),
        ):
            if saved[name] != self.inputs[name]:
                raise TrainingError(
                    f"{checkpoint.path}: {words} changed since this checkpoint was saved; put them"
                    " back as they were, or start anew with another --output"
                )
        self.steps = checkpoint.step
        load_stream_state(self.data, checkpoint.values)
        tensors = checkpoint.tensors
        load_whole(self.trained, tensors["weights"])
        averages = self.ema.state_dict()
        self.ema.load_state_dict({k: laid_out(t, averages[k]) for k, t in tensors["ema"].items()})
        restore_optimizer(self.optimizer, tensors["optimizer"])
        if saved_scaler := checkpoint.values.get("scaler"):
            self.scaler.load_state_dict(saved_scaler)

    @contextlib.contextmanager
    def _averaged(self) -> Generator[LatentDiffusion]:
        """A model with the averaged weights; of sharded ones, whole in the first rank alone."""
        with self.ema.applied():
            if self.sharded:
                whole = whole_tensors(self.trained)
                if self.ranks.is_first:
                    plain = self.plain
                    parts = nn.ModuleDict({"unet": plain.unet, "conditioner": plain.conditioner})
                    parts.load_state_dict(whole)
            yield self.plain

    def draw_samples(self, path: Path) -> None:
        """Draw what some of the examples ask for with the averaged weights."""
        with self._averaged() as model:
            if self.ranks.is_first:
                self._draw(model, path)

    @cached_property
    def _previews(self) -> list[Preview]:
        """Examples, kept: a stream is not to go back to its beginning for them."""
        return make_previews(self.conditions, _PREVIEWS, self.recipe.seed)

    def _draw(self, model: LatentDiffusion, path: Path) -> None:
        recipe, execution = self.recipe, self.execution
        if execution.weights is torch.float64:
            model = copy.deepcopy(model).float()
            execution = replace(execution, precision=torch.float32)
        pipeline = Pipeline(model, execution, recipe.name)
        pipeline.model_hash = "training"  # the weights move: a hash of them would mean nothing
        previews = self._previews
        pictures = InputPictures()
        requests = [
            pipeline.request(
                **request_fields(preview.told, pictures),
                seed=k,
                steps=recipe.sample_steps,
                spacing="trailing",
                guidance_scale=recipe.guidance_scale,
            )
            for k, preview in enumerate(previews)
        ]
        drawn = generate_each(pipeline, requests, pictures=pictures)
        sheet = preview_sheet(previews, [item.image for item in drawn])
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)

    def save_snapshot(self, folder: Path, *, last: bool = False) -> None:
        """Store the averages if the recipe says so at this step."""
        save_if_due(self.ema, folder, last=last)

    def export(self, folder: Path) -> None:
        """Write the model with the averaged weights."""
        self.batches.close()
        with self._averaged() as model:
            if self.ranks.is_first:
                model.eval()
                save_model(model, folder)


def _inputs(model: LatentDiffusion, data: TrainingData) -> dict[str, Any]:
    """What the weights are trained on: with anything else they are worth nothing."""
    tensors = [
        *model.first_stage.state_dict().items(),
        *model.normalization.state_dict().items(),
    ]
    return {
        "first_stage": fingerprint(tensors),
        "data": data.fingerprint,
        "classes": list(data.class_names or ()),
    }
