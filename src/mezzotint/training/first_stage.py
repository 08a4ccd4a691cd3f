"""The trained first stage that a recipe names, on the disk."""

from pathlib import Path

from mezzotint.checkpoints.changes import BASE, find_base
from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.folder import read_json
from mezzotint.checkpoints.model import vae_of
from mezzotint.checkpoints.registry import INDEX
from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import FirstStage, LatentNormalization
from mezzotint.models.autoencoder import IdentityFirstStage
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.recipe import DiffusionRecipe, TrainedFirstStage

__all__ = ["stored_first_stage"]


def stored_first_stage(
    recipe: DiffusionRecipe | DecoderRecipe, folder: Path
) -> tuple[FirstStage, LatentNormalization] | None:
    """Load the first stage with the statistics of its latents, if it is trained already.

    Args:
        recipe: Says which.
        folder: The run folder, in which it is if it has a recipe of its own.

    Raises:
        ConfigError: If the recipe gives a path and there is none.
    """
    config = recipe.first_stage
    if not isinstance(config, TrainedFirstStage):
        return IdentityFirstStage(config), LatentNormalization.from_scale_factor(1.0)
    if config.path is not None:
        path = Path(config.path).expanduser()
        for folder in (path, path / "model"):
            if (folder / INDEX).is_file() and BASE in (index := read_json(folder / INDEX)):
                return load_first_stage(vae_of(folder, find_base(index, folder)))
        for candidate in (path, path / "vae", path / "model" / "vae"):
            if (candidate / "config.json").is_file():
                return load_first_stage(candidate)
        raise ConfigError(
            f"first_stage.path: {path}: no autoencoder here; expected a finished autoencoder run,"
            " a model folder or a component folder with config.json"
        )
    stage = folder / "first_stage" / "model" / "vae"
    return load_first_stage(stage) if (stage / "config.json").is_file() else None
