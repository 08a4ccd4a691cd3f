"""The latents of a recipe's data and what is said of them, encoded before training or by it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mezzotint.conditioning.base import Conditioner
from mezzotint.data.base import ImageData
from mezzotint.data.latents import LatentCache, build_latent_cache
from mezzotint.data.texts import TextCache, build_text_cache
from mezzotint.latent_diffusion import FirstStage, LatentNormalization
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.ranks import Ranks
from mezzotint.training.recipe import DiffusionRecipe

__all__ = ["Encode", "cache_folder", "cache_sentences", "open_latent_cache", "open_text_cache"]

Encode = Callable[[ImageData, FirstStage, LatentNormalization], LatentCache | None]
"""From data, first stage and statistics to the cache of latents, or to none if none is wanted."""


def cache_folder(recipe: DiffusionRecipe | FinetuneRecipe | DistillRecipe, folder: Path) -> Path:
    """Return where a recipe keeps its latents, and its texts beside them.

    Args:
        recipe: Of a diffusion model.
        folder: The run folder.
    """
    if recipe.latent_cache is None:
        return folder / "latents"
    return Path(recipe.latent_cache).expanduser()


def open_latent_cache(
    recipe: DiffusionRecipe | FinetuneRecipe | DistillRecipe,
    data: ImageData,
    first_stage: FirstStage,
    normalization: LatentNormalization,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode what a recipe's data need, each process its share, and open the cache.

    Args:
        recipe: Says how many views, and where they are kept.
        data: The images.
        first_stage: Encodes.
        normalization: The statistics of its latents.
        folder: The run folder.
        device: Where to encode.
        ranks: This process among the others.
        on_progress: Called with (views done, views to be encoded), of this process.
    """
    return build_latent_cache(
        data,
        first_stage,
        variants=recipe.latent_variants,
        seed=recipe.seed,
        folder=cache_folder(recipe, folder),
        device=device,
        normalization=normalization,
        dtype=_dtype(recipe),
        peers=ranks,
        on_progress=on_progress,
    )


def open_text_cache(
    recipe: FinetuneRecipe | DistillRecipe,
    captions: Sequence[str],
    encoder: Conditioner,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
) -> TextCache:
    """Encode what a recipe's data can say, each process its share, and open the cache.

    Args:
        recipe: Says where the texts are kept.
        captions: See `mezzotint.data.texts.all_captions`.
        encoder: A text encoder that is not trained.
        folder: The run folder.
        device: Where to encode.
        ranks: This process among the others.
    """
    where = cache_folder(recipe, folder)
    return build_text_cache(
        captions, encoder, folder=where, device=device, dtype=_dtype(recipe), peers=ranks
    )


def _dtype(recipe: DiffusionRecipe | FinetuneRecipe | DistillRecipe) -> torch.dtype:
    return torch.float16 if recipe.latent_precision == "float16" else torch.float32


def cache_sentences(cache: LatentCache | TextCache) -> list[str]:
    """Return what is to be said of a cache that was opened."""
    report, texts = cache.report, isinstance(cache, TextCache)
    what, each = ("texts", "captions") if texts else ("latents", "views")
    told = [f"damaged {what} are encoded anew: {reason}" for reason in report.damaged]
    told.append(f"{report.encoded:,} {each} encoded, {report.kept:,} found in the cache")
    if report.unused and not texts:  # of texts a folder may hold those of every run
        told.append(f"{report.unused:,} latents there are of no use to this recipe")
    return told
