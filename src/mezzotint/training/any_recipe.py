"""A recipe of any kind."""

from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe

__all__ = ["Recipe"]

Recipe = AutoencoderRecipe | DiffusionRecipe | FinetuneRecipe | DistillRecipe | DecoderRecipe
