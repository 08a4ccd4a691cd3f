"""A programme: the stages of one shipped model, each a recipe, trained in order and in pieces."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints.first_stages import load_first_stage, save_first_stage
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import load_model, save_as_changes, save_model
from mezzotint.errors import ConfigError, TrainingError, nearest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.checkpoint import list_checkpoints
from mezzotint.training.claim import differences
from mezzotint.training.recipe import DiffusionRecipe, TrainedFirstStage
from mezzotint.training.run import load_recipe, train

__all__ = [
    "HALF",
    "PLANNED",
    "STAGES",
    "Piece",
    "Programme",
    "is_finished",
    "is_spent",
    "keep",
    "must_follow",
    "open_programme",
    "pieces_of",
    "record",
    "run_piece",
    "steps_done",
    "train_stage",
]

STAGES = ("autoencoder", "pretraining", "text-to-image", "upscale", "inpaint", "scenes")
HALF = "half"  # of a finished stage: the model in float16, as it is shipped
PLANNED = "plan.yaml"  # beside weights: the recipe that they were trained by, as the plan has it
_PLANS = Path(__file__).parent / "plans"
_ROOT = Path(__file__).parents[2]
_HISTORY = "history.json"
_LAST_WRITTEN = ("vae/config.json", "model_index.json")
_SAVING = 20.0  # seconds of a piece that are kept for its last checkpoint, a tenth at most


@dataclass(frozen=True)
class Programme:
    """What is trained, and where its state is kept.

    Attributes:
        model: The shipped model's name.
        plan: The folder of its recipes.
        work: The folder of its runs, one for each stage.
    """

    model: str
    plan: Path
    work: Path

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that the plan has a recipe for, in order."""
        return tuple(stage for stage in STAGES if (self.plan / f"{stage}.yaml").is_file())

    def recipe(self, stage: str) -> Recipe:
        """Return a stage's recipe; the models that it names are other stages' results."""
        recipe = load_recipe(self.plan / f"{stage}.yaml")
        if not isinstance(recipe, DiffusionRecipe):
            return recipe
        made: dict[str, Any] = {}
        if isinstance(recipe.first_stage, TrainedFirstStage):
            made["first_stage"] = TrainedFirstStage(path=self._result(str(recipe.first_stage.path)))
        if recipe.initial is not None:
            made["initial"] = self._result(recipe.initial)
        return recipe.model_copy(update=made)

    def _result(self, stage: str) -> str:
        return (self.work / stage / HALF).as_posix()


@dataclass(frozen=True)
class Piece:
    """A part of a stage that was trained at once.

    Attributes:
        stage: Its name.
        start: Steps done before it.
        end: Steps done after it.
        seconds: That it took, with loading and saving.
        device: What it was trained on.
        restarted: Whether the optimizer began anew, with averaged float16 weights.
    """

    stage: str
    start: int
    end: int
    seconds: float
    device: str
    restarted: bool = False


def open_programme(model: str, plan: str, work: Path | None, device: torch.device) -> Programme:
    """Find the plan of a model.

    Args:
        model: A shipped model's name.
        plan: ``cpu`` or ``gpu``; ``auto`` is what the device suggests; or a folder of recipes.
        work: Where the runs are kept; ``runs/shipped/<plan>`` if left out.
        device: What it is trained on.

    Raises:
        ConfigError: If there is no such plan.
    """
    if plan == "auto":
        plan = "cpu" if device.type == "cpu" else "gpu"
    folder = Path(plan) if Path(plan).is_dir() else _PLANS / f"{model}-{plan}"
    if not folder.is_dir():
        known = sorted(path.name for path in _PLANS.iterdir())
        raise ConfigError(
            f"{model}: no plan {plan!r} to train it by: {nearest(folder.name, known)}; or give a"
            " folder of recipes by --plan"
        )
    programme = Programme(model, folder, work or Path("runs") / "shipped" / folder.name)
    if not programme.stages:
        raise ConfigError(f"{folder}: no recipes here; expected {', '.join(STAGES)} as *.yaml")
    changes = set[str]()
    for place, stage in enumerate(programme.stages):
        recipe = load_recipe(folder / f"{stage}.yaml")
        initial = getattr(recipe, "initial", None)
        before = programme.stages[:place]
        if initial is not None and initial not in before:
            raise ConfigError(
                f"{folder / stage}.yaml: initial: {initial!r} is no stage before it:"
                f" {nearest(initial, before)}"
            )
        if getattr(recipe, "lora_rank", None) is None:
            continue
        changes.add(stage)
        if initial in changes:
            raise ConfigError(
                f"{folder / stage}.yaml: initial: {initial!r} is kept as changes of another model,"
                " and changes of changes are not kept; begin from that one, or drop lora_rank"
            )
    return programme


def is_finished(run: Path) -> bool:
    """Whether a stage has spent its budget, and its model stands there as it is shipped."""
    return any((run / HALF / name).is_file() for name in _LAST_WRITTEN)


def is_spent(programme: Programme, stage: str) -> bool:
    """Whether what was begun from a stage is finished, so that it is needed no more."""
    result = (programme.work / stage / HALF).as_posix()
    return any(
        is_finished(programme.work / other)
        and getattr(programme.recipe(other), "initial", None) == result
        for other in programme.stages
    )


def must_follow(programme: Programme, stage: str, folder: Path, recipe: str = PLANNED) -> None:
    """Refuse weights that another recipe than the plan's made.

    Args:
        programme: Says what the plan is.
        stage: That the weights are of.
        folder: Where they stand.
        recipe: What the recipe that made them is called there.

    Raises:
        ConfigError: If the recipes differ in more than a continued run's may, or none stands there.
    """
    planned, wanted = folder / recipe, load_recipe(programme.plan / f"{stage}.yaml")
    if not planned.is_file():
        raise ConfigError(f"{folder}: no {recipe} says what made these weights; move them away")
    stored = load_recipe(planned)
    different = ["kind"] if type(stored) is not type(wanted) else differences(stored, wanted)
    if different:
        raise ConfigError(
            f"{folder}: trained by a recipe that has other values of {', '.join(different)} than"
            f" {programme.plan}; move it away, or take another --work"
        )


def steps_done(run: Path) -> int:
    """Return the steps of a run's newest checkpoint; 0 if it has none."""
    saved = list_checkpoints(run / "checkpoints")
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def _optimizer_begun(run: Path) -> int:
    """At which step the optimizer of the newest checkpoint began without moments."""
    state = json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    return int(state["values"]["begun"])


def pieces_of(work: Path) -> list[Piece]:
    """Return what was trained so far, oldest first."""
    path = work / _HISTORY
    return [Piece(**piece) for piece in json.loads(path.read_text())] if path.is_file() else []


def record(work: Path, pieces: list[Piece]) -> None:
    """Write what was trained so far."""
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / f".{_HISTORY}.tmp"
    temporary.write_text(json.dumps([asdict(piece) for piece in pieces], indent=1) + "\n")
    temporary.replace(work / _HISTORY)


def run_piece(
    programme: Programme, until: float, device: torch.device, processes: int | None = None
) -> bool:
    """Train the programme's stages from where they stand until a time.

    Args:
        programme: What to train.
        until: A time of `time.time`.
        device: What to train on.
        processes: How many share a step; by default one for each core of the processor.

    Returns:
        Whether the whole programme is finished.

    Raises:
        TrainingError: If a stage cannot go on.
    """
    stop = until - min(_SAVING, 0.1 * (until - time.time()))
    for stage in programme.stages:
        run = programme.work / stage
        if is_finished(run):
            must_follow(programme, stage, run / HALF)
            continue
        if is_spent(programme, stage):
            continue
        if time.time() >= stop:
            return False
        start, begun = steps_done(run), time.time()
        count = _processes(programme.recipe(stage).batch_size, device, processes)
        if count == 1:
            train_stage(programme, stage, stop, str(device))
        else:
            _train_by_several(programme, stage, stop, count)
        end = steps_done(run)
        if end > start:
            restarted = start > 0 and _optimizer_begun(run) == start
            used, seconds = _named(device, count), round(time.time() - begun, 1)
            piece = Piece(stage, start, end, seconds, used, restarted)
            record(programme.work, [*pieces_of(programme.work), piece])
        if not _finish(programme, stage):
            return False
    return True


def train_stage(programme: Programme, stage: str, stop: float, device: str) -> None:
    """Train a stage in this process, or as one of several, until a time of `time.time`."""
    run = programme.work / stage
    train(
        programme.recipe(stage),
        output=run,
        resume=(run / "recipe.yaml").is_file(),
        device=device,
        stop_minutes=max(0.0, (stop - time.time()) / 60),
    )


def _processes(batch_size: int, device: torch.device, wanted: int | None) -> int:
    """On the processor as many as there are cores, each with one thread, if they divide a step."""
    if device.type != "cpu":
        return 1
    return math.gcd(batch_size, wanted or len(os.sched_getaffinity(0)))


def _named(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {processes} {'process' if processes == 1 else 'processes'}"


def _train_by_several(programme: Programme, stage: str, stop: float, count: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    told = [programme.model, str(programme.plan), str(programme.work), stage, repr(stop)]
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    command = [sys.executable, *launcher, "-m", "tools.train_shipped.stage", *told]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise TrainingError(
            f"{programme.work / stage}: {count} processes ended with exit code {code}; their last"
            " words stand above"
        )


def keep(
    model: LatentDiffusion,
    recipe: Recipe,
    folder: Path,
    base: Path | None = None,
    defaults: SamplingDefaults | None = None,
) -> None:
    """Write a model in float16: whole, or as changes where changes were trained.

    Args:
        model: What was trained.
        recipe: That it was trained by.
        folder: Where it is to lie.
        base: The model that it is a change of; by default the one that the recipe began from.
        defaults: How it is sampled where a request does not say.
    """
    assert isinstance(recipe, DiffusionRecipe)
    if recipe.lora_rank is None:
        save_model(model, folder, dtype=torch.float16, defaults=defaults)
        return
    rank, base = recipe.lora_rank, base or Path(recipe.initial or "")
    save_as_changes(model, base, folder, rank=rank, dtype=torch.float16, defaults=defaults)


@torch.no_grad()
def _finish(programme: Programme, stage: str) -> bool:
    """Write a stage's model in float16, if it has spent its budget; returns whether it has.

    What is trained on it is trained on the very numbers that are shipped.
    """
    run = programme.work / stage
    model, half = run / "model", run / HALF
    if not any((model / name).is_file() for name in _LAST_WRITTEN):
        return False
    temporary = run / f".{HALF}.tmp"
    recipe = programme.recipe(stage)
    if (model / "model_index.json").is_file():
        keep(load_model(model), recipe, temporary)
    else:
        save_first_stage(*load_first_stage(model / "vae"), temporary / "vae", torch.float16)
    shutil.copyfile(programme.plan / f"{stage}.yaml", temporary / PLANNED)
    temporary.replace(half)
    return True
