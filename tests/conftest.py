"""Small trained models that several tests share."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

# tiny networks: threads would spend more time waiting for one another than computing. Set before
# torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from rich.console import Console

from mezzotint.training.any_recipe import Recipe
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.distill_recipe import DistillRecipe
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe
from mezzotint.training.run import train

AUTOENCODER: dict[str, Any] = {
    "kind": "autoencoder",
    "name": "tiny-autoencoder",
    "data": {"kind": "emoji", "subset": "demo-48", "resolution": 32},
    "model": {
        "kind": "kl",
        "block_out_channels": [16, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_attention": False,
    },
    "loss": {"perceptual": 0.0, "adversarial": None},
    "precision": "float32",
    "batch_size": 4,
    "budget": {"max_steps": 4},
}

DIFFUSION: dict[str, Any] = {
    "kind": "diffusion",
    "name": "tiny-diffusion",
    "data": {"kind": "emoji", "subset": "demo-48", "resolution": 32},
    "first_stage": {"kind": "trained", "path": "set by the test"},
    "unet": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_levels": [False, True],
        "cross_attention_dim": 32,
        "num_attention_heads": 2,
        "norm_num_groups": 8,
    },
    "conditioning": {"kind": "text", "width": 32, "layers": 1, "heads": 2, "max_length": 12},
    "schedule": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "precision": "float32",
    "latent_variants": 2,
    "batch_size": 4,
    "sample_steps": 2,
    "budget": {"max_steps": 4},
}

FINETUNE: dict[str, Any] = {
    "kind": "finetune",
    "name": "tiny-finetune",
    "base": "set by the test",
    "data": {"kind": "emoji", "style": "noto", "subset": "demo-48", "resolution": 32},
    "precision": "float32",
    "batch_size": 4,
    "sample_steps": 2,
    "optimizer": {"learning_rate": 1e-2},
    "budget": {"max_steps": 3},
}

DISTILL: dict[str, Any] = {
    "kind": "distill",
    "name": "tiny-student",
    "teacher": "set by the test",
    "data": {"kind": "emoji", "subset": "demo-48", "resolution": 32},
    "guidance_range": [1.0, 5.0],
    "guidance_scale": 3.0,
    "guidance_embed_dim": 16,
    "precision": "float32",
    "batch_size": 4,
    "optimizer": {"learning_rate": 1e-2},
    "budget": {"max_steps": 3},
}

DECODER: dict[str, Any] = {
    "kind": "decoder",
    "name": "tiny-decoder",
    "first_stage": {"kind": "trained", "path": "set by the test"},
    "data": {"kind": "emoji", "subset": "demo-48", "resolution": 32},
    "width": 16,
    "blocks": 1,
    "loss": {"perceptual": 0.0},
    "precision": "float32",
    "batch_size": 4,
    "optimizer": {"learning_rate": 1e-2},
    "budget": {"max_steps": 3},
}

QUIET = Console(quiet=True)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Plain values with dotted keys set; ``None`` is a value."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return result


class Tiny:
    """Builds, writes and trains recipes that take seconds."""

    def __init__(self, autoencoder_run: Path | None = None) -> None:
        self.autoencoder_run = autoencoder_run

    def autoencoder(self, **changes: Any) -> AutoencoderRecipe:
        return AutoencoderRecipe.from_dict(merged(AUTOENCODER, _dotted(changes)))

    def diffusion(self, **changes: Any) -> DiffusionRecipe:
        return DiffusionRecipe.from_dict(self._diffusion(changes))

    def finetune(self, base: Path, **changes: Any) -> FinetuneRecipe:
        return FinetuneRecipe.from_dict(merged(FINETUNE, {"base": str(base)} | _dotted(changes)))

    def distill(self, teacher: Path, **changes: Any) -> DistillRecipe:
        where = {"teacher": str(teacher)}
        return DistillRecipe.from_dict(merged(DISTILL, where | _dotted(changes)))

    def decoder(self, **changes: Any) -> DecoderRecipe:
        return DecoderRecipe.from_dict(self._decoder(changes))

    def _decoder(self, changes: dict[str, Any]) -> dict[str, Any]:
        where = {"first_stage.path": str(self.autoencoder_run)}
        return merged(DECODER, where | _dotted(changes))

    def _diffusion(self, changes: dict[str, Any]) -> dict[str, Any]:
        where = {"first_stage.path": str(self.autoencoder_run)}
        return merged(DIFFUSION, where | _dotted(changes))

    def write(self, path: Path, kind: str, **changes: Any) -> Path:
        """Write a recipe as a YAML file."""
        if kind == "autoencoder":
            data = merged(AUTOENCODER, _dotted(changes))
        elif kind == "decoder":
            data = self._decoder(changes)
        else:
            data = self._diffusion(changes)
        path.write_text(yaml.safe_dump(data))
        return path

    def train(self, recipe: Recipe, folder: Path, **options: Any):
        return train(recipe, output=folder, console=QUIET, **options)


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Recipes around a tiny trained autoencoder."""
    run = tmp_path_factory.mktemp("autoencoder") / "run"
    maker = Tiny()
    maker.train(maker.autoencoder(), run)
    return Tiny(run)


@pytest.fixture(scope="session")
def text_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny text-conditional model."""
    return tiny.train(tiny.diffusion(), tmp_path_factory.mktemp("text") / "run")


@pytest.fixture(scope="session")
def class_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny class-conditional model."""
    recipe = tiny.diffusion(conditioning={"kind": "class", "width": 32})
    return tiny.train(recipe, tmp_path_factory.mktemp("class") / "run")


@pytest.fixture
def free_port() -> int:
    """A port on this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
