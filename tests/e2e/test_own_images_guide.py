"""What the guide to one's own images tells one to type, typed, with trainings of one step."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.config import to_yaml
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.evaluation.protocol import PROTOCOLS
from mezzotint.training.recipe import DiffusionRecipe

GUIDE = (Path(__file__).parents[2] / "docs/guides/own-images.md").read_text()
STAGE = {"model.block_out_channels": "[16,16,16]", "model.norm_num_groups": 8}
STAGE |= {"loss.perceptual": 0, "precision": "float32"}
UNET = {"unet.block_out_channels": "[32,32,32]", "latent_variants": 1, "sample_steps": 2}
QUICK = {"budget.max_steps": 1, "batch_size": 2, "data.resolution": 32}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guide has it, of noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for name in ("dress", "hat"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    small = PROTOCOLS["small"].model_copy(update={"name": "quick", "network": "random"})
    (tmp_path / "quick.yaml").write_text(to_yaml(small))
    (block,) = blocks("yaml")
    (tmp_path / "captions.yaml").write_text(block)
    return tmp_path / "photos"


def quickened(words: list[str]) -> list[str]:
    if words[0] == "train":
        settings = QUICK | (STAGE if "autoencoder" in words[1] else UNET)
        return [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    if words[0] == "sample":
        return ["--steps", "2"]
    if words[0] == "evaluate" and "autoencoder" not in words[1]:
        return ["--protocol", "quick.yaml", "-n", "20", "--steps", "1"]
    return []


@pytest.mark.filterwarnings("ignore")
def test_its_commands_run(photos: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "mezzotint"
        if words == ["train", "captions.yaml"]:
            rows = [{"file_name": f"dress/{k}.png", "text": "a red dress"} for k in range(12)]
            metadata = "\n".join(json.dumps(row) for row in rows)
            (photos / "train/metadata.jsonl").write_text(metadata)
        done = CliRunner().invoke(app, words + quickened(words))
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
    assert Path("outputs/restored.png").is_file() and Path("outputs/drawn.png").is_file()
    assert len(list(Path("outputs").glob("a-red-dress-*.png"))) == 8
    card = EvaluationCard.read(Path("outputs/folder-class-quick.json"))
    assert card.evaluated.count == 20


def test_its_recipe_is_valid() -> None:
    (block,) = blocks("yaml")
    recipe = DiffusionRecipe.from_dict(yaml.safe_load(block))
    assert recipe.conditioning.kind == "text"
