"""What fine-tuning is shown, and in which order: buckets, balance, pairs, latents found again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from mezzotint.data import open_data
from mezzotint.device import select_precision
from mezzotint.errors import ConfigError
from mezzotint.training.batches import DataOrder
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.finetune import finetune_task
from mezzotint.training.finetune_data import Pairs
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.log import RunLog
from mezzotint.training.orders import LeavingOut
from mezzotint.training.ranks import ALONE

PRIOR = {"prompt": "a cat", "count": 2, "steps": 1}


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """Two classes of two shapes, one class three times as large, with captions."""
    folder = tmp_path / "things"
    rows: list[str] = []
    for name, count in (("many", 6), ("few", 2)):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            size = (64, 32) if k % 2 else (32, 64)
            Image.new("RGB", size, (9 * k, len(name) * 40, 90)).save(folder / name / f"{k}.png")
            rows.append(json.dumps({"file_name": f"{name}/{k}.png", "text": name, "kind": name}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def data(folder: Path, **settings: Any) -> dict[str, Any]:
    columns = {"caption_column": "text", "class_column": "kind"}
    return {"kind": "folder", "path": str(folder), "resolution": 32, **columns, **settings}


def started(asked: FinetuneRecipe, folder: Path) -> DiffusionTask:
    execution = select_precision("float32", torch.device("cpu"))
    log = RunLog(folder, asked.name, Console(quiet=True))
    source = open_data(asked.data)
    task = finetune_task(asked, source, folder, execution, ALONE, log, lambda *_: None)
    log.close()
    return task


@pytest.mark.parametrize("views", [0, 1])
def test_batches_are_of_one_bucket(tiny, text_run, things, tmp_path, views):
    buckets = data(things, buckets={"multiple": 8})
    asked = tiny.finetune(text_run, data=buckets, latent_variants=views)
    task = started(asked, tmp_path / "task")
    shapes: set[tuple[int, ...]] = set()
    for step in range(2):
        shapes |= {tuple(each.shape) for each in task.batches.get(step).latents}
        assert len({each.shape for each in task.batches.get(step).latents}) == 1
    task.batches.close()
    assert len(shapes) == 2
    tiny.train(asked, tmp_path / "run")


@pytest.mark.parametrize("prior", [None, PRIOR])
def test_classes_are_balanced(tiny, text_run, things, tmp_path, prior):
    asked = tiny.finetune(text_run, data=data(things, balance="class"), prior=prior)
    task = started(asked, tmp_path)
    indices = [task.order.index(k) for k in range(48)]
    labels = Counter(task.data.describe(k).label for k in indices)
    each = 24 if prior is None else 12
    assert (labels[0], labels[1]) == (each, each)


def test_what_cannot_be_fine_tuned_on_buckets_is_told(tiny, text_run, things, tmp_path):
    with pytest.raises(ConfigError, match="buckets: the pictures of a prior are squares"):
        tiny.finetune(text_run, data=data(things, buckets={"multiple": 16}), prior=PRIOR)
    with pytest.raises(ConfigError, match="multiple 4 is not divisible by 8"):
        asked = tiny.finetune(text_run, data=data(things, buckets={"multiple": 4}))
        tiny.train(asked, tmp_path / "run")
    conditioning = {"kind": "low_res"}
    changes = {"unet__cross_attention_dim": None, "unet__in_channels": 7}
    small = tiny.diffusion(conditioning=conditioning, **changes, budget={"max_steps": 1})
    base = tiny.train(small, tmp_path / "base")
    with pytest.raises(ConfigError, match="buckets: the base model wants .*takes squares"):
        asked = tiny.finetune(base, data=data(things, buckets={"multiple": 16}))
        tiny.train(asked, tmp_path / "run")


def test_latents_are_found_again_under_other_captions(tiny, text_run, things, tmp_path):
    """They go by what pictures show, and prior pictures by their pixels."""
    shared = {"data": data(things), "latent_cache": str(tmp_path / "shared"), "latent_variants": 2}
    shared |= {"budget": {"max_steps": 1}}
    told: list[str] = []
    for name, changes in (
        ("plain", {}),
        ("captions", {"caption_templates": ["a photo of {caption}"]}),
        ("prior", {"prior": PRIOR}),
        ("again", {"prior": PRIOR, "caption_templates": ["{caption}, a photo"]}),
    ):
        run = tiny.train(tiny.finetune(text_run, **shared, **changes), tmp_path / name)
        lines = (run / "log.txt").read_text().splitlines()
        told += [line.split(" ", 2)[2] for line in lines if "views encoded" in line]
    assert told == [
        "16 views encoded, 0 found in the cache",
        "0 views encoded, 16 found in the cache",
        "4 views encoded, 16 found in the cache",
        "0 views encoded, 20 found in the cache",
    ]


def test_a_picture_that_is_left_out_is_replaced_by_one_of_its_kind():
    pairs = Pairs(DataOrder(3, 0), 3, DataOrder(4, 1), 0.5)
    order = LeavingOut(pairs, pairs.others)
    order.excluded = frozenset({1, 5})
    found = [order.index(k) for k in range(48)]
    assert set(found[::2]) == {0, 2} and set(found[1::2]) == {3, 4, 6}
    # of a kind of which nothing is left, there is nothing to take
    order.excluded = frozenset({0, 1, 2})
    assert set(order.index(k) for k in range(0, 12, 2)) == {0, 1, 2}
