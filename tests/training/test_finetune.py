"""Fine-tuning: what is trained and nothing else, written so that other tools read it, resumed."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.checkpoints.adapters import AdapterSet
from mezzotint.checkpoints.embeddings import load_embedding
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.lora import read_lora
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.data import open_data
from mezzotint.device import select_precision
from mezzotint.errors import CheckpointError, ConfigError, DataError, TrainingError
from mezzotint.generation.pipeline import load
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.rng import keyed_generator
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.finetune import finetune_task
from mezzotint.training.finetune_data import CaptionedData
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.log import RunLog
from mezzotint.training.lora import LORA_FILE
from mezzotint.training.ranks import ALONE

QUIET = Console(quiet=True)
NOTO = {"kind": "emoji", "style": "noto", "subset": "demo-48", "resolution": 32}
BOTH = ["unet", "conditioner"]
TOKEN = {"word": "<ink>", "initial": "ab", "vectors": 3}


@pytest.fixture(scope="module")
def native_lora(tiny, text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = {"rank": 2, "alpha": 4.0}
    folder = tmp_path_factory.mktemp("native") / "run"
    return tiny.train(tiny.finetune(text_run, components=BOTH, lora=lora), folder)


@torch.no_grad()
def predicted(model: LatentDiffusion) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, *model.latent_shape(32, 32))
    x = torch.randn(shape, generator=generator)
    cond = model.eval().conditioner(ConditionInputs(count=2, captions=["a cat", "red apple"]))
    return model.predict(x, torch.tensor([3, 700]), cond)


def test_a_lora_acts_as_it_was_trained(text_run, native_lora):
    """The file beside the base is W + alpha / r B A of the checkpoint, text encoder included."""
    base = load_any(text_run).model
    plain = predicted(base)
    acting = AdapterSet(base)
    acting.apply(read_lora(native_lora / "model"))
    from_file = predicted(base)
    acting.remove_all()
    checkpoint, _ = newest_checkpoint(native_lora / "checkpoints")
    assert checkpoint is not None
    trained = checkpoint.tensors["weights"]
    parts = {"unet": base.unet, "text_encoder": base.conditioner}
    with torch.no_grad():
        for name, down in trained.items():
            if not name.endswith("/lora_A/weight"):
                continue
            part, _, layer = name.removesuffix("/lora_A/weight").partition("/")
            up = trained[name.replace("lora_A", "lora_B")]
            parts[part].get_submodule(layer.replace("/", ".")).weight += 2.0 * up @ down
    merged = predicted(base)
    assert {name.split("/")[0] for name in trained} == set(parts)
    up = trained["text_encoder/blocks/0/to_qkv/lora_B/weight"]
    assert up.abs().max() > 1e-4, "the text encoder was not trained"
    assert (from_file - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.testing.assert_close(from_file, merged, rtol=1e-4, atol=1e-5)


def test_a_lora_of_a_native_model_loads_in_diffusers(text_run, native_lora):
    base = load_any(text_run).model.eval()
    AdapterSet(base).apply(read_lora(native_lora / "model"))
    theirs = UNet2DConditionModel.from_pretrained(text_run / "model" / "unet").eval()
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([3, 700])
    with torch.no_grad():
        plain = theirs(x, t, context).sample
        theirs.load_lora_adapter(native_lora / "model", prefix="unet", weight_name=LORA_FILE)
        adapted = theirs(x, t, context).sample
        torch.testing.assert_close(base.unet(x, t, context), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_native_model_draws_with_it(text_run, native_lora):
    pipeline = load(text_run, precision="float32")
    asked: dict[str, Any] = {"prompt": "red apple", "steps": 2}
    plain = pipeline.generate(**asked)[0].image
    drawn = pipeline.generate(**asked, adapters=[{"name": str(native_lora), "weight": 1.0}])[0]
    assert drawn.image.tobytes() != plain.tobytes()
    assert pipeline.generate(**asked)[0].image.tobytes() == plain.tobytes()
    with pytest.raises(CheckpointError, match="an adapter and no model; give it with --adapter"):
        load(native_lora)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_of_a_public_model_loads_in_diffusers(tiny, clip_base, tmp_path):
    asked = tiny.finetune(clip_base, components=BOTH, weighting="min_snr")
    run = tiny.train(asked, tmp_path / "run")
    base = load_any(clip_base).model.eval()
    AdapterSet(base).apply(read_lora(run / "model"))
    theirs = StableDiffusionPipeline.from_pretrained(clip_base, safety_checker=None)
    plain, _ = theirs.encode_prompt("abc", "cpu", 1, False)
    theirs.load_lora_weights(run / "model", weight_name=LORA_FILE)
    tokens, _ = theirs.encode_prompt("abc", "cpu", 1, False)
    cond = base.conditioner(ConditionInputs(count=1, captions=["abc"]))
    torch.testing.assert_close(cond.crossattn, tokens, rtol=1e-4, atol=1e-5)
    assert (tokens - plain).abs().max() > 1e-3
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    with torch.no_grad():
        ours = base.predict(x, t, cond)
        torch.testing.assert_close(ours, theirs.unet(x, t, tokens).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_new_word_is_learned_and_loads_everywhere(tiny, clip_base, tmp_path):
    asked = tiny.finetune(clip_base, method="textual_inversion", token=TOKEN)
    run = tiny.train(asked, tmp_path / "run")
    learned = load_embedding(run / "model" / "learned_embeds.safetensors")
    assert (learned.word, learned.vectors.shape) == ("<ink>", (3, 16))
    base = load_any(clip_base).model
    initial = base.conditioner.vectors_of("ab")[[0, 1, 0]]
    assert ((learned.vectors - initial).abs().amax(1) > 0.01).all()
    AdapterSet(base).add_embedding(learned)
    theirs = StableDiffusionPipeline.from_pretrained(clip_base, safety_checker=None)
    theirs.load_textual_inversion(run / "model" / "learned_embeds.safetensors")
    tokens, _ = theirs.encode_prompt("c <ink>", "cpu", 1, False)
    ours = base.conditioner(ConditionInputs(count=1, captions=["c <ink>"])).crossattn
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-5)
    pipeline = load(clip_base, precision="float32")
    drawn = [
        pipeline.generate(prompt="c <ink>", steps=2, adapters=uses)[0].image.tobytes()
        for uses in ((), ({"name": str(run), "weight": 1.0},))
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("kind", ["lora", "prior", "full", "inversion"])
def test_resumed_equals_uninterrupted(tiny, request, tmp_path, kind):
    base, changes = {
        "lora": (
            "text_run",
            {"components": BOTH, "lora": {"dropout": 0.3}, "accumulate": 2, "batch_size": 8},
        ),
        "prior": ("text_run", {"prior": {"prompt": "a cat", "count": 3, "steps": 2}}),
        "full": (
            "class_run",
            {"method": "full", "components": BOTH, "ema_decay": 0.9, "latent_variants": 0},
        ),
        "inversion": ("clip_base", {"method": "textual_inversion", "token": TOKEN}),
    }[kind]
    path = request.getfixturevalue(base)
    whole = tiny.train(tiny.finetune(path, **changes), tmp_path / "whole")
    first = tiny.finetune(path, **changes, budget={"max_steps": 1})
    part = tiny.train(first, tmp_path / "part")
    tiny.train(tiny.finetune(path, **changes), part, resume=True)
    a, b = (newest_checkpoint(run / "checkpoints")[0] for run in (whole, part))
    assert a is not None and b is not None and a.step == b.step == 3
    assert a.tensors["weights"]
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}.{name}"
    files = [path for path in (whole / "model").rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert file.read_bytes() == (part / file.relative_to(whole)).read_bytes(), file.name


def test_nothing_is_trained_but_what_is_asked_for(tiny, request, tmp_path):
    """Of two steps the weights of the model move that the recipe names, and no bit of any other."""
    for base, changes, moving in (
        ("text_run", {"method": "full"}, {"unet"}),
        ("text_run", {"method": "full", "components": BOTH}, {"unet", "conditioner"}),
        ("text_run", {"components": BOTH}, set()),
        ("clip_base", {"method": "textual_inversion", "token": TOKEN}, set()),
    ):
        path = request.getfixturevalue(base)
        asked = tiny.finetune(path, weighting="min_snr", **changes)
        task = started(asked, tmp_path / f"{base}-{len(moving)}")
        before = {name: t.clone() for name, t in task.model.state_dict().items()}
        trained = {id(p) for p in task.trained.parameters()}
        assert {id(p) for p in task.model.parameters() if p.requires_grad} <= trained
        assert not any(p.requires_grad for p in task.model.first_stage.parameters())
        for step in range(2):
            task.train_step(step, step / 2)
        task.batches.close()
        assert task.model.conditioner.training == ("conditioner" in asked.components)
        moved = {
            name.split(".")[0]
            for name, tensor in task.model.state_dict().items()
            if "lora_" not in name and not torch.equal(tensor, before[name])
        }
        assert moved == moving, (changes, moved)


def started(asked: FinetuneRecipe, folder: Path) -> DiffusionTask:
    execution = select_precision("float32", torch.device("cpu"))
    log = RunLog(folder, asked.name, QUIET)
    data = open_data(asked.data)
    task = finetune_task(asked, data, folder, execution, ALONE, log, lambda *_: None)
    log.close()
    return task


def test_the_prior_is_drawn_once_and_weighs_as_it_is_told(tiny, text_run, tmp_path):
    prior = {"prompt": "a cat", "count": 3, "steps": 2, "weight": 0.5}
    asked = tiny.finetune(text_run, prior=prior, batch_size=2)
    task = started(asked, tmp_path)
    paths = sorted(tmp_path.rglob("prior/*/*.png"))
    assert len(paths) == 3 and task.images_per_step == 4
    kept = [path.stat().st_mtime_ns for path in paths]
    drawn = paths[1].read_bytes()
    paths[1].unlink()  # as if drawing had been stopped
    again = started(asked, tmp_path)
    assert paths[1].read_bytes() == drawn
    assert [paths[k].stat().st_mtime_ns for k in (0, 2)] == [kept[0], kept[2]]
    assert again.inputs == task.inputs
    # of the base that draws: the loss is that of the data, and half of that of its own pictures
    batch = again.batches.get(0)
    own = [batch.told[k].caption == "a cat" for k in range(4)]
    assert own == [False, True, False, True]
    losses = []
    for rows in ([0, 2], [1, 3]):
        part = replace(batch, **{
            "latents": [batch.latents[k] for k in rows], "told": [batch.told[k] for k in rows],
            "drop": batch.drop[rows], "drop_spatial": batch.drop_spatial[rows],
            "drawn": batch.drawn[rows], "seeds": [batch.seeds[k] for k in rows], "weights": None,
        })  # fmt: skip
        losses.append(again._loss(part, slice(0, 2))[0].item())
    whole = again._loss(batch, slice(0, 4))[0].item()
    assert whole == pytest.approx(losses[0] + 0.5 * losses[1], rel=1e-5)
    for one in (task, again):
        one.batches.close()
    other = started(tiny.finetune(text_run, prior={**prior, "prompt": "a dog"}), tmp_path)
    assert len(list(tmp_path.rglob("prior/*/*.png"))) == 6
    other.batches.close()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text_run", {"method": "full", "components": ["unet", "vae"]}, "'vae' cannot be fine-tuned"),
    ("text_run", {"components": ["autoencoder"]}, "train it alone by a recipe of kind"),
    ("text_run", {"method": "textual_inversion"}, "token: is required"),
    ("text_run", {"token": TOKEN}, "token: is for method 'textual_inversion', not 'lora'"),
    ("text_run", {"method": "full", "lora": {"rank": 2}}, "lora: is for method 'lora'"),
    ("text_run", {"method": "textual_inversion", "token": TOKEN}, "models with a CLIP text enc"),
    ("text_run", {"lora": {"target_modules": ["to_x"]}}, "no layer of the UNet ends in 'to_x'"),
    ("text_run", {"caption_templates": ["a {thing}"]}, "no fields but {caption} and {token}"),
    ("text_run", {"data": {**NOTO, "resolution": 33}}, "33 is not divisible by the base model's"),
    ("text_run", {"run": {"sharding": True}}, "run.sharding is for method 'full'"),
    ("text_run", {"ema": {"kind": "power"}}, "ema: power functions are for method 'full'"),
    ("class_run", {"prior": {"prompt": "a"}}, "prior: is for models that want a prompt"),
    ("class_run", {"components": BOTH}, "the model's conditioner has no attention"),
    ("class_run", {"data": {**NOTO, "labels": "concept"}}, "number them alike"),
]


@pytest.mark.parametrize(("base", "changes", "told"), REFUSED)
def test_what_does_not_fit_is_refused(tiny, request, tmp_path, base, changes, told):
    path = request.getfixturevalue(base)
    with pytest.raises(ConfigError, match=told):
        tiny.train(tiny.finetune(path, **changes), tmp_path / "run")


def test_another_base_cannot_continue_a_run(tiny, text_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(text_run / "model", base)
    run = tiny.train(tiny.finetune(base, budget={"max_steps": 1}), tmp_path / "run")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights)
    with pytest.raises(TrainingError, match="the base model changed since this checkpoint"):
        tiny.train(tiny.finetune(base, budget={"max_steps": 9}), run, resume=True)


def test_captions_come_from_templates(tiny, text_run, tmp_path):
    data = CaptionedData(
        open_data(tiny.finetune(text_run).data), ("{caption}", "a {token}"), "<ink>"
    )
    assert data.describe(0).caption == "red apple"
    said = {data.describe(0, keyed_generator(k)).caption for k in range(12)}
    assert "a <ink>" in said and len(said) > 2
    assert data.load(0, keyed_generator(1)).caption in said
    assert data.fingerprint != CaptionedData(data.data, ("{caption}",)).fingerprint
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    folder = {"kind": "folder", "path": str(tmp_path), "resolution": 32}
    with pytest.raises(DataError, match="no captions for '{caption}': give data.caption_column"):
        tiny.train(tiny.finetune(text_run, data=folder), tmp_path / "run")
