"""Latents encoded before training are those that training finds."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from mezzotint.cli.data import app
from mezzotint.errors import ConfigError
from mezzotint.training.precompute import precompute_latents


@pytest.fixture
def recipe(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(6):
        Image.new("RGB", (40, 32), (40 * k, 9, 90)).save(folder / f"{k}.png")
    return tiny.write(
        tmp_path / "recipe.yaml",
        "diffusion",
        data={"kind": "folder", "path": str(folder), "resolution": 32, "flip": True},
        conditioning={"kind": "none"},
        unet__cross_attention_dim=None,
        budget={"max_steps": 1},
    )


def test_training_finds_what_was_encoded_before(tiny, recipe, tmp_path):
    from mezzotint.training.run import load_recipe

    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["cache", str(recipe), "-o", str(run), "--device", "cpu"])
    assert done.exit_code == 0 and done.stdout.startswith("12 views encoded, 0 found in the cache")
    assert "views a second" in done.stdout
    tiny.train(load_recipe(recipe), run, device="cpu")
    assert "0 views encoded, 12 found in the cache" in (run / "log.txt").read_text()


def test_runs_may_share_a_folder_that_is_pruned(recipe, tmp_path):
    shared = ["--set", f"latent_cache={tmp_path / 'shared'}", "--device", "cpu"]
    call = CliRunner().invoke
    call(app, ["cache", str(recipe), *shared, "-o", str(tmp_path / "a")])
    done = call(app, ["cache", str(recipe), *shared, "-o", str(tmp_path / "b")])
    assert done.stdout == "0 views encoded, 12 found in the cache\n"
    more = [*shared, "--set", "data.resolution=16", "--prune"]
    done = call(app, ["cache", str(recipe), *more])
    assert "12 latents there are of no use to this recipe" in done.stdout
    assert "\n1 shards deleted, 0.0" in done.stdout
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_what_keeps_no_latents_is_told(tiny, recipe, tmp_path):
    with pytest.raises(ConfigError, match="latent_variants is 0"):
        precompute_latents(recipe, ["latent_variants=0"])
    with pytest.raises(ConfigError, match="its first stage is not trained yet"):
        first = ["first_stage.path=null", "first_stage.recipe=folder-autoencoder"]
        precompute_latents(recipe, first, tmp_path / "run")
    other = tiny.write(tmp_path / "other.yaml", "autoencoder")
    with pytest.raises(ConfigError, match="trains an autoencoder"):
        precompute_latents(other)
    with pytest.raises(ConfigError, match="such a run encodes its pictures itself"):
        precompute_latents("finetune-lora")
