"""The first stage of a model on disk, and the statistics of its latents."""

from pathlib import Path

import torch
from torch import nn

from mezzotint.checkpoints.folder import (
    CONFIG,
    load_component,
    read_component_config,
    save_component,
)
from mezzotint.checkpoints.keys import Keys
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import LARGEST_SCALE, LEAST_SCALE, FirstStage, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel

__all__ = [
    "as_first_stage",
    "folded",
    "load_first_stage",
    "read_normalization",
    "save_first_stage",
]


def save_first_stage(
    first_stage: FirstStage,
    normalization: LatentNormalization,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a first stage with the statistics of its latents.

    A scalar normalisation is ``scaling_factor`` in ``config.json``. Means and deviations per
    channel are folded into ``quant_conv`` and ``post_quant_conv``, so that every reader of the
    format gets normalised latents with a ``scaling_factor`` of 1.
    """
    if normalization.is_scalar:
        save_component(first_stage, folder, {"scaling_factor": _scaling(normalization)}, dtype)
        return
    assert isinstance(first_stage, AutoencoderKL), "per-channel statistics are for KL alone"
    whole = folded(first_stage, normalization)
    save_component(whole, folder, {"scaling_factor": 1.0}, dtype)


def _scaling(normalization: LatentNormalization) -> float:
    """The shortest number that is read back as the same scale: 0.18215, not 0.1821500033."""
    exact = normalization.scale_factor
    for digits in range(1, 17):
        short = float(f"{exact:.{digits}g}")
        read = LatentNormalization.from_scale_factor(short).std
        if torch.equal(read, normalization.std.cpu()):
            return short
    return exact


@torch.no_grad()
def folded(first_stage: AutoencoderKL, normalization: LatentNormalization) -> AutoencoderKL:
    """Return a copy whose posterior is that of ``(z - mean) / std``.

    Args:
        first_stage: Stays as it is.
        normalization: Means and deviations per channel.
    """
    copy = AutoencoderKL(first_stage.config)
    copy.load_state_dict(first_stage.state_dict())
    mean, std = normalization.mean.cpu(), normalization.std.cpu()
    zeros = torch.zeros_like(mean)
    # the moments are [mean, logvar]: logvar of z / s is logvar - 2 log s
    scale = torch.cat([1.0 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, zeros - 2.0 * std.log()])
    quant, post = copy.quant_conv, copy.post_quant_conv
    assert quant.bias is not None and post.bias is not None
    quant.weight.mul_(scale.view(-1, 1, 1, 1))
    quant.bias.mul_(scale).add_(shift)
    post.bias.add_(torch.einsum("oihw,i->o", post.weight, mean))
    post.weight.mul_(std.view(1, -1, 1, 1))
    return copy


def load_first_stage(
    folder: Path, dtype: torch.dtype | None = torch.float32, *, scale_factor: float = 1.0
) -> tuple[FirstStage, LatentNormalization]:
    """Read a first stage and the statistics of its latents.

    Args:
        folder: Of the component.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.
        scale_factor: Where the folder says none.

    Raises:
        CheckpointError: If it is missing or damaged, or is another kind of component.
    """
    first_stage = as_first_stage(load_component(folder, dtype), folder)
    return first_stage, read_normalization(folder, scale_factor)


def as_first_stage(module: nn.Module, folder: Path) -> FirstStage:
    """Return a component that must be a first stage.

    Raises:
        CheckpointError: If it is another kind of component.
    """
    if not isinstance(module, AutoencoderKL | VQModel | IdentityFirstStage):
        raise CheckpointError(f"{folder}: holds a {type(module).__name__}, not a first stage")
    return module


def read_normalization(folder: Path, scale_factor: float = 1.0) -> LatentNormalization:
    """Read the statistics of a first stage's latents.

    Args:
        folder: Of the component.
        scale_factor: Where the folder says none.

    Raises:
        CheckpointError: If they are not numbers.
    """
    keys = Keys(read_component_config(folder))
    mean, std = keys.numbers("latents_mean"), keys.numbers("latents_std")
    least, most = 1 / LARGEST_SCALE, 1 / LEAST_SCALE
    if mean and std and (len(mean) != len(std) or not least <= min(std) <= max(std) <= most):
        wanted = f"as many numbers as latents_mean has, each {least:g} to {most:g}"
        keys.problem("latents_std", std, wanted)
    scale = keys.take("scaling_factor", scale_factor)
    keys.require(folder / CONFIG)
    if mean and std:
        return LatentNormalization(torch.tensor(mean), torch.tensor(std))
    try:
        return LatentNormalization.from_scale_factor(scale_factor if scale is None else scale)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
