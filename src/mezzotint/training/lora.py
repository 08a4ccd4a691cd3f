"""LoRA while it is trained (Hu et al. 2021, arXiv 2106.09685), through the package ``peft``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from mezzotint.checkpoints.lora_fit import Changeable
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.errors import ConfigError, MissingExtraError, nearest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.rng import mix
from mezzotint.training.finetune_recipe import FinetuneRecipe, LoraSettings
from mezzotint.training.trained import Trained

__all__ = ["LORA_FILE", "add_lora"]

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"  # what PEFT calls the one adapter
_FACTORS = ("lora_A", "lora_B")
# the attentions of CLIP and BERT, and of the transformer that is trained with the UNet
_CONDITIONER = ("q_proj", "k_proj", "v_proj", "out_proj", "to_qkv", "to_out")


def add_lora(model: LatentDiffusion, recipe: FinetuneRecipe, unread: Sequence[str]) -> Trained:
    """Put a LoRA into a model whose weights are frozen.

    Args:
        model: On its device.
        recipe: Of method ``lora``.
        unread: Beginnings of the names of layers of the main conditioner that nothing depends on.

    Raises:
        ConfigError: If a component has no such layer.
        MissingExtraError: If ``peft`` is not installed.
    """
    settings = recipe.lora or LoraSettings()
    rate = recipe.optimizer.learning_rate
    factors: dict[str, nn.Parameter] = {}
    groups: list[tuple[tuple[nn.Parameter, ...], float]] = []
    if "unet" in recipe.components:
        names = _targets(model.unet, settings.target_modules, "lora.target_modules", "UNet")
        torch.manual_seed(mix(recipe.seed, 0x10A))
        found = _inject(model.unet, names, settings)
        factors |= {f"unet.{name}": parameter for name, parameter in found.items()}
        groups.append((tuple(found.values()), rate))
    if "conditioner" in recipe.components:
        main = main_conditioner(model.conditioner)
        ends = settings.conditioner_target_modules or _existing(main, _CONDITIONER)
        names = _targets(main, ends, "lora.conditioner_target_modules", "conditioner")
        names = [name for name in names if not name.startswith(tuple(unread))]
        torch.manual_seed(mix(recipe.seed, 0x10B))
        found = _inject(main, names, settings)
        factors |= {f"text_encoder.{name}": parameter for name, parameter in found.items()}
        groups.append((tuple(found.values()), recipe.conditioner_learning_rate or rate))
    # a module's parameters have no dots in their names
    module = nn.ParameterDict({name.replace(".", "/"): p for name, p in factors.items()})

    def export(_: LatentDiffusion, folder: Path) -> None:
        _write(factors, settings.scale, folder)

    return Trained(module, tuple(groups), export)


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, Changeable)]


def _stands_for(end: str, name: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _existing(network: nn.Module, ends: Sequence[str]) -> tuple[str, ...]:
    names = _layers(network)
    return tuple(end for end in ends if any(_stands_for(end, name) for name in names))


def _targets(network: nn.Module, ends: Sequence[str], key: str, what: str) -> list[str]:
    """The layers whose names end so; each end stands for some."""
    names = _layers(network)
    if not ends or not names:
        raise ConfigError(
            f"{key}: the model's {what} has no attention whose projections a LoRA could change;"
            " leave it out of components"
        )
    for end in ends:
        if not any(_stands_for(end, name) for name in names):
            known = {".".join(name.split(".")[-2:]) for name in names}
            told = nearest(end, known)
            raise ConfigError(f"{key}: no layer of the {what} ends in {end!r}; {told}")
    return [name for name in names if any(_stands_for(end, name) for end in ends)]


def _inject(
    network: nn.Module, names: Sequence[str], settings: LoraSettings
) -> dict[str, nn.Parameter]:
    """Let PEFT put its factors beside layers; returns them by their names in its files."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "train", "a LoRA in training") from None
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, names)),
    )
    inject_adapter_in_model(config, network, _ADAPTER)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in network.named_parameters():
        if any(f".{factor}.{_ADAPTER}." in name for factor in _FACTORS):
            parameter.requires_grad_(True)
            found[name.replace(f".{_ADAPTER}.", ".")] = parameter
    return found


@torch.no_grad()
def _write(factors: Mapping[str, nn.Parameter], scale: float, folder: Path) -> None:
    """Write the form of diffusers and PEFT.

    alpha / r is multiplied into B: a reader that knows of no alpha takes it for r, as diffusers
    does where the file says none.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in factors.items():
        factor = parameter.detach().to("cpu", torch.float32)
        tensors[name] = (factor * scale if ".lora_B." in name else factor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{LORA_FILE}.tmp"
    safetensors.torch.save_file(tensors, temporary, {"format": "pt"})
    temporary.replace(folder / LORA_FILE)
