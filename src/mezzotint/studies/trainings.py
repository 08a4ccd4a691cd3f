"""Training what a study compares: once, however often the study is begun."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mezzotint.training.run import train

__all__ = ["train_once"]

_LAST_WRITTEN = ("vae/config.json", "model_index.json")


def train_once(
    recipe: str,
    overrides: Sequence[str],
    run: Path,
    latents: Path,
    device: str,
    console: Console,
) -> None:
    """Train a recipe, go on where that was stopped, or leave what is trained.

    Args:
        recipe: Its name.
        overrides: Each ``dotted.key=value``.
        run: The run folder.
        latents: Where the latents are kept; they go by content, so that models share them.
        device: ``auto``, ``cpu``, ``cuda``, …
        console: Where progress is shown.
    """
    if any((run / "model" / name).is_file() for name in _LAST_WRITTEN):
        return
    latents.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "latents").exists():
        (run / "latents").symlink_to(latents.resolve(), target_is_directory=True)
    resume = (run / "recipe.yaml").is_file()
    train(recipe, overrides, run, resume=resume, device=device, console=console)
