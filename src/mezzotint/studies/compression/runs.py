"""Training and measuring the runs of the compression study, one after the other."""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.model import load_model
from mezzotint.data.emoji import EmojiData
from mezzotint.device import Execution, select_device, select_precision
from mezzotint.evaluation.evaluate import evaluate
from mezzotint.evaluation.metrics import ssim
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.evaluation.reconstruction import measure_reconstruction, restore
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import Pipeline
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, fingerprint
from mezzotint.models.autoencoder import IdentityFirstStage, IdentityFirstStageConfig
from mezzotint.studies.compression.recipes import (
    AUTOENCODER_BATCH,
    DIFFUSION_BATCH,
    STAGES,
    Stage,
    autoencoder_recipe,
    data_config,
    diffusion_recipe,
    find_stage,
)
from mezzotint.studies.compression.results import (
    CompressionStudy,
    DiffusionResult,
    FirstStageResult,
    Point,
    claim,
    first_stage_result,
    result_path,
    write_result,
)
from mezzotint.studies.machine import this_machine
from mezzotint.studies.plots import plot_style
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.checkpoint import list_checkpoints, read_checkpoint
from mezzotint.training.recipe import DiffusionRecipe
from mezzotint.training.run import train

__all__ = ["run_compression_study"]

_SHOWN = 9  # pictures in a strip of the report


def run_compression_study(
    study: CompressionStudy,
    output: Path,
    work: Path,
    *,
    stages: Sequence[str] | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> None:
    """Do what is still missing of a study, and write each result when it is there.

    Args:
        study: What to do.
        output: Folder of the results: ``study.yaml``, ``runs/*.json``, ``pictures/*.webp``.
        work: Folder of the training runs; a run that was stopped goes on where it stood. A first
            stage that is no longer there is trained again if a UNet is still to be trained on it,
            and then has a result of its own.
        stages: Names of the first stages to do now; all by default.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.

    Raises:
        ConfigError: If a name is unknown, or one of the folders belongs to another study.
        MissingExtraError: If what measures or plots is not installed.
    """
    chosen = [find_stage(name) for name in stages] if stages else list(STAGES)
    _check_extras()
    for folder in (output, work):
        claim(study, folder)
    execution = select_precision("auto", select_device(device))
    runner = _Runner(study, output, work, execution, device, console or Console())
    for stage in chosen:
        for seed in study.seeds:
            if result_path(output, stage.name, seed).is_file():
                shutil.rmtree(runner.diffusion_run(stage, seed), ignore_errors=True)
            else:
                runner.diffusion(stage, seed)
        if not result_path(output, stage.name).is_file():
            runner.first_stage(stage)


class _Runner:
    """Trains and measures single runs of a study."""

    def __init__(
        self,
        study: CompressionStudy,
        output: Path,
        work: Path,
        execution: Execution,
        device: str,
        console: Console,
    ) -> None:
        self.study, self.output, self.work = study, output, work
        self.execution, self.device, self.console = execution, device, console
        self.machine = this_machine(execution)

    def first_stage(self, stage: Stage) -> FirstStage:
        """Train a first stage and measure it, if that is not done; return it."""
        run = self.work / stage.name / "first_stage"
        first_stage = self._trained(stage, run).to(self.execution.device).eval()
        weights = fingerprint(first_stage.state_dict().items())
        path = first_stage_result(self.output, stage.name, weights)
        if path.is_file():
            return first_stage
        images = _validation(self.study.resolution)
        scores = measure_reconstruction(first_stage, images, execution=self.execution)
        trained = stage.kind != "identity"
        steps, minutes = _end_of(run) if trained else (0, 0.0)
        speed = _images_per_second(run, AUTOENCODER_BATCH) if trained else None
        self._say(f"{stage.name}: {scores.rate:.3g} bits per pixel, PSNR {scores.psnr:.2f} dB")
        shown = images[:: max(1, len(images) // _SHOWN)][:_SHOWN]
        if trained:
            self._strip(f"{stage.name}-restored", restore(first_stage, shown))
        self._strip("originals", shown)
        result = FirstStageResult(
            stage=stage.name,
            parameters=sum(p.numel() for p in first_stage.parameters()),
            steps=steps,
            minutes=minutes,
            images_per_second=speed,
            weights=weights,
            scores=asdict(scores) | {"psnr": scores.psnr if math.isfinite(scores.psnr) else None},
            machine=self.machine,
        )
        write_result(path, result)
        return first_stage

    def _trained(self, stage: Stage, run: Path) -> FirstStage:
        if stage.kind == "identity":
            return IdentityFirstStage(IdentityFirstStageConfig())
        recipe = autoencoder_recipe(
            stage,
            resolution=self.study.resolution,
            minutes=self.study.first_stage_minutes,
            seed=0,
        )
        self._train(recipe, run)
        return load_first_stage(run / "model" / "vae")[0]

    def diffusion_run(self, stage: Stage, seed: int) -> Path:
        """Return the run folder of a UNet."""
        return self.work / stage.name / f"diffusion-seed{seed}"

    def diffusion(self, stage: Stage, seed: int) -> None:
        """Train one UNet in the latent space of a first stage, and measure its checkpoints."""
        weights = fingerprint(self.first_stage(stage).state_dict().items())
        run = self.diffusion_run(stage, seed)
        recipe = diffusion_recipe(
            stage,
            first_stage=str(self.work / stage.name / "first_stage"),
            resolution=self.study.resolution,
            minutes=self.study.diffusion_minutes,
            points=self.study.points,
            seed=seed,
        )
        self._train(recipe, run)
        model = load_model(run / "model")
        points = [
            self._measure(model, path, run, f"{stage.name} seed {seed}")
            for path in _at_points(run, self.study)
        ]
        seconds = points[-1].card.cost.pictures_seconds
        assert seconds is not None, "the pictures were drawn just now"
        self._strip(f"{stage.name}-seed{seed}-drawn", self._drawn(model, run))
        result = DiffusionResult(
            stage=stage.name,
            seed=seed,
            first_stage_weights=weights,
            parameters=sum(p.numel() for p in model.unet.parameters()),
            gflops=_gflops(model),
            images_per_second=_images_per_second(run, DIFFUSION_BATCH),
            sampling_seconds=seconds,
            points=tuple(points),
            machine=self.machine,
        )
        write_result(result_path(self.output, stage.name, seed), result)
        shutil.rmtree(run)

    def _measure(self, model: LatentDiffusion, path: Path, run: Path, called: str) -> Point:
        """Draw with the averaged weights of a checkpoint and compare with the training emoji."""
        checkpoint = read_checkpoint(path)
        trained = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.copy_(checkpoint.tensors["ema"][name])
        card = evaluate(
            Pipeline(model, self.execution, str(run)),
            data_config("train", self.study.resolution),
            _protocol(self.study),
            steps=self.study.steps,
            sampler=self.study.sampler,
            guidance_scale=1.0,
        )
        kid = card.numbers["kid_mobilenet_v2"].value
        self._say(f"{called}: KID (MobileNetV2) {kid:.4f} after {checkpoint.step:,} steps")
        minutes = float(checkpoint.values["seconds"]) / 60
        return Point(step=checkpoint.step, minutes=minutes, card=card)

    def _drawn(self, model: LatentDiffusion, run: Path) -> Tensor:
        """Pictures of the first classes, as the model draws them at the end of its training."""
        pipeline = Pipeline(model, self.execution, str(run))
        classes = EmojiData(data_config("train", self.study.resolution)).class_names
        requests = [
            pipeline.request(
                class_label=k % len(classes),
                seed=k,
                steps=self.study.steps,
                sampler=self.study.sampler,
                guidance_scale=1.0,
            )
            for k in range(_SHOWN)
        ]
        drawn = [np.array(item.image) for item in generate_each(pipeline, requests)]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)

    def _train(self, recipe: Recipe, run: Path) -> None:
        diffusion = isinstance(recipe, DiffusionRecipe)
        last_written = "model_index.json" if diffusion else "vae/config.json"
        if not (run / "model" / last_written).is_file():
            resume = (run / "recipe.yaml").is_file()
            train(recipe, output=run, resume=resume, device=self.device, console=self.console)

    def _say(self, text: str) -> None:
        self.console.print(f"[study] {text}", markup=False, highlight=False, soft_wrap=True)

    def _strip(self, name: str, images: Tensor) -> None:
        """Keep pictures ``(N, 3, H, W)`` uint8 side by side; the report takes them apart again."""
        folder = self.output / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        row = Image.fromarray(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy())
        row.save(folder / f"{name}.webp", quality=85, method=6)


def _check_extras() -> None:
    """Tell of a missing package before hours of training, and not after them."""
    blank = torch.zeros(1, 3, 16, 16)
    ssim(blank, blank)
    with plot_style():
        pass


def _protocol(study: CompressionStudy) -> EvaluationProtocol:
    return EvaluationProtocol(
        name="compression-study",
        description="few pictures of short trainings: KID first, no standard error for the rest",
        metrics=("kid", "precision", "recall"),
        network="mobilenet-v2",
        resize="bicubic-antialias",
        samples=study.samples,
        reference_samples=study.reference_samples,
        kid_subsets=None,
    )


def _validation(resolution: int) -> Tensor:
    """The emoji that nothing was trained on, ``(N, 3, H, W)`` uint8."""
    data = EmojiData(data_config("validation", resolution))
    return torch.stack([data.load(k).image for k in range(len(data))])


def _at_points(run: Path, study: CompressionStudy) -> list[Path]:
    """The checkpoints nearest to the study's points in time; those at interruptions are left."""
    times = {
        path: float(read_checkpoint(path).values["seconds"]) / 60
        for path in list_checkpoints(run / "checkpoints")
    }
    wanted = [study.diffusion_minutes * (k + 1) / study.points for k in range(study.points)]
    return [min(times, key=lambda path: abs(times[path] - minutes)) for minutes in wanted]


def _end_of(run: Path) -> tuple[int, float]:
    """Steps and minutes of a finished run."""
    last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return last.step, float(last.values["seconds"]) / 60


def _images_per_second(run: Path, images_per_step: int) -> float:
    """The median over the log's rows, which leaves out what disturbed a moment of the training."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    if speeds:
        return statistics.median(speeds)
    steps, minutes = _end_of(run)
    return steps * images_per_step / (60 * minutes)


@torch.no_grad()
def _gflops(model: LatentDiffusion) -> float:
    shape = model.latent_shape(*model.image_size)
    device = next(model.unet.parameters()).device
    with FlopCounterMode(display=False) as counter:
        cond = model.conditioner.null(1)
        model.predict(torch.zeros(1, *shape, device=device), torch.zeros(1, device=device), cond)
    return counter.get_total_flops() / 1e9
