"""Encoding a recipe's data before anything is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mezzotint.data import open_data
from mezzotint.data.latents import LatentCache
from mezzotint.device import select_device
from mezzotint.errors import ConfigError
from mezzotint.training.caching import open_latent_cache
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.first_stage import stored_first_stage
from mezzotint.training.ranks import join_ranks, rank_device
from mezzotint.training.recipe import AutoencoderRecipe
from mezzotint.training.run import load_recipe

__all__ = ["precompute_latents"]


def precompute_latents(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode the data of a recipe, where `mezzotint.train` will look for it.

    Started by ``torchrun``, the processes share the work.

    Args:
        recipe: A path to one, or the name of a shipped one.
        overrides: Each ``dotted.key=value``.
        output: The run folder; by default ``runs/<name of the recipe>``.
        device: ``auto``, ``cpu``, ``cuda``, …
        on_progress: Called with (views done, views to be encoded), of this process.

    Raises:
        ConfigError: If the recipe is wrong, keeps no latents, or its first stage is not trained.
        DataError: If the data cannot be read.
    """
    wanted = load_recipe(recipe, overrides)
    if isinstance(wanted, AutoencoderRecipe | DecoderRecipe):
        what = "an autoencoder" if wanted.kind == "autoencoder" else "a decoder"
        raise ConfigError(f"{recipe}: trains {what}, which is shown pictures, not latents")
    if isinstance(wanted, FinetuneRecipe | DistillRecipe):
        raise ConfigError(
            f"{recipe}: goes on from a model: such a run encodes its pictures itself when it"
            " starts, with the autoencoder of that"
        )
    if not wanted.latent_variants:
        raise ConfigError(f"{recipe}: latent_variants is 0: nothing is to be kept")
    folder = Path(output) if output is not None else Path("runs") / wanted.name
    found = stored_first_stage(wanted, folder)
    if found is None:
        raise ConfigError(
            f"{recipe}: its first stage is not trained yet; train it by its own recipe, and say"
            " where it is with --set first_stage.recipe=null --set first_stage.path=RUN"
        )
    first_stage, normalization = found
    place = rank_device(select_device(device))
    with join_ranks(place) as ranks:
        return open_latent_cache(
            wanted,
            open_data(wanted.data),
            first_stage.to(place),
            normalization,
            folder,
            place,
            ranks,
            on_progress,
        )
