"""What the README and the guides tell a newcomer to type, typed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from tiny_models import build

from mezzotint.checkpoints.families import FAMILIES
from mezzotint.checkpoints.pipelines import PIPELINES
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.cli.main import app
from mezzotint.config import to_yaml
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.evaluation.protocol import PROTOCOLS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURING = (ROOT / "docs" / "guides" / "measuring.md").read_text()
CHECKPOINTS = (ROOT / "docs" / "guides" / "checkpoints.md").read_text()
GUIDANCE = (ROOT / "docs" / "guides" / "guidance.md").read_text()
MEZZOTINT = Path(sys.executable).with_name("mezzotint")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_block_runs(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(text_run)
    (block,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102
    assert len(namespace["images"]) == 4


def test_the_drawing_commands_run(text_run, tmp_path):
    (tmp_path / "emoji").symlink_to(text_run)
    Image.effect_noise((8, 8), 50).convert("RGB").save(tmp_path / "small.png")
    lines = [
        line.partition("#")[0].strip()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith(("mezzotint sample emoji", "mezzotint replay", "mezzotint doctor"))
    ]
    assert len(lines) >= 4
    lines.sort(key=lambda line: "replay" in line)  # after what it draws again
    for line in lines:
        command = line.replace("mezzotint", str(MEZZOTINT), 1)
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True)


def test_every_recipe_that_it_names_is_shipped():
    from mezzotint.training.run import recipe_names

    named = {w for b in blocks("sh") for w in re.findall(r"mezzotint train ([\w-]+)", b)}
    assert named and named <= set(recipe_names())


@pytest.fixture
def measured(text_run, tiny, tmp_path, monkeypatch):
    """A folder with what the guide names, and the protocol small on a quick network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "emoji").symlink_to(text_run)
    (tmp_path / "runs" / "folder-autoencoder").symlink_to(tiny.autoencoder_run)
    rng = np.random.default_rng(0)
    for name, count in (("outputs/drawn", 30), ("photos/train", 30), ("photos/test", 4)):
        (tmp_path / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    small = PROTOCOLS["small"].model_copy(update={"name": "quick", "network": "random"})
    (tmp_path / "quick.yaml").write_text(to_yaml(small))
    return tmp_path


def test_the_guides_evaluations_run(measured):
    commands = [c for b in blocks("sh", MEASURING) for c in b.replace("\\\n", "").splitlines()]
    evaluations = [c for c in commands if c.startswith("mezzotint evaluate")]
    quick = [c for c in evaluations if "--weights" not in c]  # those are not shipped
    assert len(quick) == len(evaluations) - 1 == 4
    for line in quick:
        command = line.replace("mezzotint", str(MEZZOTINT), 1)
        if "autoencoder" not in line:
            command += " --protocol quick.yaml"
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    card = EvaluationCard.read(Path("outputs/emoji.json"))
    assert card.evaluated.count == 96 and "retrieval_random" in card.numbers
    assert EvaluationCard.read(Path("outputs/folder-autoencoder-reconstruction.json")).numbers
    assert Path("outputs/restored.png").is_file()
    assert list(Path("cache/mezzotint/evaluations").iterdir()) == []


def test_the_guides_other_commands_are_there():
    lines = [c for b in blocks("sh", MEASURING) for c in b.splitlines() if "mezzotint study" in c]
    assert len(lines) == 2
    study = typer.main.get_command(app).commands["study"]
    for line in lines:
        _, _, name, *words = line.split()
        known = {option for p in study.commands[name].params for option in p.opts}
        assert {w for w in words if w.startswith("--")} <= known


def test_the_guides_python_block_runs(measured):
    (block,) = blocks("python", MEASURING)
    namespace: dict[str, object] = {}
    exec(compile(block, "measuring.md", "exec"), namespace)  # noqa: S102
    assert namespace["card"].evaluated.count == 24


def test_the_guide_names_every_protocol():
    assert re.findall(r"^\| `([\w-]+)` \|", MEASURING, flags=re.MULTILINE) == list(PROTOCOLS)


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A folder with what the guide to public checkpoints names, the model a tiny one."""
    monkeypatch.chdir(tmp_path)
    model = build("sd1")
    model.image_size = (64, 64)
    save_single_file(model, Path("v1-5.safetensors"))
    for name in ("sketch", "room", "field"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(f"{name}.png")
    table = Image.new("L", (64, 64))
    table.paste(255, (16, 16, 48, 48))
    table.save("table.png")
    Path("adapters").mkdir()
    Path("words").mkdir()
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = model.unet.config.block_out_channels[-1]
    lora = {
        f"{layer}.lora_down.weight": torch.randn(2, width),
        f"{layer}.lora_up.weight": torch.randn(width, 2),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    save_file(lora, "adapters/ink.safetensors")
    vectors = torch.randn(2, model.conditioner.config.hidden_size)
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}}, "words/my-style.pt"
    )
    return tmp_path


def test_the_guide_to_checkpoints_runs(public):
    lines = [c for b in blocks("sh", CHECKPOINTS) for c in b.splitlines() if c]
    assert len(lines) >= 10 and all(line.startswith("mezzotint ") for line in lines)
    for line in lines:
        command = line.partition(" # ")[0].strip().replace("mezzotint", str(MEZZOTINT), 1)
        if " sample " in command:
            command += " --steps 2 --precision float32"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    (block,) = blocks("python", CHECKPOINTS)
    block = block.replace("steps=25", "steps=2")
    exec(compile(block, "checkpoints.md", "exec"), {})  # noqa: S102
    assert Path("apple.png").is_file()


def test_the_guide_names_every_family_and_pipeline():
    assert all(f"`{name}`" in CHECKPOINTS for name in FAMILIES)
    shipped = {name for name in PIPELINES if not name.endswith(("Img2ImgPipeline", "Legacy"))}
    assert all(name in CHECKPOINTS for name in shipped if "Inpaint" not in name)


def test_the_guide_to_guidance_runs(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(text_run)
    apple = Image.effect_noise((32, 32), 50).convert("RGB")
    apple.save("apple.png")
    apple.resize((8, 8), Image.Resampling.BOX).save("small.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save("mask.png")
    lines = [c for b in blocks("sh", GUIDANCE) for c in b.splitlines()]
    assert len(lines) == 4
    for line in lines:
        command = line.partition(" # ")[0].strip().replace("mezzotint", str(MEZZOTINT), 1)
        subprocess.run(["sh", "-c", f"{command} --steps 3"], check=True, capture_output=True)
    (block,) = blocks("python", GUIDANCE)
    exec(compile(block, "guidance.md", "exec"), {})  # noqa: S102
    assert Path("symmetric.png").is_file()
