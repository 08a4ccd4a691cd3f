"""Whether the parts of a diffusion recipe fit one another; its conditioner and vocabulary."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.build import (
    build_conditioner,
    main_config,
    spatial_config,
    with_class_names,
)
from mezzotint.conditioning.spatial import SemanticMapConditionerConfig
from mezzotint.conditioning.text import TextConditionerConfig, train_tokenizer
from mezzotint.data import AnyDataConfig, ShardStream
from mezzotint.errors import ConfigError
from mezzotint.rng import mix
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.initial import vocabulary_of
from mezzotint.training.orders import TrainingData
from mezzotint.training.ranks import Ranks
from mezzotint.training.recipe import DiffusionRecipe

__all__ = ["check_buckets", "check_factor", "check_map", "check_side", "conditioner_of"]

_STREAM_CAPTIONS = 100_000  # from which a vocabulary is learned


def check_factor(recipe: DiffusionRecipe | DecoderRecipe, factor: int) -> None:
    """Raise a ConfigError if images cannot be made f times smaller."""
    if recipe.data.resolution % factor:
        raise ConfigError(
            f"data.resolution {recipe.data.resolution} is not divisible by the first stage's"
            f" f = {factor}"
        )


def check_side(recipe: DecoderRecipe, factor: int) -> None:
    """Raise a ConfigError if the squares that a decoder is trained on cannot be made f smaller."""
    if recipe.side % factor:
        name = "data.resolution" if recipe.patch is None else "patch"
        raise ConfigError(
            f"{name} {recipe.side} is not divisible by the first stage's f = {factor}"
        )


def check_buckets(data: AnyDataConfig, factor: int, levels: int) -> None:
    """Raise a ConfigError if the sides of a bucket cannot be halved as often as they are.

    Args:
        data: Any.
        factor: Of the first stage.
        levels: Of the UNet.
    """
    buckets = getattr(data, "buckets", None)
    needed = factor * 2 ** (levels - 1)
    if buckets is not None and buckets.multiple % needed:
        raise ConfigError(
            f"data.buckets.multiple {buckets.multiple} is not divisible by {needed}: the first"
            f" stage's f = {factor} times what the UNet halves"
        )


def check_map(recipe: DiffusionRecipe, factor: int) -> None:
    """Raise a ConfigError if a semantic map would be of another size than the latents."""
    spatial = spatial_config(recipe.conditioning)
    if isinstance(spatial, SemanticMapConditionerConfig) and 2**spatial.stages != factor:
        raise ConfigError(
            f"the semantic map's stages are {spatial.stages}, which make it"
            f" {2**spatial.stages} times smaller, but the first stage's f is {factor}"
        )


def conditioner_of(
    recipe: DiffusionRecipe, data: TrainingData, folder: Path, ranks: Ranks
) -> Conditioner:
    """Build the conditioner of a recipe, with the classes or the vocabulary of its data.

    Args:
        recipe: Says which.
        data: What it is told of.
        folder: The run folder, in which a vocabulary is kept.
        ranks: This process among the others; the first learns a vocabulary, or takes that of the
            model that the recipe begins from.

    Raises:
        CheckpointError: If there is no such model.
    """
    torch.manual_seed(mix(recipe.seed, 0xC0D))
    config = with_class_names(recipe.conditioning, data.class_names)
    main, tokenizer = main_config(config), None
    if isinstance(main, TextConditionerConfig):
        if ranks.is_first:
            _keep_tokenizer(recipe, data, main.vocab_size, folder / "tokenizer.json")
        ranks.wait()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return build_conditioner(config, tokenizer)


def _keep_tokenizer(
    recipe: DiffusionRecipe, data: TrainingData, vocab_size: int, path: Path
) -> None:
    """Find the vocabulary once and keep it: a resumed run must read the same tokens."""
    if path.is_file():
        return
    temporary = path.with_suffix(".tmp")
    initial = None if recipe.initial is None else Path(recipe.initial).expanduser()
    known = None if initial is None else vocabulary_of(initial)
    tokenizer = known or train_tokenizer(_captions(data), vocab_size)
    tokenizer.save(str(temporary))
    temporary.replace(path)


def _captions(data: TrainingData) -> set[str]:
    """Captions from which a vocabulary is learned, in several wordings."""
    stream = isinstance(data, ShardStream)
    captions = set(data.captions(_STREAM_CAPTIONS)) if stream else set[str]()
    for k in range(0 if stream else len(data)):
        captions.add(data.describe(k).caption or "")
        for variant in range(8):
            generator = torch.Generator().manual_seed(mix(0x70C, k, variant))
            captions.add(data.describe(k, generator).caption or "")
    return captions
