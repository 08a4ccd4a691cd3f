"""Training in latent space: every condition, resumption, and what is exported."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from mezzotint.checkpoints.model import load_model
from mezzotint.errors import TrainingError
from mezzotint.generation.pipeline import load
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.recipe import DiffusionRecipe

UNCONDITIONAL = {"conditioning": {"kind": "none"}, "unet__cross_attention_dim": None}


@pytest.mark.parametrize("kind", ["text", "class", "none", "pixels"])
def test_resumed_equals_uninterrupted(tiny, tmp_path, kind):
    changes = {
        "text": {"accumulate": 2},
        "class": {"conditioning": {"kind": "class", "width": 32}},
        "none": {**UNCONDITIONAL, "latent_variants": 0},
        # LDM-1: pixels through the same code
        "pixels": {
            **UNCONDITIONAL,
            "first_stage": {"kind": "identity"},
            "unet__in_channels": 3,
            "unet__out_channels": 3,
            "weighting": "min_snr",
        },
    }[kind]

    def recipe(steps: int) -> DiffusionRecipe:
        return tiny.diffusion(**changes, budget={"max_steps": steps})

    whole = tiny.train(recipe(6), tmp_path / "whole")
    part = tiny.train(recipe(2), tmp_path / "part")
    tiny.train(recipe(6), part, resume=True)
    a, _ = newest_checkpoint(whole / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None and a.step == b.step == 6
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}.{name}"
    # the exported models are the averaged weights of both, and so draw the same
    assert load(whole).model_hash == load(part).model_hash
    # and the weights moved
    assert int(a.tensors["ema"]["updates"]) == 6


def test_another_autoencoder_cannot_continue_a_run(tiny, tmp_path):
    """The same path, retrained in between: other latents, for which the weights are no use."""
    stage = tmp_path / "stage"
    tiny.train(tiny.autoencoder(), stage)
    where = {"first_stage__path": str(stage)}
    run = tiny.train(tiny.diffusion(**where), tmp_path / "run")
    shutil.rmtree(stage)
    tiny.train(tiny.autoencoder(seed=1), stage)
    with pytest.raises(TrainingError, match="the autoencoder.* changed since this checkpoint"):
        tiny.train(tiny.diffusion(**where, budget={"max_steps": 9}), run, resume=True)


def test_the_text_encoder_is_trained_with_the_unet(tiny, text_run, tmp_path):
    longer = tiny.train(tiny.diffusion(budget={"max_steps": 8}), tmp_path / "run")
    short, _ = newest_checkpoint(text_run / "checkpoints")
    later, _ = newest_checkpoint(longer / "checkpoints")
    assert short is not None and later is not None
    name = "conditioner.blocks.0.to_qkv.weight"
    assert not torch.equal(short.tensors["weights"][name], later.tensors["weights"][name])


def test_the_first_stage_is_never_trained(tiny, text_run):
    trained = load_model(text_run / "model").first_stage.state_dict()
    before = tiny.autoencoder_run / "model" / "vae"
    from mezzotint.checkpoints.folder import load_component

    for name, tensor in load_component(before).state_dict().items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.filterwarnings("ignore")
def test_unet_and_autoencoder_load_in_diffusers(text_run):
    model = load_model(text_run / "model").eval()
    unet = UNet2DConditionModel.from_pretrained(text_run / "model" / "unet").eval()
    vae = AutoencoderKL.from_pretrained(text_run / "model" / "vae").eval()
    assert vae.config.scaling_factor == pytest.approx(model.normalization.scale_factor)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        ours, theirs = model.unet(x, t, context=context), unet(x, t, context).sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours, theirs = model.first_stage.decode(x), vae.decode(x).sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_trained_model_learns_its_data(tiny, tmp_path):
    """Overfitting one colour: what is drawn has that colour, so the whole chain fits together."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (32, 32), (200, 40, 60)).save(folder / f"{k}.png")
    recipe = tiny.diffusion(
        **UNCONDITIONAL,
        data={"kind": "folder", "path": str(folder), "resolution": 32},
        first_stage={"kind": "identity"},
        unet__in_channels=3,
        unet__out_channels=3,
        unet__attention_levels=[False, False],
        optimizer={"learning_rate": 3e-3},
        ema_decay=0.9,
        batch_size=8,
        budget={"max_steps": 150},
    )
    run = tiny.train(recipe, tmp_path / "run")
    picture = load(run, precision="float32").generate(steps=10, spacing="trailing")[0].image
    mean = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(-1, 3)
    colour = mean.float().mean(0)
    assert (colour - torch.tensor([200.0, 40.0, 60.0])).abs().max() < 25, colour
