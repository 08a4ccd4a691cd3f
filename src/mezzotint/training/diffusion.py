"""Training epsilon_theta and tau_theta, or a part, in the latent space of a frozen first stage."""

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.conditioning.spatial import HybridConditioner, main_conditioner, spatial_conditioner
from mezzotint.data.latents import LatentCache
from mezzotint.device import Execution, autocast
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.pipeline import Pipeline
from mezzotint.latent_diffusion import LatentDiffusion, encode_moments, fingerprint
from mezzotint.models.autoencoder import AutoencoderKL
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.rng import SampleNoise, keyed_generator, mix
from mezzotint.training.batches import Batches
from mezzotint.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    refuse_changed,
    restore_or_begin,
)
from mezzotint.training.conditions import ConditionMaker, Told
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.ema import ConstantEMAConfig, ExponentialMovingAverage
from mezzotint.training.finetune_data import Pairs
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.health import Sample
from mezzotint.training.objective import DiffusionLoss, Objective
from mezzotint.training.optimizer import (
    apply_gradients,
    build_optimizer,
    learning_rate_factor,
    loss_scaler,
    use_channels_last,
)
from mezzotint.training.orders import (
    LeavingOut,
    TrainingData,
    build_order,
    load_stream_state,
    stream_state,
)
from mezzotint.training.parallel import Parallel, gather_into, laid_out, load_whole, shard
from mezzotint.training.pixel_task import to_pixels
from mezzotint.training.previews import Preview, make_previews, preview_sheet, request_fields
from mezzotint.training.ranks import ALONE, Ranks, positions_of
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.snapshots import save_if_due
from mezzotint.training.trained import Trained, jointly

__all__ = ["DiffusionTask", "ObjectiveMaker"]

_PREVIEWS = 16

ObjectiveMaker = Callable[[LatentDiffusion, nn.Module, ExponentialMovingAverage], Objective]
"""From a model on its device, what of it is trained and its average, to what a step minimises."""


@dataclass(frozen=True)
class _Batch:
    latents: list[Tensor]  # moments (C', h, w) if cached, else uint8 images (3, H, W)
    told: list[Told]
    drop: Tensor  # (B,) bool
    drop_spatial: Tensor  # (B,) bool
    drawn: Tensor  # (B, k) what the objective draws: times, whole ones but for a flow
    seeds: list[int]
    weights: Tensor | None  # (B,) float32


class DiffusionTask:
    """Trains the UNet and the conditioner jointly (paper, eq. 2 and 3), or what is chosen of them.

    Args:
        recipe: What to train.
        model: UNet and conditioner around a trained first stage.
        data: The images and what is said of them.
        cache: Their latents, or None to encode every batch anew.
        execution: Device and precision.
        ranks: This process among the others of the run.
        choose: Says what of the model, on its device, is trained; by default all.
        objective: Makes what a step minimises; by default the error of one prediction.
        base: What identifies the model that is trained further, if it is trained already.
        order: In which the data are seen; by default that which their configuration asks for.
        pairs: The order of samples, of which each has its like beside it, in place of that.
        tokens: Of all captions that the data can say, if the text encoder is not trained.
    """

    def __init__(
        self,
        recipe: DiffusionRecipe | FinetuneRecipe | DistillRecipe,
        model: LatentDiffusion,
        data: TrainingData,
        cache: LatentCache | None,
        execution: Execution,
        ranks: Ranks = ALONE,
        *,
        choose: Callable[[LatentDiffusion], Trained] | None = None,
        objective: ObjectiveMaker | None = None,
        base: str | None = None,
        order: LeavingOut | None = None,
        pairs: Pairs | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.data, self.cache, self.execution = recipe, data, cache, execution
        self.ranks, self.pairs = ranks, pairs
        self.batch_size = recipe.batch_size * (1 if pairs is None else 2)
        self.inputs = _inputs(model, data) | ({} if base is None else {"base": base})
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
        chosen = choose(self.model) if choose is not None else self._jointly()
        self.trained, self.write, self.sampler = chosen.module, chosen.export, chosen.sampler
        if tokens is not None:
            reader = main_conditioner(model.conditioner)
            assert not any(p.requires_grad for p in reader.parameters()), "its tokens would move"
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in chosen.groups]
        self.optimizer = build_optimizer(groups, recipe.optimizer)
        average = recipe.average
        # of nothing where none is wanted: the weights are then drawn from as they stand
        averaged = nn.Module() if average is None else self.trained
        self.ema = ExponentialMovingAverage(averaged, average or ConstantEMAConfig())
        if pairs is not None:
            order = LeavingOut(pairs, pairs.others)
        self.order = order or build_order(data, self.batch_size, recipe.seed)
        self.conditions = ConditionMaker(
            model,
            data,
            seed=recipe.seed,
            degradation=recipe.degradation,
            masks=recipe.masks,
            tokens=tokens,
        )
        self.objective = (objective or self._error)(self.model, self.trained, self.ema)
        self.loss = Parallel(self.objective, ranks, replicated=not self.sharded)
        self.scaler = loss_scaler(execution)
        self.batches = Batches(self._make_batch)
        self.steps = self.begun = 0
        self.rate = 1.0

    def _jointly(self) -> Trained:
        assert isinstance(self.recipe, DiffusionRecipe), "others say what they train"
        return jointly(self.model, self.recipe)

    def _error(
        self, model: LatentDiffusion, trained: nn.Module, _: ExponentialMovingAverage
    ) -> DiffusionLoss:
        assert not isinstance(self.recipe, DistillRecipe), "a student is taught otherwise"
        return DiffusionLoss(model, trained, self.recipe, self.execution)

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees."""
        return self.batch_size * self.recipe.accumulate

    def _make_batch(self, step: int) -> _Batch:
        recipe = self.recipe
        images: list[Tensor] = []
        told: list[Told] = []
        drop: list[bool] = []
        drop_spatial: list[bool] = []
        drawn: list[tuple[float, ...]] = []
        seeds: list[int] = []
        positions = positions_of(step, self.batch_size, recipe.accumulate, self.ranks)
        for position in positions:
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
            drawn.append(self.objective.draw(generator))
            seeds.append(mix(recipe.seed, 0x701, position))
            chance = torch.rand(1, generator=keyed_generator(recipe.seed, 0x5DA, position))
            drop_spatial.append(bool(chance < recipe.spatial_dropout))
        return _Batch(
            latents=images,
            told=told,
            drop=torch.tensor(drop),
            drop_spatial=torch.tensor(drop_spatial),
            drawn=torch.tensor(drawn),
            seeds=seeds,
            weights=None if self.pairs is None else self.pairs.weights(positions),
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
        factor = self.rate * learning_rate_factor(recipe.optimizer, step, progress, self.begun)
        conditioner = self.model.conditioner
        parts = (main_conditioner(conditioner), spatial_conditioner(conditioner))
        for network in (self.model.unet, *parts):  # dropout is for what is trained
            network.train(any(p.requires_grad for p in network.parameters()))
        batch = self.batches.get(step)
        values: dict[str, Tensor | float] = {}
        each = self.batch_size // self.ranks.world
        for number in range(recipe.accumulate):
            part = slice(number * each, (number + 1) * each)
            with self.loss.part(last=number == recipe.accumulate - 1):
                loss, told = self._loss(batch, part)
                self.scaler.scale(loss / recipe.accumulate).backward()
            for name, value in {"loss": loss.detach(), **told}.items():
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
        values |= apply_gradients(self.optimizer, recipe.optimizer, factor, self.scaler)
        self.scaler.update()
        if not values.get("skipped_steps"):
            self.ema.update()
        self.steps = step + 1
        rate = recipe.optimizer.learning_rate * factor
        return {**values, "learning_rate": rate}

    @torch.no_grad()
    def faulty_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step whose loss is no number with the weights now."""
        batch = self.batches.get(step)
        positions = positions_of(step, self.batch_size, self.recipe.accumulate, self.ranks)
        self.model.eval()
        faulty: list[Sample] = []
        for k, position in enumerate(positions):
            if not torch.isfinite(self._loss(batch, slice(k, k + 1))[0]):
                index = self.order.index(position)
                faulty.append((index, self.data.load(index).name))
        return faulty

    def gauges(self) -> dict[str, float]:
        """Return what is worth a look at intervals; all ranks must ask."""
        return {} if self.recipe.average is None else {"ema_distance": self.ema.distance()}

    def _loss(self, batch: _Batch, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        device, dtype = self.execution.device, self.execution.weights
        seeds = batch.seeds[part]
        z = self._latents(batch.latents[part], seeds)
        noise = SampleNoise(seeds).normal(z.shape[1:]).to(device, dtype)
        with torch.no_grad(), autocast(self.execution):
            inputs = self.conditions.inputs(batch.told[part], device, dtype)
        drop = [batch.drop[part]]
        if isinstance(self.model.conditioner, HybridConditioner):
            drop.append(batch.drop_spatial[part])
        weights = None if batch.weights is None else batch.weights[part].to(device)
        return self.loss(z, batch.drawn[part].to(device), noise, inputs, drop, weights)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return everything that a resumed run needs."""
        tensors = {
            "weights": dict(self.trained.state_dict()),
            "ema": self.ema.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer),
        }
        position = self.steps * self.images_per_step
        values = {"inputs": self.inputs, "scaler": self.scaler.state_dict(), "begun": self.begun}
        return tensors, values | stream_state(self.data, position, self.ranks)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave.

        Raises:
            TrainingError: If the first stage or the data are not those of the checkpoint.
        """
        words = {
            "first_stage": "the autoencoder, or the statistics of its latents,",
            "classes": "the classes of the data",
            "data": "the images, or what is said of them,",
            "base": "the base model",
        }
        refuse_changed(checkpoint, checkpoint.values["inputs"], self.inputs, words)
        self.steps = checkpoint.step
        load_stream_state(self.data, checkpoint.values)
        tensors = checkpoint.tensors
        load_whole(self.trained, tensors["weights"])
        averages = self.ema.state_dict()
        self.ema.load_state_dict({k: laid_out(t, averages[k]) for k, t in tensors["ema"].items()})
        self.begun = restore_or_begin(self.optimizer, checkpoint)
        if saved_scaler := checkpoint.values.get("scaler"):
            self.scaler.load_state_dict(saved_scaler)

    @contextlib.contextmanager
    def _averaged(self) -> Generator[LatentDiffusion]:
        """A model with the averaged weights; of sharded ones, whole in the first rank alone."""
        with self.ema.applied():
            if self.sharded:
                plain = self.plain
                parts = nn.ModuleDict({"unet": plain.unet, "conditioner": plain.conditioner})
                gather_into(parts if self.ranks.is_first else None, self.trained)
            yield self.plain
            if self.sharded and self.ranks.is_first:
                self.plain.cpu()  # drawing moved it

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
                sampler=self.sampler,
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
                self.write(model, folder)


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
