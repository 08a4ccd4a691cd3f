"""The card of a shipped model: right pictures pass, others do not, and all of it is written."""

import json
from pathlib import Path

import pytest
import torch
from tools.shipped_card import Asked, concept_accuracy, main, portraits_of

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import save_model
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig, train_tokenizer
from mezzotint.config import to_yaml
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig, portrait_caption
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import IdentityFirstStage, IdentityFirstStageConfig
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
CONCEPTS = ("red-apple", "fox", "key", "star", "guitar", "bus")


def test_pictures_of_what_was_asked_pass_and_pictures_of_something_else_do_not() -> None:
    data = PortraitsData(PortraitsDataConfig(concepts=CONCEPTS, resolution=32))
    asked = [Asked(k, colour) for k in range(len(CONCEPTS)) for colour in ("white", "blue")]
    asked += [Asked(k, style="noto") for k in range(len(CONCEPTS))]
    right = [data.picture(data.plain(a.label, a.colour, a.style)) for a in asked]
    assert concept_accuracy(data, asked, right) == 1.0
    others = [data.picture(data.plain((a.label + 1) % 6, a.colour, a.style)) for a in asked]
    assert concept_accuracy(data, asked, others) == 0.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder of an untrained model, as it is shipped."""
    torch.manual_seed(0)
    recipe = DiffusionRecipe.from_dict(
        {
            "kind": "diffusion",
            "name": "tiny",
            "data": {
                "kind": "portraits",
                "concepts": CONCEPTS,
                "resolution": 16,
                "count": 24,
            },
            "first_stage": {"kind": "identity"},
            "unet": UNET,
            "conditioning": TEXT,
            "budget": {"max_steps": 1},
        }
    )
    captions = [portrait_caption(name) for name in CONCEPTS]
    model = LatentDiffusion(
        IdentityFirstStage(IdentityFirstStageConfig()),
        UNet(UNetConfig.from_dict(UNET)),
        TextConditioner(TextConditionerConfig.from_dict(TEXT), train_tokenizer(captions, 128)),
        ScheduleConfig(),
        LatentNormalization.from_scale_factor(1.0),
        (16, 16),
    )
    folder = tmp_path / "models" / "tiny"
    save_model(model, folder, defaults=SamplingDefaults(sampler="ddim", guidance_scale=2.0))
    (folder / "text-to-image.yaml").write_text(to_yaml(recipe))
    piece = {"stage": "text-to-image", "start": 0, "end": 7, "seconds": 60.0, "device": "a card"}
    made = {"plan": "tiny-cpu", "stages": ["text-to-image"]}
    made["pieces"] = [{**piece, "restarted": False}, {**piece, "end": 9, "restarted": True}]
    (folder / "made.json").write_text(json.dumps(made))
    return tmp_path / "models"


def test_all_is_measured_and_written(models: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    told = ["tiny", "--models", str(models), "--docs", str(docs), "--pictures", "6"]
    assert main([*told, "--device", "cpu"]) == 0
    scores = json.loads((docs / "shipped.json").read_text())
    assert scores["pictures"] == 6
    # an untrained model draws noise, and an identity keeps every picture
    assert scores["known"] <= 0.5 and scores["psnr"] > 100
    assert scores["nearest_training"] > 2 * scores["nearest_training_of_validation"] > 0
    card = (models / "tiny" / "README.md").read_text()
    assert "9 steps in 2 minutes on a card" in card
    assert "1 of 2 pieces began with averaged float16 weights" in card
    assert "right concept among 64" in card and card.rstrip() in (docs / "shipped.md").read_text()
    assert (docs / "shipped.webp").is_file()


def test_what_is_held_out_is_what_the_recipe_says(models: Path) -> None:
    trained, held_out = portraits_of(models / "tiny")
    assert (trained.config.split, held_out.config.split) == ("train", "validation")
    assert trained.concepts == held_out.concepts


def test_a_model_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emoji", "--models", str(tmp_path)]) == 2
    assert "no such model; train it, then ship it by --ship" in capsys.readouterr().err
