"""A whole model on disk: ``model_index.json`` and a sub-folder per component."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from mezzotint.checkpoints.folder import (
    load_component,
    load_state_strictly,
    read_component_config,
    save_component,
    write_atomically,
)
from mezzotint.checkpoints.registry import INDEX
from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from mezzotint.models.unet import UNet

__all__ = ["load_first_stage", "load_model", "save_first_stage", "save_model"]

FORMAT_VERSION = 1
_CONDITIONERS = {
    "TextConditioner": TextConditioner,
    "ClassConditioner": ClassConditioner,
    "Unconditional": Unconditional,
}
_BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}


def save_model(model: LatentDiffusion, folder: Path) -> None:
    """Write a model as a folder of components.

    Args:
        model: What to write.
        folder: Made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_first_stage(model.first_stage, model.normalization, folder / "vae")
    save_component(model.unet, folder / "unet", extra={"sample_size": _sample_size(model)})
    _save_json(folder / "scheduler" / "scheduler_config.json", _scheduler(model.schedule_config))
    _save_conditioner(model.conditioner, folder / "conditioner")
    unet = read_component_config(folder / "unet")["_class_name"]
    vae = read_component_config(folder / "vae")["_class_name"]
    index = {
        "_class_name": "LatentDiffusion",
        "format_version": FORMAT_VERSION,
        "image_size": list(model.image_size),
        "vae": ["mezzotint" if vae == "IdentityFirstStage" else "diffusers", vae],
        "unet": ["diffusers", unet],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "conditioner": ["mezzotint", type(model.conditioner).__name__],
    }
    _save_json(folder / INDEX, index)


def _sample_size(model: LatentDiffusion) -> list[int]:
    height, width = model.image_size
    factor = model.first_stage.factor
    return [height // factor, width // factor]


def load_model(folder: Path) -> LatentDiffusion:
    """Read a model that `save_model` wrote.

    Raises:
        CheckpointError: If a part is missing, damaged, or written by a newer Mezzotint.
    """
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != "LatentDiffusion":
        raise CheckpointError(
            f"{folder / INDEX}: _class_name is {index.get('_class_name')!r}; this Mezzotint draws"
            " with 'LatentDiffusion' folders only, as training writes them"
        )
    if index.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / INDEX}: format_version is {index.get('format_version')!r}; this Mezzotint"
            f" reads {FORMAT_VERSION}"
        )
    match index.get("image_size"):
        case [int(height), int(width)]:
            pass
        case other:
            raise CheckpointError(
                f"{folder / INDEX}: image_size is {other!r}; expected [height, width]"
            )
    first_stage, normalization = load_first_stage(folder / "vae")
    unet = load_component(folder / "unet")
    if not isinstance(unet, UNet):
        raise CheckpointError(f"{folder / 'unet'}: holds a {type(unet).__name__}, not a UNet")
    schedule = _schedule(folder / "scheduler" / "scheduler_config.json")
    conditioner = _load_conditioner(folder / "conditioner")
    return LatentDiffusion(first_stage, unet, conditioner, schedule, normalization, (height, width))


def save_first_stage(
    first_stage: FirstStage, normalization: LatentNormalization, folder: Path
) -> None:
    """Write a first stage with the statistics of its latents.

    A scalar normalisation is ``scaling_factor`` in ``config.json``. Means and deviations per
    channel are folded into ``quant_conv`` and ``post_quant_conv``, so that every reader of the
    format gets normalised latents with a ``scaling_factor`` of 1.
    """
    if normalization.is_scalar:
        extra = {"scaling_factor": normalization.scale_factor}
        save_component(first_stage, folder, extra=extra)
        return
    assert isinstance(first_stage, AutoencoderKL), "per-channel statistics are for KL alone"
    save_component(_folded(first_stage, normalization), folder, extra={"scaling_factor": 1.0})


@torch.no_grad()
def _folded(first_stage: AutoencoderKL, normalization: LatentNormalization) -> AutoencoderKL:
    """A copy whose posterior is that of ``(z - mean) / std``."""
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


def load_first_stage(folder: Path) -> tuple[FirstStage, LatentNormalization]:
    """Read a first stage and the statistics of its latents.

    Raises:
        CheckpointError: If it is missing or damaged, or is another kind of component.
    """
    module = load_component(folder)
    if not isinstance(module, AutoencoderKL | VQModel | IdentityFirstStage):
        raise CheckpointError(f"{folder}: holds a {type(module).__name__}, not a first stage")
    config = read_component_config(folder)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return module, LatentNormalization(torch.tensor(mean), torch.tensor(std))
    return module, LatentNormalization.from_scale_factor(config.get("scaling_factor") or 1.0)


def _scheduler(config: ScheduleConfig) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": _BETA_SCHEDULES[config.beta_schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": False,
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
    }


def _schedule(path: Path) -> ScheduleConfig:
    data = _read_json(path)
    names = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}
    name = data.get("beta_schedule")
    if name not in names:
        raise CheckpointError(f"{path}: unknown beta_schedule {name!r}")
    plain = {k: v for k, v in data.items() if k in ScheduleConfig.model_fields}
    plain["beta_schedule"] = names[name]
    plain["zero_terminal_snr"] = bool(data.get("rescale_betas_zero_snr", False))
    return ScheduleConfig.from_dict(plain, str(path))


def _save_conditioner(conditioner: Conditioner, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"_class_name": type(conditioner).__name__}
    if isinstance(conditioner, TextConditioner | ClassConditioner):
        config |= conditioner.config.to_dict()
        state = {k: v.detach().cpu().contiguous() for k, v in conditioner.state_dict().items()}
        write_atomically(folder / "model.safetensors", safetensors.torch.save(state))
    if isinstance(conditioner, TextConditioner):
        write_atomically(folder / "tokenizer.json", conditioner.tokenizer.to_str().encode())
    _save_json(folder / "config.json", config)


def _load_conditioner(folder: Path) -> Conditioner:
    config = _read_json(folder / "config.json")
    name = config.pop("_class_name", None)
    if name not in _CONDITIONERS:
        raise CheckpointError(f"{folder}: unknown conditioner {name!r}")
    if name == "Unconditional":
        return Unconditional()
    source = str(folder / "config.json")
    conditioner: nn.Module
    if name == "TextConditioner":
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # tokenizers raises a bare Exception for missing and damaged files alike
        except Exception as error:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}") from None
        conditioner = TextConditioner(TextConditionerConfig.from_dict(config, source), tokenizer)
    else:
        conditioner = ClassConditioner(ClassConditionerConfig.from_dict(config, source))
    path = folder / "model.safetensors"
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}") from None
    load_state_strictly(conditioner, state, path)
    return conditioner


def _save_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from the model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected keys and values")
    return data
