"""Recipes: every shipped one is valid, and what does not fit together is refused."""

import pytest
import torch

from mezzotint.config import read_yaml, to_yaml
from mezzotint.errors import ConfigError
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.unet import UNet
from mezzotint.training.batches import DataOrder
from mezzotint.training.ema import (
    ConstantEMAConfig,
    InverseGammaEMAConfig,
    PowerEMAConfig,
    WarmupEMAConfig,
)
from mezzotint.training.optimizer import learning_rate_factor
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe, OptimizerConfig
from mezzotint.training.run import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_builds(name, tmp_path):
    recipe = load_recipe(name)
    with torch.device("meta"):
        if isinstance(recipe, AutoencoderRecipe):
            builder = AutoencoderKL if recipe.model.kind == "kl" else VQModel
            parameters = sum(p.numel() for p in builder(recipe.model).parameters())
        elif isinstance(recipe, DiffusionRecipe):
            parameters = sum(p.numel() for p in UNet(recipe.unet).parameters())
        else:  # whose networks are those of a model that it names
            parameters = None
    assert parameters is None or parameters > 1_000_000
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


def test_ema_decay_is_short_for_a_warmed_up_average(tiny):
    short = tiny.diffusion(ema_decay=0.99)
    assert short.average == WarmupEMAConfig(decay=0.99)
    assert tiny.diffusion().average == WarmupEMAConfig(decay=0.9999)
    assert tiny.autoencoder(ema_decay=0.9).average == WarmupEMAConfig(decay=0.9)
    assert tiny.autoencoder().average is None
    # a recipe of before there was ema, as runs have stored it, is the same recipe
    old = short.to_dict()
    assert old.pop("ema") is None and old["ema_decay"] == 0.99
    assert type(short).from_dict(old) == short


@pytest.mark.parametrize("make", ["autoencoder", "diffusion"])
@pytest.mark.parametrize(
    ("ema", "average"),
    [
        ({"kind": "constant", "decay": 0.9}, ConstantEMAConfig(decay=0.9)),
        ({"kind": "inverse_gamma", "power": 0.75}, InverseGammaEMAConfig(power=0.75)),
        ({"kind": "power"}, PowerEMAConfig(sigma_rel=(0.05, 0.10), snapshot_steps=1000)),
    ],
)
def test_every_kind_of_average_is_read_and_written(tiny, make, ema, average):
    recipe = getattr(tiny, make)(ema=ema)
    assert recipe.average == average and recipe.ema_decay is None
    assert type(recipe).from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": {"kind": "power"}, "ema_decay": 0.9}, "ema and ema_decay are both given"),
        ({"ema_decay": None}, "one of ema and ema_decay is required"),
        ({"ema": {"kind": "powr"}}, "'constant', 'warmup', 'inverse_gamma', 'power'"),
        ({"ema": {"kind": "warmup", "dcay": 0.9}}, "'ema.dcay'; did you mean 'decay'"),
        ({"ema": {"kind": "power", "sigma_rel": [0.3]}}, r"ema.sigma_rel.0: .* less than or equal"),
        ({"ema": {"kind": "power", "sigma_rel": [0.1, 0.1]}}, "stands there twice"),
        ({"ema": {"kind": "constant", "decay": 1.0}}, "ema.decay: .* less than 1"),
    ],
)
def test_an_average_that_is_none_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.diffusion(**changes)


def test_a_shipped_recipe_takes_another_average():
    with pytest.raises(ConfigError, match="or set ema_decay to null"):
        load_recipe("emoji-text", ["ema.kind=power"])
    recipe = load_recipe("emoji-text", ["ema.kind=power", "ema_decay=null"])
    assert recipe.average == PowerEMAConfig()
