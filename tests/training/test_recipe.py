"""Recipes: every shipped one is valid, and what does not fit together is refused."""

import pytest
import torch

from mezzotint.config import read_yaml, to_yaml
from mezzotint.errors import ConfigError
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.unet import UNet
from mezzotint.training.batches import DataOrder
from mezzotint.training.optimizer import learning_rate_factor
from mezzotint.training.recipe import AutoencoderRecipe, OptimizerConfig
from mezzotint.training.run import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_builds(name, tmp_path):
    recipe = load_recipe(name)
    with torch.device("meta"):
        if isinstance(recipe, AutoencoderRecipe):
            builder = AutoencoderKL if recipe.model.kind == "kl" else VQModel
            parameters = sum(p.numel() for p in builder(recipe.model).parameters())
        else:
            parameters = sum(p.numel() for p in UNet(recipe.unet).parameters())
    assert parameters > 1_000_000
    assert recipe.name == name
    written = tmp_path / "recipe.yaml"
    written.write_text(to_yaml(recipe))
    assert type(recipe).from_dict(read_yaml(written)) == recipe


def test_overrides_are_checked_with_the_rest():
    with pytest.raises(ConfigError) as error:
        load_recipe("emoji-demo", ["optimizer.learning_rat=1e-4", "unet.block_out_channels=[64]"])
    assert "did you mean 'learning_rate'" in str(error.value)
    assert (
        load_recipe("emoji-demo", ["optimizer.learning_rate=2e-4"]).optimizer.learning_rate == 2e-4
    )


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'emoji-demo'"):
        load_recipe("emoji-dem")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("conditioning.width=64", "cross_attention_dim is 128, but the conditioning gives"),
        ("schedule.prediction_type=epsilon", "zero_terminal_snr"),
        ("first_stage.path=x", "exactly one of recipe and path"),
        ("kind=vae", "did you mean|Choose from"),
    ],
)
def test_what_does_not_fit_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("emoji-demo", [override])


def test_every_image_comes_once_an_epoch_in_another_order():
    order = DataOrder(10, seed=3)
    epochs = [[order.index(10 * epoch + place) for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [DataOrder(10, seed=3).index(k) for k in (25, 4)] == [epochs[2][5], epochs[0][4]]


def test_learning_rate_rises_and_falls():
    config = OptimizerConfig(schedule="cosine", warmup_steps=9)
    assert learning_rate_factor(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor(config, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate_factor(config, 500, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor(config, 999, 1.0) == pytest.approx(0.0)
    constant = OptimizerConfig(schedule="constant")
    assert learning_rate_factor(constant, 999, 0.9) == 1.0


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (64, "patch 64 is larger than data.resolution 32"),
        (18, "patch 18 is not divisible by the autoencoder's f = 4"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(tiny, patch, message):
    with pytest.raises(ConfigError, match=message):
        tiny.autoencoder(patch=patch)
