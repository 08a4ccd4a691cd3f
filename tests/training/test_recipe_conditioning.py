"""Recipes of every condition: what fits is taken, and what does not is said."""

import pytest

import mezzotint
from mezzotint.conditioning.bert import BertTextConditioner
from mezzotint.config import to_yaml
from mezzotint.errors import ConfigError
from mezzotint.training.recipe import DiffusionRecipe

TEXT = {"kind": "text", "width": 32, "layers": 1, "heads": 2}
SPATIAL = {"semantic_map": 3, "low_res": 3, "inpainting": 5}


@pytest.mark.parametrize(("kind", "extra"), SPATIAL.items())
def test_a_picture_adds_its_channels(tiny, kind, extra):
    spatial = {"kind": kind}
    alone = tiny.diffusion(
        conditioning=spatial, unet__cross_attention_dim=None, unet__in_channels=4 + extra
    )
    assert alone.conditioning.kind == kind
    both = tiny.diffusion(
        conditioning={"kind": "hybrid", "main": TEXT, "spatial": spatial},
        unet__in_channels=4 + extra,
    )
    assert both.conditioning.main.width == 32
    for recipe in (alone, both):
        assert DiffusionRecipe.from_dict(recipe.to_dict()) == recipe
        assert f"kind: {kind}" in to_yaml(recipe)


@pytest.mark.parametrize("kind", ["bert", "class", "layout"])
def test_tokens_of_every_kind_are_attended_to(tiny, kind):
    assert tiny.diffusion(conditioning={"kind": kind, "width": 32}).conditioning.kind == kind
    message = "cross_attention_dim is 32, but the conditioning gives tokens of width 48"
    with pytest.raises(ConfigError, match=message):
        tiny.diffusion(conditioning={"kind": kind, "width": 48})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning": {"kind": "none"}},
            "cross_attention_dim is 32, but the conditioning gives no tokens",
        ),
        (
            {"unet__cross_attention_dim": None},
            "cross_attention_dim is null, but the conditioning gives tokens of width 32",
        ),
        ({"unet__in_channels": 5}, "in_channels is 5; expected 4: 4 of the noisy latent"),
        (
            {
                "conditioning": {"kind": "low_res"},
                "unet__cross_attention_dim": None,
            },
            r"in_channels is 4; expected 7: 4 of the noisy latent \(unet.out_channels\) and 3 that"
            " conditioning 'low_res' concatenates",
        ),
        (
            {
                "conditioning": {"kind": "hybrid", "main": TEXT, "spatial": {"kind": "low_res"}},
                "conditioning__spatial__channels": 1,
            },
            "conditioning.spatial.channels must be 3: the data are RGB images",
        ),
        (
            {
                "conditioning": {"kind": "inpainting", "latent_channels": 3},
                "unet__cross_attention_dim": None,
                "unet__in_channels": 8,
            },
            "conditioning.latent_channels is 3, but the latents have 4 channels",
        ),
        ({"first_stage": {"kind": "identity"}}, "out_channels is 4, but an identity first stage"),
        ({"unet__vector_dim": 7}, "unet.vector_dim must be null"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.diffusion(**changes)


def test_a_map_of_another_size_than_the_latents_is_refused(tiny, tmp_path):
    recipe = tiny.diffusion(
        data={"kind": "scenes", "count": 8},
        conditioning={"kind": "semantic_map", "stages": 3},
        unet__cross_attention_dim=None,
        unet__in_channels=7,
    )
    with pytest.raises(ConfigError, match="8 times smaller, but the first stage's f is 4"):
        tiny.train(recipe, tmp_path / "run")


def test_the_paper_s_text_encoder_is_trained_with_the_unet(tiny, tmp_path):
    bert = {"kind": "bert", "width": 32, "layers": 1, "heads": 2, "head_dim": 8, "ffn_dim": 32}
    run = tiny.train(
        tiny.diffusion(conditioning=bert, budget__max_steps=1, latent_variants=1), tmp_path / "run"
    )
    conditioner = mezzotint.load(run / "model", device="cpu").model.conditioner
    assert isinstance(conditioner, BertTextConditioner)
    assert conditioner.config.width == 32
    assert not (run / "tokenizer.json").exists()
