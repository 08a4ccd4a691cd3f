"""What the guide to conditions tells one to type, typed, with trainings of one step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from mezzotint.conditioning.build import ConditioningConfig
from mezzotint.data import DataConfig
from mezzotint.data.degradation import DegradationConfig
from mezzotint.data.masks import MaskConfig
from mezzotint.training.run import recipe_names

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "conditions.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")
QUICK = "--set budget.max_minutes=0.001 --set data.count=16 --set sample_steps=2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_its_commands_run(tmp_path: Path) -> None:
    (layout,) = blocks("json")
    assert len(json.loads(layout)) == 2
    (tmp_path / "layout.json").write_text(layout)
    Image.effect_noise((161, 127), 60).convert("RGB").save(tmp_path / "photo.png")
    train, enlarge = (block.splitlines() for block in blocks("sh"))
    name = "emoji-super-resolution-x2"  # which the second block takes for granted
    commands = [*train, train[1].replace("emoji-layout", name), *enlarge]
    for command in commands:
        line = command.replace("mezzotint", str(MEZZOTINT), 1)
        if " train " in line:
            line += QUICK if "autoencoder" not in line.split()[2] else QUICK.rpartition("--set")[0]
            line = line.replace("--set", " --set")
        else:
            line += f" --steps 2 --output {Path(command.split()[2]).name}.png"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    with Image.open(tmp_path / f"{name}.png") as drawn:
        assert drawn.size == (322, 254)
    line = f"{MEZZOTINT} sample runs/emoji-layout --low-res photo.png"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "wants a layout" in done.stderr


def test_its_configurations_are_valid() -> None:
    (block,) = blocks("yaml")
    lines = [yaml.safe_load(line) for line in block.splitlines()]
    data = TypeAdapter(DataConfig)
    assert [data.validate_python(line["data"]).kind for line in lines if "data" in line] == [
        "coco",
        "maps",
        "folder",
    ]
    given = {key: value for line in lines for key, value in line.items()}
    DegradationConfig.from_dict(given["degradation"])
    MaskConfig.from_dict(given["masks"])


def test_its_table_names_every_conditioning_and_recipes_that_are_shipped() -> None:
    rows = re.findall(r"^\| (`.*?) \|.*?\|(.*?)\|", GUIDE, flags=re.MULTILINE)
    kinds = {kind for row in rows for kind in re.findall(r"`(\w+)`", row[0])}
    recipes = {name for row in rows for name in re.findall(r"`(emoji-[\w-]+)`", row[1])}
    schema = TypeAdapter(ConditioningConfig).json_schema()
    assert kinds == set(schema["discriminator"]["mapping"])
    assert recipes and recipes <= set(recipe_names())


@pytest.mark.parametrize("option", ["--class", "--layout", "--map", "--low-res", "--image"])
def test_its_options_are_those_of_sample(option: str) -> None:
    from typer.main import get_command

    from mezzotint.cli.main import app

    sample = get_command(app).commands["sample"]
    assert f"`{option}" in GUIDE
    assert option in {name for p in sample.params for name in p.opts}
