"""A whole model on disk: ``model_index.json`` and a sub-folder per component."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.checkpoints.conditioners import (
    load_conditioner,
    read_token_width,
    save_conditioner,
)
from mezzotint.checkpoints.folder import (
    CONFIG,
    load_component,
    read_component_config,
    read_json,
    save_component,
    write_json,
)
from mezzotint.checkpoints.keys import Keys
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.schedulers import FILE, read_scheduler, write_scheduler
from mezzotint.errors import CheckpointError, ConfigError, short
from mezzotint.latent_diffusion import (
    LARGEST_SCALE,
    LEAST_SCALE,
    FirstStage,
    LatentDiffusion,
    LatentNormalization,
)
from mezzotint.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.safetensors_file import narrowed

__all__ = [
    "CLASS",
    "as_first_stage",
    "as_unet",
    "check_width",
    "folded",
    "load_first_stage",
    "load_model",
    "load_unet",
    "read_defaults",
    "read_index",
    "read_model",
    "read_normalization",
    "require_range",
    "sample_size",
    "save_first_stage",
    "save_model",
]

CLASS = "LatentDiffusion"
FORMAT_VERSION = 1


def save_model(
    model: LatentDiffusion,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
) -> None:
    """Write a model as a folder of components.

    Args:
        model: What to write.
        folder: Made if need be.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
        defaults: How it is sampled where a request does not say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_first_stage(model.first_stage, model.normalization, folder / "vae", dtype)
    size = {"sample_size": list(sample_size(model))}
    save_component(model.unet, folder / "unet", size, dtype)
    scheduler, _ = write_scheduler(model.schedule_config, defaults)
    write_json(folder / "scheduler" / FILE, scheduler)
    save_conditioner(model.conditioner, folder / "conditioner", dtype)
    unet = read_component_config(folder / "unet")["_class_name"]
    vae = read_component_config(folder / "vae")["_class_name"]
    told = {f.name: getattr(defaults, f.name) for f in fields(SamplingDefaults)} if defaults else {}
    sampling = {name: value for name, value in told.items() if value is not None}
    index = {
        "_class_name": CLASS,
        "format_version": FORMAT_VERSION,
        "image_size": list(model.image_size),
        **({"sampling": sampling} if sampling else {}),
        "vae": ["mezzotint" if vae == "IdentityFirstStage" else "diffusers", vae],
        "unet": ["mezzotint" if unet == "UNet" else "diffusers", unet],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "conditioner": ["mezzotint", type(model.conditioner).__name__],
    }
    write_json(folder / INDEX, index)


def require_range(model: LatentDiffusion, dtype: torch.dtype | None) -> None:
    """Raise a CheckpointError that names a weight if one is beyond a type; None holds them all."""
    if dtype is None:
        return
    for name, tensor in model.state_dict().items():
        # the statistics of latents are written as text
        if tensor.is_floating_point() and not name.startswith("normalization."):
            narrowed(name, tensor.detach().cpu(), dtype)


def sample_size(model: LatentDiffusion) -> tuple[int, int]:
    """Return height and width of the latents that a model was trained at."""
    height, width = model.image_size
    factor = model.first_stage.factor
    return height // factor, width // factor


def load_model(folder: Path, dtype: torch.dtype | None = torch.float32) -> LatentDiffusion:
    """Read a model that `save_model` wrote; see `read_model`."""
    return read_model(folder, dtype).model


def read_model(folder: Path, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    """Read a model that `save_model` wrote, and how it is sampled where a request does not say.

    Args:
        folder: Of the model.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.

    Raises:
        CheckpointError: If a part is missing, damaged, or written by a newer Mezzotint.
    """
    index, size = read_index(folder)
    first_stage, normalization = load_first_stage(folder / "vae", dtype)
    unet = load_unet(folder / "unet", dtype)
    schedule = read_scheduler(folder / "scheduler" / FILE).schedule
    conditioner = load_conditioner(folder / "conditioner", dtype)
    check_width(folder, unet.config, read_token_width(folder / "conditioner"))
    try:
        model = LatentDiffusion(first_stage, unet, conditioner, schedule, normalization, size)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return LoadedModel(model=model, defaults=read_defaults(index, folder / INDEX))


def read_index(folder: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """Read the index of a model's folder, and from it the height and width of its images.

    Raises:
        CheckpointError: If it is missing, of another kind, or written by a newer Mezzotint.
    """
    index = read_json(folder / INDEX)
    if (name := index.get("_class_name")) != CLASS:
        raise CheckpointError(f"{folder / INDEX}: _class_name is {short(name)}, expected {CLASS!r}")
    if (version := index.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / INDEX}: format_version is {short(version)}; this Mezzotint reads"
            f" {FORMAT_VERSION}"
        )
    match index.get("image_size"):
        case [int(height), int(width)] if min(height, width) > 0 and max(height, width) <= 1 << 16:
            return index, (height, width)
        case other:
            raise CheckpointError(
                f"{folder / INDEX}: image_size is {short(other)}; expected [height, width]"
            )


def read_defaults(index: Mapping[str, Any], path: Path, key: str = "sampling") -> SamplingDefaults:
    """Read from the index of a model's folder how it is sampled where a request does not say.

    Args:
        index: Its content.
        path: What messages call it.
        key: Where in the index it stands.

    Raises:
        CheckpointError: If it says what is not known.
    """
    try:
        return SamplingDefaults(**index.get(key, {}))
    except TypeError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from None


def check_width(folder: Path, unet: UNetConfig, width: int | None) -> None:
    """Raise a CheckpointError if a UNet attends to tokens of another width than there are."""
    if width is not None and width != unet.cross_attention_dim:
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: cross_attention_dim is"
            f" {unet.cross_attention_dim}, but the conditioner's tokens are {width} wide"
        )


def load_unet(folder: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """Read a component folder that must hold a UNet.

    Raises:
        CheckpointError: If it is missing or damaged, or is another kind of component.
    """
    return as_unet(load_component(folder, dtype), folder)


def as_unet(module: nn.Module, folder: Path) -> UNet:
    """Return a component that must be a UNet.

    Raises:
        CheckpointError: If it is another kind of component.
    """
    if not isinstance(module, UNet):
        raise CheckpointError(f"{folder}: holds a {type(module).__name__}, not a UNet")
    return module


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
