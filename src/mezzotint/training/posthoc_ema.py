"""An average of any length from the snapshots of a run: EDM2's post-hoc EMA (arXiv 2312.02696)."""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mezzotint.checkpoints.model import read_model, save_model
from mezzotint.checkpoints.registry import INDEX
from mezzotint.device import select_device
from mezzotint.errors import CheckpointError, ConfigError, TrainingError
from mezzotint.training.autoencoder import AutoencoderTask
from mezzotint.training.orders import open_training_data
from mezzotint.training.power_function import (
    LEAST_SIGMA_REL,
    MOST_SIGMA_REL,
    Profile,
    expected_error,
    solve_weights,
)
from mezzotint.training.recipe import AutoencoderRecipe
from mezzotint.training.run import execution_for, load_recipe
from mezzotint.training.snapshots import Snapshot, read_snapshots, stored_tensors

__all__ = ["PostHocAverage", "average_run", "plan_average", "synthesize"]

# as a share of an average's way to the weights, beyond which it is another than was asked for
_MOST_ERROR = 0.1
# by which the rounding of float16 may be multiplied before it is worth a word
_MOST_GAIN = 8.0


@dataclass(frozen=True)
class PostHocAverage:
    """How an average is put together.

    Attributes:
        wanted: What it holds.
        snapshots: Those that it is put together from.
        weights: ``(N,)``, of each average of each snapshot, in order; they add up to 1.
        error: How far it would be off in a random walk; see
            `mezzotint.training.power_function.expected_error`.
    """

    wanted: Profile
    snapshots: tuple[Snapshot, ...]
    weights: NDArray[np.float64]
    error: float

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to be said of it, in sentences."""
        first, last = self.snapshots[0], self.snapshots[-1]
        lengths = ", ".join(f"{p.sigma_rel:g}" for p in last.profiles)
        told = [
            f"sigma_rel {self.wanted.sigma_rel:g} at step {self.wanted.step:,.0f}, from"
            f" {len(self.snapshots)} snapshots of sigma_rel {lengths} (steps {first.step:,} to"
            f" {last.step:,}); it may be off by {self.error:.1%} of its way to the weights"
        ]
        gain = float(np.linalg.norm(self.weights))
        kinds = {stored.dtype for tensors in last.tensors.values() for stored in tensors}
        if gain > _MOST_GAIN and torch.float16 in kinds:
            told.append(
                f"so short an average magnifies the rounding of float16 {gain:.0f} times; train"
                " with ema.snapshot_precision: float32, or track a shorter sigma_rel"
            )
        return tuple(told)


def average_run(
    run: Path | str,
    output: Path | str,
    *,
    sigma_rel: float,
    at_step: int | None = None,
    device: str = "auto",
) -> PostHocAverage:
    """Write the model that a run's average of another length is.

    Args:
        run: The folder of a run whose recipe says ``ema: {kind: power}``.
        output: The folder for the model, which must be empty if it is there: a whole model, or
            for an autoencoder ``vae/``, with its latents measured anew over the data.
        sigma_rel: The length, as a share of the training until ``at_step``.
        at_step: Where the average ends; None is the last snapshot.
        device: On which an autoencoder's latents are measured.

    Returns:
        How it was put together.

    Raises:
        ConfigError: If ``sigma_rel`` is no length, or the step is not among those of the run.
        TrainingError: If there is no such run, or it is not finished; if it has no snapshots, or
            too few for this average; if the output is not empty.
        CheckpointError: If a snapshot is damaged.
    """
    run, output = Path(run), Path(output)
    if not (run / "recipe.yaml").is_file():
        raise TrainingError(f"{run}: holds no run; expected a folder that mezzotint train wrote")
    recipe = load_recipe(run / "recipe.yaml")
    plan = plan_average(run, sigma_rel=sigma_rel, at_step=at_step)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TrainingError(f"{output}: is there already; choose another --output")
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        if isinstance(recipe, AutoencoderRecipe):
            _write_first_stage(plan, recipe, temporary, device)
        else:
            _write_model(plan, run, temporary)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise TrainingError(f"{output}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return plan


def plan_average(run: Path, *, sigma_rel: float, at_step: int | None = None) -> PostHocAverage:
    """Find by what the snapshots of a run are multiplied; see `average_run`."""
    if not LEAST_SIGMA_REL <= sigma_rel <= MOST_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel {sigma_rel:g}: expected {LEAST_SIGMA_REL:g} to {MOST_SIGMA_REL:.4f}, where"
            " every step weighs the same"
        )
    found = read_snapshots(run / "ema")
    if not found:
        raise TrainingError(
            f"{run / 'ema'}: no snapshots; they are written while a recipe is trained that says"
            " ema: {kind: power}"
        )
    first, last = found[0].step, found[-1].step
    step = last if at_step is None else at_step
    if not first <= step <= last:
        raise ConfigError(
            f"step {step:,}: the snapshots of {run} are of steps {first:,} to {last:,}"
        )
    # the first one after it has seen what happened between the one before and it
    end = next(k for k, snapshot in enumerate(found) if snapshot.step >= step)
    used, wanted = tuple(found[: end + 1]), Profile(step, sigma_rel)
    profiles = [profile for snapshot in used for profile in snapshot.profiles]
    weights = solve_weights(profiles, wanted)
    error = expected_error(profiles, wanted, weights)
    if error > _MOST_ERROR:
        lengths = ", ".join(f"{p.sigma_rel:g}" for p in used[-1].profiles)
        steps = sorted({s.step for s in used[-2:]})
        raise TrainingError(
            f"sigma_rel {sigma_rel:g} at step {step:,} cannot be put together from the"
            f" {len(used)} snapshots up to it: it would be off by {error:.0%} of its way to the"
            f" weights. Ask for a length nearer to {lengths}, or for step"
            f" {' or '.join(f'{s:,}' for s in steps)}; or train with a smaller ema.snapshot_steps"
        )
    return PostHocAverage(wanted, used, weights, error)


@torch.no_grad()
def synthesize(plan: PostHocAverage, module: nn.Module) -> None:
    """Put an average into a module.

    A weight of which rows were overwritten in training (dead codes, seeded anew) is put together
    from the snapshots after that alone, as well as they can.

    Args:
        plan: How the average is put together.
        module: The network of the run.

    Raises:
        CheckpointError: If a snapshot is damaged, or of another network.
    """
    parameters, source = dict(module.named_parameters()), plan.snapshots[-1]
    for name, stored in source.tensors.items():
        there = tuple(parameters[name].shape) if name in parameters else None
        if there != stored[0].shape:
            what = "does not have" if there is None else f"has as {there}"
            raise CheckpointError(
                f"{source.path}: holds {name} {stored[0].shape}, which its network {what}"
            )
    mixed: dict[str, Tensor] = {}
    for name, averages in stored_tensors(plan.snapshots):
        weights = _weights_for(plan, name)
        total = torch.zeros(averages[0].shape, dtype=torch.float64)
        for weight, average in zip(weights, averages, strict=True):
            total.add_(average.double(), alpha=float(weight))
        mixed[name] = total.to(parameters[name].dtype)
    # all checksums are right: now the network may change
    for name, tensor in mixed.items():
        parameters[name].copy_(tensor)


def _weights_for(plan: PostHocAverage, name: str) -> NDArray[np.float64]:
    """By what the averages of one weight are multiplied."""
    since = max(snapshot.overwritten.get(name, 0) for snapshot in plan.snapshots)
    profiles = [profile for snapshot in plan.snapshots for profile in snapshot.profiles]
    good = [k for k, profile in enumerate(profiles) if profile.step >= since]
    if len(good) == len(profiles):
        return plan.weights
    weights = np.zeros(len(profiles))
    weights[good] = solve_weights([profiles[k] for k in good], plan.wanted)
    return weights


def _write_model(plan: PostHocAverage, run: Path, folder: Path) -> None:
    """The run's own model with other weights of UNet and conditioner."""
    if not (run / "model" / INDEX).is_file():
        raise TrainingError(
            f"{run}: this run is not finished; end it with mezzotint train … --resume, where"
            " --set budget.max_steps may be lowered"
        )
    loaded = read_model(run / "model")
    model = loaded.model
    synthesize(plan, nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner}))
    save_model(model, folder, defaults=loaded.defaults)


def _write_first_stage(
    plan: PostHocAverage, recipe: AutoencoderRecipe, folder: Path, device: str
) -> None:
    """An autoencoder whose latents are measured anew: those of other weights are others."""
    execution = execution_for(recipe.precision, select_device(device))
    data = open_training_data(recipe.data, recipe.seed, recipe.batch_size)
    task = AutoencoderTask(recipe, data, execution)
    synthesize(plan, task.model)
    assert task.ema is not None
    task.ema.reset()
    task.export(folder)
