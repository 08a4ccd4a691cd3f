"""A small decoder: it learns, draws in place of the full one, and its pictures say so."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.cli.main import app
from mezzotint.data import open_data
from mezzotint.device import select_device, select_precision
from mezzotint.errors import ConfigError, RequestError, TrainingError
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import load
from mezzotint.generation.replay import replay
from mezzotint.training import verify
from mezzotint.training.checkpoint import newest_checkpoint, save_checkpoint
from mezzotint.training.decoder import DecoderTask


def psnr(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["psnr"] for line in lines]


@pytest.fixture(scope="module")
def decoder_run(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train(tiny.decoder(), tmp_path_factory.mktemp("decoder") / "run")


def test_it_comes_near_to_the_full_decoder(tiny, tmp_path: Path) -> None:
    """Of an autoencoder that has learned enough for its latents to say something."""
    quick = {"run": {"log_steps": 10}, "budget": {"max_steps": 60}}
    first = tiny.autoencoder(**quick, optimizer={"learning_rate": 5e-3})
    path = str(tiny.train(first, tmp_path / "first"))
    rate = {"learning_rate": 3e-3}
    recipe = tiny.decoder(**quick, first_stage__path=path, batch_size=8, optimizer=rate)
    run = tiny.train(recipe, tmp_path / "run")
    found = psnr(run)
    assert found[-1] > found[0] + 10, found  # 25 against 11 dB
    assert list((run / "samples").glob("*.png"))


def test_pictures_say_what_decoded_them(text_run: Path, decoder_run: Path, tmp_path: Path) -> None:
    plain = load(text_run, precision="float32")
    pipeline = load(text_run, precision="float32", decoder=decoder_run)
    asked = {"prompt": "a red apple", "steps": 2}
    whole, drawn = plain.generate(**asked)[0], pipeline.generate(**asked)[0]
    assert drawn.image.tobytes() != whole.image.tobytes()
    assert drawn.image.size == whole.image.size
    said = drawn.request.resolved.decoder
    assert said.path == str(decoder_run) and whole.request.resolved.decoder is None
    assert drawn.request.resolved.model_hash == whole.request.resolved.model_hash
    tiled = pipeline.generate(**asked, tiled_decoding=True)[0]
    assert tiled.image.tobytes() == drawn.image.tobytes()  # one tile is the whole
    path = tmp_path / "drawn.png"
    write_image(drawn.image, drawn.request, path)
    assert replay(path).image.tobytes() == drawn.image.tobytes()
    write_image(whole.image, whole.request, tmp_path / "whole.png")
    with pytest.raises(RequestError, match="the model's own decoder decoded it"):
        replay(tmp_path / "whole.png", decoder=decoder_run)


def test_the_command_line_takes_one(tiny, text_run, decoder_run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(text_run), "a red apple", "--steps", "1", "-o", "a.png"]
    done = CliRunner().invoke(app, [*words, "--decoder", str(decoder_run)])
    assert done.exit_code == 0, done.output
    assert read_request(Path("a.png")).resolved.decoder.path == str(decoder_run)
    other = tiny.train(tiny.decoder(seed=1, budget={"max_steps": 1}), tmp_path / "other")
    done = CliRunner().invoke(app, ["replay", "a.png", "--decoder", str(other), "-o", "b.png"])
    assert "decoded by a decoder with the hash" in str(done.exception or done.output)
    done = CliRunner().invoke(app, ["replay", "a.png", "--decoder", str(decoder_run / "model")])
    assert done.exit_code == 0 and "the same, bit for bit" in done.output


def test_a_stopped_run_is_gone_on_with(tiny, tmp_path, monkeypatch) -> None:
    def in_this_process(recipe, run, device, **options):
        told = verify._train(recipe, run, device, torch.get_num_threads(), options)
        assert told is None, told

    monkeypatch.setattr(verify, "_in_new_process", in_this_process)
    judge = {"discriminator": {"channels": 8, "layers": 2}}
    path = tiny.write(tmp_path / "decoder.yaml", "decoder", loss__adversarial=judge, accumulate=2)
    try:
        same = verify.verify_resume(path, before=2, after=2, device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same.tensors > 30 and same.numbers > 10_000


@pytest.mark.parametrize("last", [False, True])
def test_the_images_lie_as_the_weights_do(tiny, last: bool) -> None:
    recipe = tiny.decoder(channels_last=last)
    first_stage, normalization = load_first_stage(tiny.autoencoder_run / "model" / "vae")
    execution = select_precision("float32", select_device("cpu"))
    task = DecoderTask(recipe, first_stage, normalization, open_data(recipe.data), execution)
    images, _ = task._samples(0)
    task.batches.close()
    assert images.is_contiguous(memory_format=torch.channels_last) is last


def test_weights_without_moments_warm_up_anew(tiny, tmp_path: Path) -> None:
    """As weights that travelled light do."""
    rate = {"learning_rate": 1e-2, "warmup_steps": 3}
    recipe = tiny.decoder(optimizer=rate, budget={"max_steps": 6}, run={"log_steps": 1})
    run = tiny.train(recipe, tmp_path / "run", stop_after=4)
    saved, _ = newest_checkpoint(run / "checkpoints")
    assert saved is not None and saved.step == 4 and saved.values["begun"] == 0
    light = {name: tensors for name, tensors in saved.tensors.items() if name != "optimizer"}
    save_checkpoint(run / "checkpoints", saved.step, light, saved.values)
    tiny.train(recipe, run, resume=True)
    after, _ = newest_checkpoint(run / "checkpoints")
    assert after is not None and after.step == 6 and after.values["begun"] == 4
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 6 and row["learning_rate"] == pytest.approx(1e-2 * 2 / 4)


def test_another_autoencoder_or_other_images_are_refused(tiny, decoder_run, tmp_path) -> None:
    part = tiny.train(tiny.decoder(), tmp_path / "part", stop_after=1)
    moved = tiny.train(tiny.autoencoder(seed=3, budget={"max_steps": 1}), tmp_path / "other")
    recipe = tiny.decoder(first_stage__path=str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(tiny.autoencoder_run)
    part = tiny.train(recipe, tmp_path / "linked", stop_after=1)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(moved)
    with pytest.raises(TrainingError, match="the autoencoder changed since this checkpoint"):
        tiny.train(recipe, part, resume=True)


def test_what_does_not_fit_is_refused(tiny, tmp_path) -> None:
    for changes, message in (
        ({"patch": 64}, "patch 64 is larger than data.resolution 32"),
        ({"patch": 16, "loss": {"perceptual": 1.0}}, "patch 16 is too small for the loss"),
        ({"run": {"sharding": True}}, "run.sharding is for diffusion models"),
        ({"ema": {"kind": "power"}}, "power functions are not for decoders"),
        ({"loss": {"l1": 0.0, "perceptual": 0.0}}, "one of l1, l2 and perceptual"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.decoder(**changes)
    with pytest.raises(ConfigError, match="patch 30 is not divisible by the first stage's f = 4"):
        tiny.train(tiny.decoder(patch=30), tmp_path / "run")
