"""The card of a shipped model: right pictures pass, others do not, and all of it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tools.shipped_card import scenes
from tools.shipped_card.__main__ import main
from tools.shipped_card.scoring import Asked, concept_accuracy, portraits_of, recipe_of

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.build import build_conditioner
from mezzotint.conditioning.text import train_tokenizer
from mezzotint.config import to_yaml
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig, portrait_caption
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
)
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.training.recipe import DiffusionRecipe

UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "attention_levels": [False, True],
    "cross_attention_dim": 8,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
}
TEXT = {"kind": "text", "width": 8, "layers": 1, "heads": 2, "max_length": 12, "vocab_size": 128}
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False
)
CONCEPTS = ("red-apple", "fox", "key", "star", "guitar", "bus")


def test_pictures_of_what_was_asked_pass_and_pictures_of_something_else_do_not() -> None:
    data = PortraitsData(PortraitsDataConfig(concepts=CONCEPTS, resolution=32))
    asked = [Asked(k, colour) for k in range(len(CONCEPTS)) for colour in ("white", "blue")]
    asked += [Asked(k, style="noto") for k in range(len(CONCEPTS))]
    right = [data.picture(data.plain(a.label, a.colour, a.style)) for a in asked]
    assert concept_accuracy(data, asked, right) == 1.0
    others = [data.picture(data.plain((a.label + 1) % 6, a.colour, a.style)) for a in asked]
    assert concept_accuracy(data, asked, others) == 0.0


DATA = {"kind": "portraits", "concepts": CONCEPTS, "resolution": 16, "count": 24}


def untrained(models: Path, stage: str, spatial: dict[str, Any] | None, **more: Any) -> Path:
    """Write an untrained model, as it is shipped; f = 2 where it is told a picture."""
    torch.manual_seed(0)
    conditioning = TEXT if spatial is None else {"kind": "hybrid", "main": TEXT, "spatial": spatial}
    first_stage: Any = IdentityFirstStage(IdentityFirstStageConfig())
    told: dict[str, Any] = {"kind": "identity"}
    if spatial is not None:
        first_stage, told = AutoencoderKL(VAE), {"kind": "trained", "path": "autoencoder"}
    unet = UNET | {"in_channels": 3} | more.pop("unet", {})
    recipe = DiffusionRecipe.from_dict(
        {
            "kind": "diffusion",
            "name": "tiny",
            "data": more.pop("data", DATA),
            "first_stage": told,
            "unet": unet,
            "conditioning": conditioning,
            "budget": {"max_steps": 1},
            **more,
        }
    )
    words = train_tokenizer([portrait_caption(name) for name in CONCEPTS], 128)
    model = LatentDiffusion(
        first_stage,
        UNet(UNetConfig.from_dict(unet)),
        build_conditioner(recipe.conditioning, words),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (recipe.data.resolution, recipe.data.resolution),
    )
    folder = models / ("tiny" if spatial is None else f"tiny-{stage}")
    save_model(model, folder, defaults=SamplingDefaults(sampler="ddim", guidance_scale=2.0))
    (folder / f"{stage}.yaml").write_text(to_yaml(recipe))
    piece = {"stage": stage, "start": 0, "end": 7, "seconds": 60.0, "device": "a card"}
    made: dict[str, Any] = {"plan": "tiny-cpu", "stages": [stage]}
    made["pieces"] = [{**piece, "restarted": False}, {**piece, "end": 9, "restarted": True}]
    (folder / "made.json").write_text(json.dumps(made))
    return models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder of an untrained model, as it is shipped."""
    return untrained(tmp_path / "models", "text-to-image", None)


@pytest.mark.parametrize(
    ("stage", "spatial", "channels", "rows"),
    [
        ("inpaint", {"kind": "inpainting"}, 9, ("without a caption", "fill by diffusion of heat")),
        ("upscale", {"kind": "low_res"}, 7, ("PSNR (bicubic), trained", "(bicubic), other emoji")),
    ],
)
def test_other_tasks_are_measured_and_written(
    tmp_path: Path, stage: str, spatial: dict[str, Any], channels: int, rows: tuple[str, ...]
) -> None:
    """An untrained model is worse than what costs nothing, and keeps what is not masked."""
    unet = {"in_channels": channels, "out_channels": 4}
    models = untrained(
        tmp_path, stage, spatial, unet=unet, degradation={"kind": "bicubic", "factor": 2}
    )
    name, docs = f"tiny-{stage}", tmp_path / "docs"
    told = [name, "--models", str(models), "--docs", str(docs), "--pictures", "3"]
    assert main([*told, "--device", "cpu"]) == 0
    card = (models / name / "README.md").read_text()
    assert all(row in card for row in rows)
    assert f"#{card.rstrip()}" in (docs / "shipped.md").read_text()
    numbers = json.loads((docs / f"shipped/{name}.json").read_text())
    if stage == "inpaint":
        assert numbers["changed_outside"] == 0 and numbers["pictures"] == 3
        assert numbers["distance"] > numbers["distance_of_diffusion_fill"] > 0
    else:
        for group in ("trained_emoji", "other_emoji"):
            assert numbers[f"{group}_distance"] > numbers[f"{group}_distance_of_bicubic"] > 0
            # back-projection brings the shrunk picture near the small one all the same
            assert numbers[f"{group}_psnr_of_shrunk"] > numbers[f"{group}_psnr"]
    with Image.open(docs / f"shipped/{name}.webp") as sheet:
        assert sheet.width > 3 * 16


def test_all_is_measured_and_written(models: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    told = ["tiny", "--models", str(models), "--docs", str(docs), "--pictures", "6"]
    assert main([*told, "--device", "cpu"]) == 0
    scores = json.loads((docs / "shipped/tiny.json").read_text())
    assert scores["pictures"] == 6
    # an untrained model draws noise, and an identity keeps every picture
    assert scores["known"] <= 0.5 and scores["psnr"] > 100
    assert scores["nearest_training"] > 2 * scores["nearest_training_of_validation"] > 0
    card = (models / "tiny" / "README.md").read_text()
    assert "9 steps in 2 minutes on a card" in card
    assert "1 of 2 pieces began with averaged float16 weights" in card
    page = (docs / "shipped.md").read_text()
    assert "right concept among 64" in card and f"#{card.rstrip()}" in page
    assert "![drawn](shipped/tiny.webp)" in page
    assert (docs / "shipped/tiny.webp").is_file()


def test_scenes_are_judged_box_by_box(tmp_path: Path) -> None:
    """The scenes themselves are all right and all inside; an untrained model's noise is not."""
    regions = {"kind": "regions", "max_objects": 3}
    data = {"kind": "scenes", "concepts": "well-known", "resolution": 64, "max_objects": 2}
    data |= {"min_size": 0.35, "max_size": 0.5}
    unet = {"in_channels": 7, "out_channels": 4}
    models = untrained(tmp_path, "scenes", regions, unet=unet, data=data)
    docs = tmp_path / "docs"
    told = ["tiny-scenes", "--models", str(models), "--docs", str(docs), "--pictures", "3"]
    assert main([*told, "--device", "cpu"]) == 0
    numbers = json.loads((docs / "shipped/tiny-scenes.json").read_text())
    assert numbers["right"] < 0.7 and numbers["strange_right"] < 0.7
    assert 0.1 < numbers["inside"] < 0.9
    assert "emoji that no scene of training had" in (docs / "shipped.md").read_text()
    held_out = {"split": "validation", "backgrounds": ["plain"], "min_objects": 2, "count": 6}
    real = ScenesData(ScenesDataConfig.from_dict(data | held_out))
    shown = [real.scene(k) for k in range(6)]
    images = [real.load(k).image for k in range(6)]
    assert scenes.right(real, shown, images) > 0.9
    assert scenes.inside(real, shown, images) > 0.99


def test_what_is_held_out_is_what_the_recipe_says(models: Path) -> None:
    trained, held_out = portraits_of(recipe_of(models / "tiny", "text-to-image"))
    assert (trained.config.split, held_out.config.split) == ("train", "validation")
    assert trained.concepts == held_out.concepts


def test_a_model_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emoji", "--models", str(tmp_path)]) == 2
    assert "no such model; train it, then ship it by --ship" in capsys.readouterr().err
