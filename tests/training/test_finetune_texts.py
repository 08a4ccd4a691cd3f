"""Texts of a frozen encoder: kept in a run, shared by runs, and the same to what is trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_pipelines import CONDITIONERS, kl, model
from torch import nn

from mezzotint.checkpoints.model import save_model
from mezzotint.config import to_yaml
from mezzotint.data import open_data
from mezzotint.data.latent_store import TEXTS, find_shards
from mezzotint.data.texts import TextCache
from mezzotint.errors import ConfigError
from mezzotint.training import verify
from mezzotint.training.checkpoint import newest_checkpoint
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.finetune import finetune_task
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.log import RunLog
from mezzotint.training.ranks import ALONE
from mezzotint.training.run import execution_for

SAID = ["a cat", "{caption}"]
EMOJI = {
    "kind": "emoji",
    "names": ["red-apple", "robot", "frog"],
    "resolution": 32,
    "caption_templates": ["{caption}", "{caption} and " + "more and " * 20],  # two chunks
    "tag_probability": 0.0,
}
ALL = 1 + 3 * 2 + 1  # a cat, each emoji in two ways, and nothing
FEW = {"data": EMOJI, "caption_templates": SAID}


def told(run: Path) -> list[str]:
    lines = (line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines())
    return [line for line in lines if "captions" in line or line.startswith("damaged texts")]


def started(asked: FinetuneRecipe, folder: Path) -> DiffusionTask:
    log = RunLog(folder, asked.name, Console(quiet=True))
    execution = execution_for(asked.precision, torch.device("cpu"))
    data = open_data(asked.data)
    task = finetune_task(asked, data, folder, execution, ALONE, log, lambda *_: None)
    log.close()
    return task


def test_texts_are_encoded_once_and_found_again(tiny, clip_base, tmp_path):
    shared = {**FEW, "latent_cache": str(tmp_path / "shared"), "budget": {"max_steps": 2}}
    run = tiny.train(tiny.finetune(clip_base, **shared), tmp_path / "lora")
    assert told(run) == [f"{ALL} captions encoded, 0 found in the cache"]
    (name,) = find_shards(tmp_path / "shared", TEXTS)
    full = tiny.finetune(clip_base, **shared, method="full")
    assert told(tiny.train(full, tmp_path / "full")) == [
        f"0 captions encoded, {ALL} found in the cache"
    ]
    more = {**shared, "caption_templates": ["a dog", "{caption}"]}
    prior = {"prompt": "a pet", "count": 2, "steps": 1}
    run = tiny.train(tiny.finetune(clip_base, **more, prior=prior), tmp_path / "prior")
    assert told(run) == [f"2 captions encoded, {ALL - 1} found in the cache"]
    # a damaged shard is told, and what it held is encoded anew
    path = tmp_path / "shared" / name
    path.write_bytes(path.read_bytes()[:-8])
    damaged, sentence = told(tiny.train(tiny.finetune(clip_base, **shared), tmp_path / "mended"))
    assert damaged.startswith("damaged texts are encoded anew: ") and name in damaged
    assert sentence == f"{ALL} captions encoded, 0 found in the cache"
    half = tiny.finetune(clip_base, **shared, latent_precision="float16")
    assert told(tiny.train(half, tmp_path / "half"))[0].startswith(f"{ALL} captions encoded, 0")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"components": ["unet", "conditioner"]}, None),
        ({"method": "full", "components": ["conditioner"]}, None),
        ({"method": "textual_inversion", "token": {"word": "<x>", "initial": "a"}}, None),
        ({"cached_captions": 0}, None),
        ({"cached_captions": ALL - 2}, f"the data can say more than cached_captions {ALL - 2}: "),
        ({"cached_captions": ALL - 1}, f"{ALL} captions encoded, 0 found in the cache"),
    ],
)
def test_texts_are_kept_where_nothing_moves_and_there_is_room(
    tiny, clip_base, tmp_path, changes, sentence
):
    if changes.get("method") == "textual_inversion":
        changes = {**changes, "caption_templates": ["a {token}"]}
    task = started(tiny.finetune(clip_base, **{**FEW, **changes}), tmp_path)
    cached = changes.get("cached_captions") == ALL - 1
    assert isinstance(task.conditions.tokens, TextCache) == cached
    lines = told(tmp_path)
    assert len(lines) == (sentence is not None)
    assert all(line.startswith(sentence) for line in lines)
    task.train_step(0, 0.0)
    task.batches.close()


def test_a_text_encoder_of_ones_own_model_is_asked_anew(tiny, text_run, tmp_path):
    task = started(tiny.finetune(text_run), tmp_path)
    assert task.conditions.tokens is None and not told(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["clip", "bert", "clip-inpainting"])
def test_losses_are_those_of_the_encoder(tiny, tmp_path, kind, precision):
    torch.manual_seed(0)
    untrained = model(CONDITIONERS[kind](), kl(), size=(32, 32))
    for parameter in untrained.unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    save_model(untrained, tmp_path / "base")
    changes = {**FEW, "condition_dropout": 0.5, "latent_variants": 0, "precision": precision}
    changes |= {"batch_size": 8, "spatial_dropout": 0.5 if "inpainting" in kind else 0.0}
    found: list[dict[str, Any]] = []
    for number, most in enumerate((0, 10_000)):
        asked = tiny.finetune(tmp_path / "base", **changes, cached_captions=most)
        task = started(asked, tmp_path / str(number))
        assert (task.conditions.tokens is not None) == (number == 1)
        batch = task.batches.get(0)
        assert batch.drop.any() and not batch.drop.all()
        assert len({t.caption for t in batch.told}) > 2
        step = task.train_step(0, 0.0)
        found.append(
            {name: float(step[name]) for name in ("loss", "loss_of_zero", "gradient_norm")}
        )
        task.batches.close()
    assert found[0]["loss"] > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_resumed_run_equals_one_in_one_go(tiny, clip_base, tmp_path):
    """Though the texts of the second half were encoded anew, and singly."""
    asked = {**FEW, "condition_dropout": 0.3, "budget": {"max_steps": 4}}
    whole = tiny.train(tiny.finetune(clip_base, **asked), tmp_path / "whole")
    asked["budget"] = {"max_steps": 2}
    part = tiny.train(tiny.finetune(clip_base, **asked), tmp_path / "part")
    shutil.rmtree(part / "latents")
    asked["budget"] = {"max_steps": 4}
    tiny.train(tiny.finetune(clip_base, **asked), part, resume=True)
    a, b = (newest_checkpoint(run / "checkpoints")[0] for run in (whole, part))
    assert a is not None and b is not None and a.step == b.step == 4
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}.{name}"
    with pytest.raises(ConfigError, match="other values of cached_captions"):
        tiny.train(tiny.finetune(clip_base, **asked, cached_captions=0), part, resume=True)


def test_verify_resume_passes(tiny, clip_base, tmp_path, monkeypatch):
    def in_this_process(recipe, run, device, **options):
        fault = verify._train(recipe, run, device, torch.get_num_threads(), options)
        assert fault is None, fault
        sentences.append(told(run)[-1])

    sentences: list[str] = []
    monkeypatch.setattr(verify, "_in_new_process", in_this_process)
    (tmp_path / "lora.yaml").write_text(to_yaml(tiny.finetune(clip_base, **FEW)))
    try:
        same = verify.verify_resume(tmp_path / "lora.yaml", before=2, after=2, device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same.tensors > 10
    assert sentences == [
        f"{ALL} captions encoded, 0 found in the cache",
        *[f"0 captions encoded, {ALL} found in the cache"] * 2,
    ]
