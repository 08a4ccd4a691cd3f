"""Beginning a diffusion model from the weights of another, which may be told less."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mezzotint.checkpoints.load import load_any
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.conditioning.text import TextConditioner
from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import LatentDiffusion, fingerprint

__all__ = ["begin_from", "vocabulary_of"]

_FIRST = "conv_in.weight"  # of the UNet: the one that sees what is concatenated


@torch.no_grad()
def begin_from(model: LatentDiffusion, source: str | Path) -> str:
    """Give a model the weights of another of the same shape and latent space.

    Channels that this one's UNet has more of at its input, because more is concatenated, begin at
    zero, as Stable Diffusion's inpainting model began: at first the model draws as the other does.
    What conditions by cross-attention is taken over with its vocabulary or classes, which must be
    the same, see `vocabulary_of`; what conditions by concatenation is new.

    Args:
        model: What is to be trained.
        source: A run, a model folder or a single file.

    Returns:
        What identifies the other.

    Raises:
        CheckpointError: If there is no model.
        ConfigError: If the two do not fit; it says in what.
    """
    loaded = load_any(source, dtype=torch.float32)
    other = loaded.model
    if _latent_space(other) != _latent_space(model):
        raise ConfigError(
            f"initial: {source} was trained in another latent space; take the first stage that it"
            f" was trained with, with --set first_stage.path={source}"
        )
    unet = dict(other.unet.state_dict())
    wanted, last = model.unet.state_dict()[_FIRST].shape[1], model.unet.config.coordinate_channels
    if (theirs := other.unet.config.coordinate_channels) != last:
        raise ConfigError(
            f"initial: {source} has {theirs} unet.coordinate_channels, and the recipe {last}"
        )
    unet[_FIRST] = _widened(unet[_FIRST], wanted, last)
    _take_over(model.unet, unet, f"initial: the UNet of {source}")
    mine, theirs = main_conditioner(model.conditioner), main_conditioner(other.conditioner)
    if not list(mine.parameters()):
        return loaded.content_hash()
    if type(mine) is not type(theirs) or mine.settings() != theirs.settings():
        raise ConfigError(
            f"initial: {source} is told {theirs.description}, in other words, classes or shape than"
            f" this recipe's model, which wants {mine.description}"
        )
    _take_over(mine, theirs.state_dict(), f"initial: the conditioner of {source}")
    return loaded.content_hash()


def vocabulary_of(source: str | Path) -> Tokenizer | None:
    """Return the vocabulary that a model of captions learned; None if it has none of its own.

    Args:
        source: A run, a model folder or a single file.

    Raises:
        CheckpointError: If there is no model.
    """
    conditioner = main_conditioner(load_any(source, dtype=torch.float32).model.conditioner)
    return conditioner.tokenizer if isinstance(conditioner, TextConditioner) else None


def _latent_space(model: LatentDiffusion) -> str:
    tensors = [
        *model.first_stage.state_dict().items(),
        *model.normalization.state_dict().items(),
    ]
    return fingerprint(tensors)


def _widened(weight: Tensor, channels: int, last: int) -> Tensor:
    """Add input channels of zeros before the last ones, which are of coordinates."""
    more = channels - weight.shape[1]
    if more <= 0:
        return weight
    seen, coordinates = weight.split([weight.shape[1] - last, last], dim=1)
    zeros = weight.new_zeros(len(weight), more, *weight.shape[2:])
    return torch.cat([seen, zeros, coordinates], dim=1)


def _take_over(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    own = module.state_dict()
    wrong = sorted(
        {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape}
        | (own.keys() ^ weights.keys())
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{what} has another shape than the recipe's: {', '.join(wrong[:3])}{more}"
        )
    module.load_state_dict(weights)
