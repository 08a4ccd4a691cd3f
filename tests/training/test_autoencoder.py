"""The first stage's training step: its phases, its quantiser, its resumption."""

import pytest
import torch

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.data import open_data
from mezzotint.device import select_device, select_precision
from mezzotint.errors import TrainingError
from mezzotint.models.autoencoder import VQModel
from mezzotint.models.discriminator import adaptive_weight
from mezzotint.training.autoencoder import AutoencoderTask
from mezzotint.training.checkpoint import newest_checkpoint

VQ = {
    "kind": "vq",
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_attention": False,
    "codebook_size": 64,
    "embedding_dim": 4,
}
ADVERSARY = {
    "start_step": 4,
    "pretrain_steps": 2,
    "discriminator": {"channels": 16, "layers": 2},
}


def task_for(recipe) -> AutoencoderTask:
    execution = select_precision(recipe.precision, select_device("cpu"))
    return AutoencoderTask(recipe, open_data(recipe.data), execution)


def test_the_discriminator_learns_before_the_generator_sees_it(tiny):
    task = task_for(tiny.autoencoder(loss__adversarial=ADVERSARY))
    assert task.adversary is not None
    moved, spoke = [], []
    for step in range(6):
        before = [p.detach().clone() for p in task.adversary.network.parameters()]
        values = task.train_step(step, 0.0)
        after = list(task.adversary.network.parameters())
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        spoke.append("adversarial" in values)
    task.batches.close()
    assert moved == [False, False, True, True, True, True]
    assert spoke == [False, False, False, False, True, True]


def test_the_generator_loss_moves_only_the_autoencoder(tiny):
    """The discriminator's gradient comes from its own loss alone."""
    adversary = {**ADVERSARY, "start_step": 0, "pretrain_steps": 0}
    task = task_for(tiny.autoencoder(loss__adversarial=adversary))
    assert task.adversary is not None
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    task._backward(images, [0, 1, 2, 3], 0, last=True)
    assert all(p.grad is None for p in task.adversary.network.parameters())
    assert task.model.last_layer.grad is not None


def test_accumulated_gradients_equal_those_of_the_whole_batch(tiny):
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        task = task_for(tiny.autoencoder(batch_size=batch_size, accumulate=accumulate))
        task.train_step(0, 0.0)
        task.batches.close()
        results.append(torch.cat([p.flatten() for p in task.model.parameters()]).detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-6)


def test_codes_are_counted_over_an_epoch_and_dead_ones_reseeded(tiny):
    task = task_for(tiny.autoencoder(model=VQ, batch_size=16, ema={"kind": "power"}))
    assert isinstance(task.model, VQModel)
    with torch.no_grad():
        task.model.quantize.embedding.weight[32:] = 1e3  # nobody will choose these
    seen = [task.train_step(step, 0.0) for step in range(3)]  # 48 images: one epoch
    task.batches.close()
    assert ["code_usage" in values for values in seen] == [False, False, True]
    assert 0 < float(seen[2]["code_usage"]) <= 0.5
    assert task.model.quantize.usage.sum() == 0
    assert task.model.quantize.embedding.weight.abs().max() < 100
    # no average holds what the dead ones were
    assert task.ema is not None and task.ema.overwritten == {"quantize.embedding.weight": 3}
    for average in task.ema.averages:
        assert average["quantize.embedding.weight"].abs().max() < 100


@pytest.mark.parametrize("model", ["kl", "kl channels last", "vq"])
def test_resumed_equals_uninterrupted(tiny, tmp_path, model):
    average = {"ema": {"kind": "power"}} if model == "vq" else {"ema_decay": 0.9}
    changes = {"loss__adversarial": ADVERSARY, **average}
    if model.endswith("last"):
        changes["channels_last"] = True
    if model == "vq":
        changes["model"] = VQ
    whole = tiny.train(tiny.autoencoder(**changes, budget={"max_steps": 15}), tmp_path / "whole")
    part = tmp_path / "part"
    tiny.train(tiny.autoencoder(**changes, budget={"max_steps": 5}), part)
    tiny.train(tiny.autoencoder(**changes, budget={"max_steps": 15}), part, resume=True)
    a, _ = newest_checkpoint(whole / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None and a.step == b.step == 15
    assert a.tensors.keys() == b.tensors.keys()
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}.{name}"


@pytest.mark.parametrize("normalization", ["scalar", "channel"])
def test_exported_latents_have_unit_variance_over_the_data(tiny, tmp_path, normalization):
    recipe = tiny.autoencoder(normalization=normalization, loss__kl=0.0)
    run = tiny.train(recipe, tmp_path / "run")
    first_stage, measured = load_first_stage(run / "model" / "vae")
    data = open_data(recipe.data)
    images = torch.stack([data.load(k).image for k in range(len(data))]).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = measured.normalize(first_stage.encode(images).sample(generator))
        restored = first_stage.decode(measured.denormalize(z))
    if normalization == "channel":
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.06, rtol=0)
        torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.06, rtol=0)
    else:
        torch.testing.assert_close(z.std(), torch.tensor(1.0), atol=0.06, rtol=0)
    # folding the statistics into the convolutions must leave encode-decode as it was
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    raw = task_for(recipe).model
    raw.load_state_dict(checkpoint.tensors["autoencoder"])
    with torch.no_grad():
        raw_z = raw.encode(images)
        same = raw.decode(raw_z.mode())
        folded = first_stage.decode(first_stage.encode(images).mode())
    torch.testing.assert_close(folded, same, rtol=1e-3, atol=1e-4)
    assert restored.shape == images.shape


def test_patches_are_squares_of_the_images_and_the_same_again(tiny):
    data = open_data(tiny.autoencoder().data)
    execution = select_precision("float32", select_device("cpu"))
    whole = AutoencoderTask(tiny.autoencoder(), data, execution)
    task = AutoencoderTask(tiny.autoencoder(patch=16), data, execution)
    images, patches = whole._make_batch(3), task._make_batch(3)
    assert patches.shape == (4, 3, 16, 16)
    assert torch.equal(patches, task._make_batch(3))
    for image, patch in zip(images, patches, strict=True):
        places = image.unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 17, 17, 16, 16)
        assert (places == patch[:, None, None]).all(dim=(0, 3, 4)).any()
    for each in (whole, task):
        each.batches.close()


def test_other_images_cannot_continue_a_run(tiny, tmp_path):
    run = tiny.train(tiny.autoencoder(), tmp_path / "run")
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    task = task_for(tiny.autoencoder(data__resolution=64))
    with pytest.raises(TrainingError, match="the images changed since this checkpoint"):
        task.load_state(checkpoint)
    task.batches.close()


def test_the_adaptive_weight_does_not_depend_on_the_loss_scale():
    layer = torch.randn(8, requires_grad=True)
    loss, term = (layer * 3).square().mean(), layer.sum() / 7
    plain, scaled = (adaptive_weight(loss, term, layer, scale=s) for s in (1.0, 65536.0))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)
