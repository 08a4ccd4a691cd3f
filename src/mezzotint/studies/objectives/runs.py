"""Training and measuring the models of the study of objectives, one after the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mezzotint.checkpoints.model import load_model
from mezzotint.config import read_yaml
from mezzotint.device import select_device, select_precision
from mezzotint.errors import ConfigError, nearest
from mezzotint.evaluation.distributions import kid
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.judges import Classifier
from mezzotint.evaluation.metrics import image_features, retrieval
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import to_pixels
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.sampling import to_images
from mezzotint.models.features import load_features
from mezzotint.studies.conditions.judging import judge_singles, scenes_of
from mezzotint.studies.machine import this_machine
from mezzotint.studies.objectives.results import (
    PICTURE,
    ObjectiveResult,
    Point,
    read_results,
    require_same,
    result_path,
    write_result,
)
from mezzotint.studies.trainings import train_once
from mezzotint.training.checkpoint import list_checkpoints, read_checkpoint
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = ["OBJECTIVES", "RECIPE", "STEPS", "run_objectives_study"]

RECIPE, STEPS, SAMPLER = "emoji-class", (4, 10, 25), "euler"
SEED, BATCH = 1000, 32
_SHOWN = 12

_VELOCITY = "schedule={prediction_type: v_prediction, zero_terminal_snr: true}"
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "epsilon": ("schedule={prediction_type: epsilon}",),
    "v": (_VELOCITY,),
    "v-min-snr": (_VELOCITY, "weighting=min_snr"),
    "flow-uniform": ("schedule={kind: flow}",),
    "flow-logit-normal": ("schedule={kind: flow}", "times={kind: logit_normal}"),
}
"""Overrides of the recipe, by the name of the objective."""


def run_objectives_study(
    output: Path,
    work: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    steps: int = 3000,
    minutes: float | None = None,
    pictures: int = 512,
    autoencoder: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    console: Console | None = None,
) -> None:
    """Do what is still missing of the study; each result is written when it is there.

    Args:
        output: Folder of the results: ``<objective>-seed<n>.json`` and ``.webp``.
        work: Folder of the training runs; a run that was stopped goes on.
        only: Objectives to do now; all by default.
        seeds: A model of each objective is trained for each.
        steps: Of each training.
        minutes: Of each training, in place of steps: equal time and not equal steps.
        pictures: Held-out examples whose classes are asked of each model.
        autoencoder: A run of ``emoji-autoencoder``; by default one is trained in ``work``.
        overrides: Further ones of every model's recipe, each ``dotted.key=value``.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.

    Raises:
        ConfigError: If there is no such objective, or results or runs of another study are there.
        MissingExtraError: If what trains is not installed.
    """
    for name in only or ():
        if name not in OBJECTIVES:
            raise ConfigError(f"unknown objective {name!r}; {nearest(name, OBJECTIVES)}")
    budget = f"{steps:,} steps" if minutes is None else f"{minutes:g} minutes"
    require_same(output, read_results(output), budget, pictures, overrides)
    limit = f"max_steps: {steps}" if minutes is None else f"max_minutes: {minutes}"
    runner = _Runner(output, work, pictures, autoencoder, device, console or Console())
    for seed in seeds:
        for name in only or OBJECTIVES:
            if not result_path(output, name, seed).is_file():
                settings = (*overrides, f"budget={{{limit}}}")
                runner.objective(name, seed, budget, settings)


class _Runner:
    """Trains and measures single models of the study."""

    def __init__(
        self,
        output: Path,
        work: Path,
        pictures: int,
        autoencoder: Path | None,
        device: str,
        console: Console,
    ) -> None:
        self.output, self.work, self.device, self.console = output, work, device, console
        self.autoencoder = autoencoder
        self.execution = select_precision("auto", select_device(device))
        data = scenes_of(RECIPE, "validation", pictures)
        examples = [data.load(k) for k in range(pictures)]
        images = torch.stack([e.image for e in examples]).float() / 127.5 - 1.0
        self.real = image_features(load_features("mobilenet-v2"), images)
        self.labels = torch.tensor([e.label for e in examples])
        self._judge: tuple[Classifier, Tensor] | None = None

    def objective(self, name: str, seed: int, budget: str, settings: Sequence[str]) -> None:
        """Train a model if that is not done, and measure it."""
        run = self.work / f"{name}-seed{seed}"
        first_stage = ("first_stage.recipe=null", f"first_stage.path={self._first_stage()}")
        overrides = (f"seed={seed}", *OBJECTIVES[name], *first_stage, *settings)
        self._train(RECIPE, overrides, run)
        recipe = load_recipe(RECIPE, overrides)
        assert isinstance(recipe, DiffusionRecipe)
        trained = run / "recipe.yaml"
        if DiffusionRecipe.from_dict(read_yaml(trained), str(trained)) != recipe:
            raise ConfigError(f"{run}: was trained by another recipe; use another --work")
        pipeline = Pipeline(load_model(run / "model"), self.execution, str(run))
        asked = [*((n, 1.0) for n in STEPS), (STEPS[-1], recipe.guidance_scale)]
        drawn = [self._draw(pipeline, *told) for told in asked]
        points = [
            self._measure(images, *told, f"{name} seed {seed}")
            for images, told in zip(drawn, asked, strict=True)
        ]
        accuracy, retrieved = self._judged(self.real)
        last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
        self.output.mkdir(parents=True, exist_ok=True)
        path = result_path(self.output, name, seed)
        sheet = image_grid(to_images(drawn[-1][:_SHOWN]), columns=_SHOWN)
        sheet.save(path.with_suffix(PICTURE), quality=86)
        result = ObjectiveResult(
            objective=name,
            overrides=OBJECTIVES[name],
            settings=tuple(settings[:-1]),
            seed=seed,
            budget=budget,
            steps=last.step,
            minutes=float(last.values["seconds"]) / 60,
            pictures=len(self.real),
            sampler=SAMPLER,
            points=tuple(points),
            real_class_accuracy=accuracy,
            real_retrieval=retrieved,
            machine=this_machine(self.execution),
        )
        write_result(path, result)

    def _first_stage(self) -> Path:
        if self.autoencoder is not None:
            return self.autoencoder
        run = self.work / "autoencoder"
        self._train("emoji-autoencoder", (), run)
        return run

    def _train(self, recipe: str, overrides: Sequence[str], run: Path) -> None:
        train_once(recipe, overrides, run, self.work / "latents", self.device, self.console)

    def _draw(self, pipeline: Pipeline, steps: int, guidance_scale: float) -> Tensor:
        """Draw what the held-out examples show, ``(N, 3, H, W)`` in -1..1."""
        requests = [
            pipeline.request(
                class_label=label,
                seed=SEED + k,
                steps=steps,
                sampler=SAMPLER,
                spacing="trailing",
                guidance_scale=guidance_scale,
            )
            for k, label in enumerate(self.labels.tolist())
        ]
        drawn = generate_each(pipeline, requests, batch_size=BATCH)
        return torch.stack([to_pixels(item.image) for item in drawn])

    def _measure(self, images: Tensor, steps: int, guidance_scale: float, called: str) -> Point:
        features = image_features(load_features("mobilenet-v2"), images)
        distance = kid(features, self.real).value
        accuracy, retrieved = self._judged(features)
        self.console.print(
            f"[study] {called}: KID {distance:.4f}, class accuracy {accuracy:.3f} in {steps} steps"
            f" at guidance {guidance_scale:g}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return Point(
            steps=steps,
            guidance_scale=guidance_scale,
            kid=distance,
            class_accuracy=accuracy,
            retrieval=retrieved,
        )

    def _judged(self, features: Tensor) -> tuple[float, float]:
        """Class accuracy, and retrieval among the classes."""
        if self._judge is None:
            self._judge = judge_singles()
        classifier, prototypes = self._judge
        found = (classifier.of_features(features), retrieval(features, prototypes))
        accuracy, retrieved = (float((k == self.labels).float().mean()) for k in found)
        return accuracy, retrieved
