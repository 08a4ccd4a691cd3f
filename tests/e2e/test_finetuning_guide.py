"""What the guide to fine-tuning tells one to type, typed, with trainings of one step."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_pipelines import clip, kl, model
from typer.testing import CliRunner

from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.cli.main import app
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.run import load_recipe, recipe_names

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "finetuning.md").read_text()
QUICK = {"budget.max_steps": 1, "sample_steps": 2, "data.resolution": 32, "latent_variants": 1}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_its_commands_run(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/emoji-text").symlink_to(text_run)
    torch.manual_seed(0)
    save_pipeline(model(clip(), kl(), size=(32, 32)), Path("stable-diffusion"))
    Path("photos").mkdir()
    rows: list[str] = []
    for k in range(3):
        Image.effect_noise((40, 40), 60).convert("RGB").save(f"photos/{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"photo {k}"}))
    Path("photos/metadata.jsonl").write_text("\n".join(rows))
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 7
    for line in commands:
        words = shlex.split(line)
        assert words.pop(0) == "mezzotint"
        if words[0] == "train":
            quick = QUICK | ({"prior.count": 2, "prior.steps": 2} if "dream" in line else {})
            words += [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
        else:
            words += ["--steps", "2", "--output", "drawn.png"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
    (block,) = blocks("python")
    exec(compile(block, "finetuning.md", "exec"), {})  # noqa: S102


def test_its_recipes_and_configurations_are_valid() -> None:
    named = set(re.findall(r"`((?:finetune|emoji-noto)-[\w-]+)`", GUIDE))
    assert len(named) == 4 and named <= set(recipe_names())
    (block,) = blocks("yaml")
    recipe = load_recipe("finetune-lora")
    FinetuneRecipe.from_dict(recipe.to_dict() | yaml.safe_load(block))
