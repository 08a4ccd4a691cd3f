"""Training from a stream: resumed as if never stopped, mid-epoch, with broken samples."""

import pytest
from shard_files import write_shards

from mezzotint.data import ShardStream
from mezzotint.errors import ConfigError, TrainingError
from mezzotint.training.checkpoint import newest_checkpoint

UNCONDITIONAL = {"conditioning": {"kind": "none"}, "unet__cross_attention_dim": None}


@pytest.fixture
def shards(tmp_path):
    folder = write_shards(tmp_path / "shards", 3, 9)
    content = (folder / "00001.tar").read_bytes()
    # the second picture of a shard is broken
    at = content.index(b"\x89PNG", content.index(b"000010001"))
    (folder / "00001.tar").write_bytes(content[: at + 1] + b"?" + content[at + 2 :])
    return folder


def data(shards, **settings):
    values = {"kind": "webdataset", "urls": str(shards), "resolution": 32, "crop": "random"}
    return {**values, "shuffle_buffer": 8, "lanes": 4, "max_broken": 0.5, **settings}


def compare(tiny, make, tmp_path):
    whole = tiny.train(make(7), tmp_path / "whole")
    part = tiny.train(make(4), tmp_path / "part")
    tiny.train(make(7), part, resume=True)
    a, _ = newest_checkpoint(whole / "checkpoints")
    b, _ = newest_checkpoint(part / "checkpoints")
    assert a is not None and b is not None and a.step == b.step == 7
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert tensor.equal(b.tensors[group][name]), f"{group}.{name}"
    assert a.values["stream"] == b.values["stream"] and a.values["stream"]["marks"]
    return part


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_model_resumes_within_an_epoch(tiny, shards, tmp_path, kind):
    conditioning = {
        "text": {"data": data(shards)},
        "class": {
            "data": data(shards, class_column="kind_of", classes=["class 0", "class 1", "class 2"]),
            "conditioning": {"kind": "class", "width": 32},
        },
    }[kind]

    def make(steps):
        budget = {"max_steps": steps}
        return tiny.diffusion(**conditioning, latent_variants=0, accumulate=2, budget=budget)

    part = compare(tiny, make, tmp_path)
    log = (part / "log.txt").read_text()
    assert "a stream of 3 shards" in log and "skipped 00001.tar/000010001: " in log


def test_an_autoencoder_resumes_within_an_epoch(tiny, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mezzotint.training.autoencoder._MEASURED", 40)

    def make(steps):
        return tiny.autoencoder(data=data(shards), budget={"max_steps": steps})

    compare(tiny, make, tmp_path)


@pytest.mark.parametrize("kind", ["diffusion", "autoencoder"])
def test_previews_are_taken_from_a_stream_once(tiny, shards, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("mezzotint.training.autoencoder._MEASURED", 1)
    plain: list[int] = []
    load = ShardStream.load

    def watched(self, position, generator=None):
        if generator is None:
            plain.append(position)
        return load(self, position, generator)

    monkeypatch.setattr(ShardStream, "load", watched)
    changes = {"data": data(shards), "run": {"sample_minutes": 0.0001}, "budget": {"max_steps": 3}}
    if kind == "diffusion":
        changes |= {"latent_variants": 0, **UNCONDITIONAL}
    run = tiny.train(getattr(tiny, kind)(**changes), tmp_path / "run")
    assert len(list((run / "samples").glob("*.png"))) > 1
    # to measure the latents at the end, an autoencoder takes one more
    wanted = {"diffusion": range(16), "autoencoder": (*range(8), 0)}[kind]
    assert sorted(plain) == sorted(wanted)


def test_what_a_stream_cannot_be_asked_is_told(tiny, shards, tmp_path):
    with pytest.raises(ConfigError, match="latent_variants: a stream has no index"):
        tiny.diffusion(data=data(shards))
    # with an index it can
    recipe = tiny.diffusion(data=data(shards, stream=False), budget={"max_steps": 1})
    run = tiny.train(recipe, tmp_path / "indexed")
    assert "26 images" in (run / "log.txt").read_text()


def test_other_shards_cannot_continue_a_run(tiny, shards, tmp_path):
    def make(steps):
        budget = {"max_steps": steps}
        changes = {"data": data(shards), "latent_variants": 0, "budget": budget}
        return tiny.diffusion(**UNCONDITIONAL, **changes)

    run = tiny.train(make(2), tmp_path / "run")
    moved = (shards / "00002.tar").rename(tmp_path / "moved.tar")
    with pytest.raises(TrainingError, match="the images, or what is said of them, changed since"):
        tiny.train(make(4), run, resume=True)
    moved.rename(shards / "00002.tar")
    tiny.train(make(4), run, resume=True)


@pytest.mark.parametrize(
    ("kind", "what"), [("finetune", "fine-tuning"), ("distill", "distillation")]
)
def test_what_goes_on_from_a_model_refuses_a_stream(tiny, shards, tmp_path, kind, what):
    recipe = getattr(tiny, kind)(tmp_path / "no model", data=data(shards))
    with pytest.raises(ConfigError, match=f"data.stream: {what} wants data with an index"):
        tiny.train(recipe, tmp_path / "run")
