"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a new word, whose vectors are trained."""

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.trained import Trained

__all__ = ["EMBEDDING_FILE", "add_token"]

EMBEDDING_FILE = "learned_embeds.safetensors"


def add_token(model: LatentDiffusion, recipe: FinetuneRecipe) -> Trained:
    """Teach a model, whose weights are frozen, a new word.

    Args:
        model: On its device.
        recipe: Of method ``textual_inversion``.

    Raises:
        ConfigError: If the model has no CLIP text encoder, or the initial words no tokens.
    """
    token, main = recipe.token, main_conditioner(model.conditioner)
    assert token is not None, "the recipe requires it"
    if not isinstance(main, ClipConditioner):
        raise ConfigError(
            "method 'textual_inversion' is for models with a CLIP text encoder; this one wants"
            f" {main.description}: use 'lora' with components: [unet, conditioner]"
        )
    initial = main.vectors_of(token.initial)
    if not len(initial):
        raise ConfigError(f"token.initial {token.initial!r}: the vocabulary has no tokens for it")
    count = token.vectors or len(initial)
    main.add_word(token.word, initial[torch.arange(count) % len(initial)])
    vectors = main.train_word(token.word)

    def export(_: LatentDiffusion, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{EMBEDDING_FILE}.tmp"
        learned = vectors.detach().to("cpu", torch.float32).contiguous()
        safetensors.torch.save_file({token.word: learned}, temporary, {"format": "pt"})
        temporary.replace(folder / EMBEDDING_FILE)

    groups = (((vectors,), recipe.optimizer.learning_rate),)
    return Trained(nn.ParameterDict({"vectors": vectors}), groups, export)
