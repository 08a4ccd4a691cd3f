"""Training and measuring the models of the study of conditions, one after the other."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from mezzotint.checkpoints.model import load_model
from mezzotint.conditioning.base import Conditioner, ConditionInputs
from mezzotint.conditioning.spatial import main_conditioner, spatial_conditioner
from mezzotint.data.base import Example
from mezzotint.device import select_device, select_precision
from mezzotint.errors import ConfigError, nearest
from mezzotint.evaluation.grids import labelled_rows, under
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import InputPictures, to_pixels
from mezzotint.generation.pipeline import Pipeline
from mezzotint.generation.sampling import to_images
from mezzotint.rng import keyed_generator
from mezzotint.studies.conditions.guided import measure_guided
from mezzotint.studies.conditions.judging import Judges, judged_classes, scenes_of
from mezzotint.studies.conditions.measures import (
    MEASURES,
    Asked,
    Measure,
    further_numbers,
)
from mezzotint.studies.conditions.results import (
    PICTURE,
    ConditionResult,
    MeasuredGap,
    write_result,
)
from mezzotint.studies.machine import this_machine
from mezzotint.studies.trainings import train_once
from mezzotint.training.checkpoint import list_checkpoints, read_checkpoint
from mezzotint.training.conditions import ConditionMaker, Told
from mezzotint.training.previews import condition_picture, request_fields
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import load_recipe

__all__ = ["CONDITIONS", "GUIDED", "run_conditions_study"]

SEED, STEPS, BATCH = 1000, 25, 32
# what brings a picture into agreement with its condition, where something does
AGREEMENT: Mapping[str, Mapping[str, Any]] = {
    "super-resolution": {"back_projection": 8},
    "inpainting": {"poisson_blending": True},
    "hybrid": {"poisson_blending": True},
}
_SHOWN = 10  # columns of the sheet
_WITHOUT = {"main": "without text", "spatial": "without picture"}
_MARGIN = 0.03  # of the side, by which a mask goes beyond what it hides


# the recipe of each
CONDITIONS: Mapping[str, str] = {
    "class": "emoji-class",
    "text": "emoji-text",
    "layout": "emoji-layout",
    "semantic": "emoji-semantic",
    "super-resolution": "emoji-super-resolution",
    "inpainting": "emoji-inpainting",
    "hybrid": "emoji-hybrid",
}

# whose weights another begins from, as Stable Diffusion's inpainting model did
INITIAL: Mapping[str, str] = {"hybrid": "text"}

GUIDED = "guided"  # an unconditional model, led without retraining


def run_conditions_study(
    output: Path,
    work: Path,
    *,
    only: Sequence[str] | None = None,
    pictures: int = 256,
    minutes: float | None = None,
    count: int | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> None:
    """Do what is still missing of the study; each result is written when it is there.

    Args:
        output: Folder of the results: ``<condition>.json`` and ``<condition>.webp``.
        work: Folder of the training runs and judges; a run that was stopped goes on.
        only: Conditions to do now; all by default.
        pictures: Held-out examples that are asked of each model.
        minutes: Of each training, the first stage's too; by default the recipes'.
        count: Scenes of each training; by default the recipes'.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.

    Raises:
        ConfigError: If there is no such condition.
        MissingExtraError: If what trains is not installed.
    """
    known = (*CONDITIONS, GUIDED)
    for name in only or ():
        if name not in known:
            raise ConfigError(f"unknown condition {name!r}; {nearest(name, known)}")
    common: list[str] = []
    if minutes is not None:
        common.append(f"budget.max_minutes={minutes}")
    if count is not None:
        common.append(f"data.count={count}")
    runner = _Runner(output, work, pictures, common, device, console or Console())
    for name in only or known:
        if not (output / f"{name}.json").is_file():
            if name == GUIDED:
                runner.guided()
            else:
                runner.condition(name)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Pictures ``(N, 3, H, W)`` in -1..1.

    Attributes:
        images: Drawn under the condition.
        plain: The same before they were brought into agreement with the condition.
        nulls: Drawn without a part of the condition, by that part.
    """

    images: Tensor
    plain: Tensor
    nulls: Mapping[str, Tensor]


class _Runner:
    """Trains and measures single models of the study."""

    def __init__(
        self,
        output: Path,
        work: Path,
        pictures: int,
        common: Sequence[str],
        device: str,
        console: Console,
    ) -> None:
        self.output, self.work, self.pictures = output, work, pictures
        self.common, self.device, self.console = common, device, console
        self.execution = select_precision("auto", select_device(device))
        self.judges = Judges(work / "judges", self._say)

    def condition(self, name: str) -> None:
        """Train a model if that is not done, and measure it."""
        name_of_recipe, run = CONDITIONS[name], self._trained(name)
        recipe = load_recipe(name_of_recipe)
        assert isinstance(recipe, DiffusionRecipe)
        pipeline = Pipeline(load_model(run / "model"), self.execution, str(run))
        shown: Image.Image | None = None
        gaps: list[MeasuredGap] = []
        further: dict[str, float] = {}
        # two kinds of question are asked of a model that is told two things
        for hides in dict.fromkeys(measure.hides for measure in MEASURES[name]):
            measures = [measure for measure in MEASURES[name] if measure.hides == hides]
            asked = _ask(pipeline, recipe, name, self.pictures, hides=hides)
            drawn = self._drawn(pipeline, recipe, name, asked, measures)
            gaps += [self._gap(m, drawn.images, drawn.nulls[m.null], asked) for m in measures]
            where = ", the object hidden" if hides else ""
            numbers = further_numbers(name, drawn.images, drawn.plain, asked)
            further |= {f"{key}{where}": value for key, value in numbers.items()}
            sheet = _sheet(asked, drawn, pipeline)
            shown = sheet if shown is None else under(shown, sheet)
        assert shown is not None, "there are measures of every condition"
        last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
        model = pipeline.model
        result = ConditionResult(
            condition=name,
            recipe=name_of_recipe,
            initial=INITIAL.get(name),
            parameters=sum(
                p.numel() for part in (model.unet, model.conditioner) for p in part.parameters()
            ),
            steps=last.step,
            minutes=float(last.values["seconds"]) / 60,
            pictures=self.pictures,
            gaps=tuple(gaps),
            further=further,
            machine=this_machine(self.execution),
        )
        self.output.mkdir(parents=True, exist_ok=True)
        shown.save(self.output / f"{name}{PICTURE}", quality=86)
        write_result(self.output / f"{name}.json", result)

    def _drawn(
        self,
        pipeline: Pipeline,
        recipe: DiffusionRecipe,
        name: str,
        asked: Asked,
        measures: Sequence[Measure],
    ) -> _Drawn:
        """Draw under the condition, and without each part of it that is taken away."""
        images = plain = _draw(pipeline, asked, recipe.guidance_scale)
        if name in AGREEMENT:
            images = _draw(pipeline, asked, recipe.guidance_scale, **AGREEMENT[name])
        nulls: dict[str, Tensor] = {}
        for part in dict.fromkeys(measure.null for measure in measures):
            with nulled(pipeline.model.conditioner, part):
                nulls[part] = _draw(pipeline, asked, recipe.guidance_scale)
        return _Drawn(images, plain, nulls)

    def _trained(self, name: str) -> Path:
        """Train a model, and before it what it begins from, if that is not done."""
        overrides = ["first_stage.recipe=null", f"first_stage.path={self._autoencoder()}"]
        if name in INITIAL:
            overrides.append(f"initial={self._trained(INITIAL[name])}")
        self._train(CONDITIONS[name], self.work / name, overrides)
        return self.work / name

    def guided(self) -> None:
        """Train an unconditional model if that is not done, and lead it."""
        run = self.work / "unconditional"
        first_stage = ["first_stage.recipe=null", f"first_stage.path={self._autoencoder()}"]
        self._train("emoji-unconditional", run, first_stage)
        pipeline = Pipeline(load_model(run / "model"), self.execution, str(run))
        self.output.mkdir(parents=True, exist_ok=True)
        count = max(2, self.pictures // 20)
        picture = self.output / f"{GUIDED}{PICTURE}"
        result = measure_guided(pipeline, self.execution, targets=count, picture=picture)
        self._say(
            f"led to {result.side}x{result.side} pixels: {result.guided_psnr:.1f} dB"
            f" ({result.chance_psnr:.1f} by chance), {result.diversity_left:.0%} of the diversity"
        )
        write_result(self.output / f"{GUIDED}.json", result)

    def _autoencoder(self) -> Path:
        run = self.work / "autoencoder"
        self._train("emoji-autoencoder", run, [])
        return run

    def _train(self, recipe: str, run: Path, overrides: list[str]) -> None:
        overrides = [*self.common, *overrides]
        train_once(recipe, overrides, run, self.work / "latents", self.device, self.console)

    def _gap(self, measure: Measure, drawn: Tensor, null: Tensor, asked: Asked) -> MeasuredGap:
        real, ours, without = (
            measure.of(images, asked, self.judges) for images in (asked.images, drawn, null)
        )
        gap = MeasuredGap(name=measure.name, null=without, drawn=ours, real=real)
        self._say(
            f"{measure.name}: {without:.3f} without the condition, {ours:.3f} with it,"
            f" {real:.3f} of real pictures: {gap.closed:.0%} of the gap"
        )
        return gap

    def _say(self, text: str) -> None:
        self.console.print(f"[study] {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def nulled(conditioner: Conditioner, part: str) -> Generator[None]:
    """Let a conditioner say its null whatever it is told.

    Args:
        conditioner: Of a model.
        part: Of a hybrid, whether what conditions by cross-attention (``main``) or by concatenation
            (``spatial``).
    """
    chosen = main_conditioner(conditioner) if part == "main" else spatial_conditioner(conditioner)

    def drop_all(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs: ConditionInputs = given[0]
        return inputs, torch.ones(inputs.count, dtype=torch.bool)

    handle = chosen.register_forward_pre_hook(drop_all)
    try:
        yield
    finally:
        handle.remove()


def _ask(
    pipeline: Pipeline, recipe: DiffusionRecipe, name: str, count: int, *, hides: bool
) -> Asked:
    """Take held-out compositions as conditions."""
    data = scenes_of(CONDITIONS[name], "validation", count)
    maker = ConditionMaker(
        pipeline.model,
        data,
        seed=recipe.seed,
        degradation=recipe.degradation,
        masks=recipe.masks,
    )
    examples = [data.load(k) for k in range(count)]
    told = [maker.of_example(e, keyed_generator(SEED, k)) for k, e in enumerate(examples)]
    judged = judged_classes(CONDITIONS[name])
    examples = [replace(e, label=None if e.label is None else judged[e.label]) for e in examples]
    if hides:
        told = [_hide(t, e) for t, e in zip(told, examples, strict=True)]
    return Asked(examples, told)


def _hide(told: Told, example: Example) -> Told:
    """Let the mask cover the object."""
    assert told.mask is not None and example.boxes
    box, (height, width) = example.boxes[0], told.mask.shape[-2:]
    mask = torch.zeros_like(told.mask)
    top = math.floor((box.top - _MARGIN) * height)
    left = math.floor((box.left - _MARGIN) * width)
    bottom = math.ceil((box.bottom + _MARGIN) * height)
    right = math.ceil((box.right + _MARGIN) * width)
    mask[:, max(0, top) : bottom, max(0, left) : right] = 1.0
    return replace(told, mask=mask)


def _draw(pipeline: Pipeline, asked: Asked, guidance_scale: float, **more: Any) -> Tensor:
    """Draw what is asked, ``(N, 3, H, W)`` in -1..1."""
    pictures = InputPictures()
    requests = [
        pipeline.request(
            **request_fields(told, pictures),
            seed=SEED + k,
            steps=STEPS,
            spacing="trailing",
            guidance_scale=guidance_scale,
            **more,
        )
        for k, told in enumerate(asked.told)
    ]
    drawn = generate_each(pipeline, requests, pictures=pictures, batch_size=BATCH)
    return torch.stack([to_pixels(item.image) for item in drawn])


def _sheet(asked: Asked, drawn: _Drawn, pipeline: Pipeline) -> Image.Image:
    """Conditions, what was drawn of them, what without them, and the real pictures."""
    shown = slice(0, _SHOWN)
    size = drawn.images.shape[-1] * 2
    names = pipeline.model.conditioner.settings().get("class_names", ())
    rows: dict[str, list[Image.Image]] = {}
    conditions = [condition_picture(told, (size, size), names) for told in asked.told[shown]]
    pictured = [picture for picture in conditions if picture is not None]
    if pictured:
        rows["condition"] = pictured
    rows["drawn"] = _images(drawn.images[shown], size)
    for part, images in drawn.nulls.items():
        two = pipeline.model.conditioner.wants and pipeline.model.conditioner.wants_concat
        rows[_WITHOUT[part] if two else "without"] = _images(images[shown], size)
    rows["real"] = _images(asked.images[shown], size)
    headings = [told.caption or "" for told in asked.told[shown]]
    if asked.told[0].label is not None:
        headings = [names[told.label or 0].replace("-", " ") for told in asked.told[shown]]
    return labelled_rows(rows, headings=headings if any(headings) else None)


def _images(images: Tensor, size: int) -> list[Image.Image]:
    return [p.resize((size, size), Image.Resampling.LANCZOS) for p in to_images(images)]
