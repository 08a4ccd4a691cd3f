"""`inspect`, `convert` and `sample` with public layouts, as a user types them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import build
from typer.testing import CliRunner, Result

from mezzotint.checkpoints.averages import average_of
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.cli.main import app
from mezzotint.data.degradation import bicubic_down
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.generation.metadata import read_infotext, read_request
from mezzotint.storage.tensors import open_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single files of several families in one folder."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("sd1", "sd1-inpainting", "ldm-super-resolution", "ldm-layout", "ldm-semantic"):
        save_single_file(build(name), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def mezzotint(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


def picture(path: str, size: tuple[int, int] = (64, 64)) -> Path:
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    values = np.stack([x * 3 % 256, y * 3 % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(values).save(path)
    return Path(path)


def mask(path: str) -> Path:
    drawn = Image.new("L", (64, 64))
    drawn.paste(255, (8, 8, 40, 40))
    drawn.save(path)
    return Path(path)


def test_inspect_says_what_a_file_is(models: Path) -> None:
    file = models / "sd1.safetensors"
    said = mezzotint("inspect", file, "--hash").stdout
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    for line in (
        "family      sd1: Stable Diffusion 1",
        "prediction  epsilon: its YAML, sd1.yaml, says so",
        "part        model.diffusion_model (UNet): ",
        "part        cond_stage_model (ClipConditioner): ",
        "float32",
        "EMA         none",
        "missing     none",
        "unexpected  none",
        f"sha256      {sha256}",
        f"short hash  {sha256[:10]}",
    ):
        assert line in said
    told = json.loads(mezzotint("inspect", file, "--json").stdout)
    tensors = open_tensors(file)
    assert sum(part["tensors"] for part in told["parts"]) == len(tensors)
    assert told["family"] == "sd1" and told["sha256"] is None


def test_inspect_tells_what_is_missing_unexpected_and_averaged(tmp_path: Path) -> None:
    save_single_file(build("sd1"), tmp_path / "a.ckpt")
    state = open_tensors(tmp_path / "a.ckpt").read()
    name = "model.diffusion_model.input_blocks.0.0.weight"
    average = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name]}
    state = (
        {k: v for k, v in state.items() if k != name} | average | {"stray.weight": torch.ones(2)}
    )
    torch.save({"state_dict": state, "global_step": 470_000}, tmp_path / "a.ckpt")
    told = json.loads(mezzotint("inspect", "a.ckpt", "--json").stdout)
    assert told["missing"] == [name] and told["unexpected"] == ["stray.weight"]
    assert told["averaged"] is True and told["metadata"]["global_step"] == "470000"
    assert any("missing (1)" in problem for problem in told["problems"])
    assert isinstance(mezzotint("sample", "a.ckpt", "a red apple").exception, CheckpointError)


def test_inspect_takes_what_the_user_knows_better(models: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((models / "sd1.safetensors").read_bytes())
    told = json.loads(mezzotint("inspect", alone, "--json", "--prediction", "v_prediction").stdout)
    assert told["prediction"] == "v_prediction"
    assert told["prediction_reason"] == "as it was asked for"
    wrong = mezzotint("inspect", alone, "--family", "sd3").exception
    assert isinstance(wrong, CheckpointError) and "no family 'sd3'" in str(wrong)


def test_convert_there_and_back(models: Path) -> None:
    done = mezzotint("convert", models / "sd1.safetensors", "folder", "--to", "diffusers")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "folder"
    told = json.loads(mezzotint("inspect", "folder", "--json").stdout)
    assert told["layout"] == "diffusers folder"
    assert told["family"] == "StableDiffusionPipeline" and told["prediction"] == "epsilon"
    half = mezzotint("convert", "folder", "h.ckpt", "--to", "compvis", "--precision", "float16")
    assert half.exit_code == 0, half.output
    ours, theirs = open_tensors(Path("h.ckpt")), open_tensors(models / "sd1.safetensors")
    assert ours.keys() == theirs.keys()
    state = ours.read()
    assert all(torch.equal(state[n], t.half()) for n, t in theirs.read().items())
    refused = mezzotint("convert", "folder", "h.ckpt", "--to", "compvis").exception
    assert isinstance(refused, CheckpointError) and "--overwrite" in str(refused)


def test_what_a_conversion_leaves_out_is_printed_once(models: Path, tmp_path: Path) -> None:
    state = open_tensors(models / "sd1.safetensors").read()
    state["cond_stage_model.model.text_projection"] = torch.eye(2)
    state["model.diffusion_model.out.2.bias"] = torch.tensor([7e4, 0.0, 0.0, 0.0])
    save_file(state, tmp_path / "a.safetensors")
    refused = mezzotint(
        "convert", "a.safetensors", "b", "--to", "diffusers", "--precision", "float16"
    )
    message = "unet.conv_out.bias holds 70,000, and float16 ends at 65,504; bfloat16 holds it"
    assert isinstance(refused.exception, CheckpointError) and str(refused.exception) == message
    assert not Path("b").exists()
    done = mezzotint(
        "convert", "a.safetensors", "b", "--to", "diffusers", "--precision", "bfloat16"
    )
    assert done.stdout.count("text_projection") == 1
    assert "left out: cond_stage_model.model.text_projection\n" in done.stdout


def test_inspect_tells_problems_of_folders_and_averages_alone(models: Path, tmp_path: Path) -> None:
    mezzotint("convert", models / "sd1.safetensors", "folder", "--to", "diffusers")
    path = Path("folder/unet/diffusion_pytorch_model.safetensors")
    state = open_tensors(path).read()
    save_file({"stray": torch.ones(1), **state}, path)
    said = mezzotint("inspect", "folder").stdout.splitlines()
    assert "missing     none" in said and "unexpected  unet/stray" in said
    assert f"problem     {path}: does not fit its UNet: unexpected (1): stray" in said
    state = open_tensors(models / "sd1.safetensors").read()
    flat = {average_of(n) if n.startswith("model.") else n: t for n, t in state.items()}
    torch.save({"state_dict": flat}, "ema.pt")
    said = mezzotint("inspect", "ema.pt").stdout.splitlines()
    assert "EMA         averaged weights alone, which are taken for the UNet" in said
    assert "missing     none" in said
    refused = mezzotint("sample", "ema.pt", "a red apple", "--weights", "raw").exception
    assert isinstance(refused, CheckpointError) and "none of its own" in str(refused)


SMALL = ("--steps", 2, "--precision", "float32", "--device", "cpu")


def test_every_option_arrives_in_the_request(models: Path) -> None:
    file = models / "sd1.safetensors"
    options = "--negative blurry --emphasis no_norm --clip-skip 2 --variation-seed 9"
    options += " --variation-strength 0.25 --high-res 1.5 --high-res-strength 0.5"
    options += " --upscaler lanczos --tiling --size 64 --seed 4 --sampler unipc"
    done = mezzotint("sample", file, "a (red:1.2) apple", *options.split(), *SMALL, "-o", "a.webp")
    assert done.stdout == "a.webp\n", done.output
    request = read_request(Path("a.webp"))
    asked = {
        "prompt": "a (red:1.2) apple",
        "negative_prompt": "blurry",
        "emphasis": "no_norm",
        "clip_skip": 2,
        "variation_seed": 9,
        "variation_strength": 0.25,
        "tiling": True,
        "seed": 4,
        "sampler": "unipc",
        "guidance_scale": 7.5,  # the family's
    }
    assert {name: getattr(request, name) for name in asked} == asked
    assert request.high_res is not None
    assert (request.high_res.scale, request.high_res.upscaler) == (1.5, "lanczos")
    assert pixels("a.webp").shape == (96, 96, 3)
    assert "Clip skip: 2" in read_infotext(Path("a.webp"))
    again = mezzotint("replay", "a.webp", "-o", "b.webp")
    assert again.stdout.splitlines()[1] == "the same, bit for bit"


def test_a_picture_is_drawn_as_another_was(models: Path) -> None:
    file = models / "sd1.safetensors"
    mezzotint("sample", file, "a red apple", "-n", 2, "--size", 64, *SMALL, "-o", "first")
    second = sorted(Path("first").iterdir())[1]
    assert read_request(second).resolved.image_index == 1
    done = mezzotint("sample", file, "--from", second, "--precision", "float32", "-o", "b.png")
    assert done.stdout == "b.png\n", done.output
    before, after = pixels(second), pixels("b.png")
    assert abs(before - after).max() <= 1
    changed = mezzotint("sample", file, "--from", second, "--seed", 99, *SMALL, "-o", "c.png")
    assert read_request(Path(changed.stdout.strip())).seed == 99


def test_pictures_go_in(models: Path) -> None:
    sd1, inpainting = models / "sd1.safetensors", models / "sd1-inpainting.safetensors"
    image, hole = picture("in.png"), mask("mask.png")
    kept = pixels(hole) == 0
    for file in (sd1, inpainting):
        done = mezzotint(
            "sample", file, "moss", "--image", image, "--mask", hole, *SMALL, "-o", "out.png"
        )
        path = done.stdout.strip()
        assert (pixels(path)[kept] == pixels(image)[kept]).all()
    call = ("sample", sd1, "moss", "--image", image, *SMALL)
    done = mezzotint(*call, "--strength", 0.5, "-o", "i.png")
    assert read_request(Path(done.stdout.strip())).strength == 0.5
    done = mezzotint(*call, "--padding", "8,0,0,16", "-o", "p.png")
    assert pixels(done.stdout.strip()).shape == (80, 72, 3)
    image.rename("moved.png")
    assert isinstance(mezzotint("replay", "i.png").exception, RequestError)
    again = mezzotint("replay", "i.png", "--input", "moved.png", "-o", "j.png")
    assert again.stdout.splitlines()[1] == "the same, bit for bit"


def test_back_projection_brings_a_picture_into_agreement(models: Path) -> None:
    """Shrunk again, it is the small picture, and a replay draws the same."""
    small = picture("small.png", (16, 16))
    asked = ["sample", models / "ldm-super-resolution.safetensors", "--low-res", small, *SMALL]
    off: list[float] = []
    for times in (0, 8):
        done = mezzotint(*asked, "--back-projection", times, "-o", f"{times}.png")
        assert done.exit_code == 0, done.output
        drawn = torch.from_numpy(pixels(f"{times}.png")).permute(2, 0, 1)[None].float()
        shrunk = bicubic_down(drawn, 4)[0].permute(1, 2, 0).clamp(0, 255)
        off.append(float((shrunk - torch.from_numpy(pixels(small)).float()).abs().mean()))
    assert off[0] > 20 and off[1] < 2
    again = mezzotint("replay", "8.png", "-o", "again.png")
    assert again.stdout.splitlines()[1] == "the same, bit for bit"


def test_blending_meets_the_surroundings(models: Path) -> None:
    """Colours do not jump at the mask's border, what is kept is kept, a replay is the same."""
    image, mask = picture("smooth.png", (64, 64)), "hole.png"
    Image.new("RGB", (64, 64), (200, 60, 90)).save(image)
    hole = Image.new("L", (64, 64), 0)
    hole.paste(255, (16, 16, 48, 48))
    hole.save(mask)
    asked = ["sample", models / "sd1.safetensors", "a cat", "--image", image, "--mask", mask]
    steps: list[float] = []
    for name, more in (("plain", []), ("blended", ["--poisson-blending"])):
        done = mezzotint(*asked, *SMALL, *more, "-o", f"{name}.png")
        assert done.exit_code == 0, done.output
        drawn = pixels(f"{name}.png").astype(int)
        assert (drawn[:16] == (200, 60, 90)).all()
        tint = (drawn[16, 16:48] - drawn[15, 16:48]).mean(0)  # what random weights draw is noise
        steps.append(float(np.abs(tint).mean()))
    assert steps[1] < 0.7 * steps[0]  # what is beyond 0 to 255 is cut
    again = mezzotint("replay", "blended.png", "-o", "again.png")
    assert again.stdout.splitlines()[1] == "the same, bit for bit"


def test_other_conditions_go_in(models: Path) -> None:
    small = picture("small.png", (16, 16))
    done = mezzotint(
        "sample", models / "ldm-super-resolution.safetensors", "--image", small, *SMALL
    )
    assert done.exit_code == 0, done.output
    assert pixels(done.stdout.strip()).shape == (64, 64, 3)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8) % 5).save(
        "map.png"
    )
    done = mezzotint("sample", models / "ldm-semantic.safetensors", "--map", "map.png", *SMALL)
    assert done.exit_code == 0, done.output
    Path("boxes.json").write_text(json.dumps([{"label": 3, "box": [0.1, 0.1, 0.5, 0.9]}]))
    done = mezzotint("sample", models / "ldm-layout.safetensors", "--layout", "boxes.json", *SMALL)
    assert done.exit_code == 0, done.output
    assert read_request(Path(done.stdout.strip())).layout[0].box == (0.1, 0.1, 0.5, 0.9)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("sd1", ["--image", "in.png"], "the model wants a prompt"),
        ("sd1", ["x", "--mask", "mask.png"], "image: required by the task 'inpainting'"),
        ("sd1", ["x", "--image", "none.png"], "none.png: no such file"),
        ("sd1", ["x", "--image", "in.png", "--padding", "8,8"], "--padding '8,8': expected"),
        ("sd1", ["x", "--high-res-strength", "0.5"], "give that too"),
        ("sd1", ["x", "--map", "in.png"], "not for the task"),
        ("sd1", ["x", "--clip-skip", "7"], "clip_skip: expected 1 to"),
        ("sd1", ["x", "--from", "in.png"], "holds neither a generation request"),
        ("sd1", ["x", "--layout", "in.png"], "in.png: cannot be read as JSON"),
        ("sd1-inpainting", ["x"], "wants a prompt, and a picture and a mask"),
        ("ldm-super-resolution", [], "the model wants a small picture"),
        ("ldm-semantic", [], "the model wants a semantic map"),
        ("ldm-layout", [], "the model wants a layout"),
    ],
)
def test_what_is_missing_or_wrong_is_told(
    models: Path, model: str, arguments: list[str], message: str
) -> None:
    picture("in.png")
    mask("mask.png")
    failed = mezzotint("sample", models / f"{model}.safetensors", *arguments, *SMALL)
    assert isinstance(failed.exception, RequestError), failed.output
    assert message in str(failed.exception)


def test_inspect_says_how_a_picture_was_drawn(models: Path) -> None:
    mezzotint(
        "sample", models / "sd1.safetensors", "a red apple", "--size", 64, *SMALL, "-o", "a.png"
    )
    told = json.loads(mezzotint("inspect", "a.png", "--json").stdout)
    assert told["request"]["prompt"] == "a red apple" and told["ignored"] == {}
    assert "Steps: 2" in told["infotext"]
    assert isinstance(mezzotint("inspect", picture("plain.png")).exception, RequestError)


def test_a_picture_with_adapters_is_replayed_with_the_same_ones(models: Path) -> None:
    width = build("sd1").unet.config.block_out_channels[-1]
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

    def ink(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"lora_down": (2, width), "lora_up": (width, 2)}
        tensors = {
            f"{layer}.{role}.weight": torch.randn(shape, generator=generator)
            for role, shape in shapes.items()
        }
        Path("adapters").mkdir(exist_ok=True)
        save_file(tensors, "adapters/ink.safetensors")

    ink(0)
    call = ("sample", models / "sd1.safetensors", "--size", 64, *SMALL)
    plain = mezzotint(*call, "a red apple", "-o", "plain.png").stdout.strip()
    path = mezzotint(*call, "a red apple <lora:ink:0.8>", "-o", "a.png").stdout.strip()
    assert (pixels(plain) != pixels(path)).any()
    again = mezzotint("replay", path, "-o", "b.png")
    assert again.stdout.splitlines()[1] == "the same, bit for bit"
    ink(1)
    changed = mezzotint("replay", path, "-o", "c.png").exception
    assert isinstance(changed, RequestError) and "other adapters drew it: ink" in str(changed)
    missing = mezzotint(*call, "a red apple", "--adapter", "nik:0.5").exception
    assert isinstance(missing, RequestError) and "did you mean 'ink'" in str(missing)


def test_replay_reads_the_model_as_it_was_read(models: Path) -> None:
    file = models / "sd1.safetensors"
    call = ("sample", file, "a red apple", "--size", 64, *SMALL)
    plain = mezzotint(*call, "-o", "plain.png").stdout.strip()
    path = mezzotint(*call, "--prediction", "v_prediction", "-o", "v.png").stdout.strip()
    assert (pixels(plain) != pixels(path)).any()
    hashes = [read_request(Path(p)).resolved.model_hash for p in (plain, path)]
    assert hashes[0] == hashlib.sha256(file.read_bytes()).hexdigest() != hashes[1]
    assert mezzotint("replay", path).stdout.splitlines()[1] == "the same, bit for bit"


def test_another_sampler_brings_its_own_spacing(models: Path) -> None:
    file = models / "sd1.safetensors"
    call = ("sample", file, "--size", 64, *SMALL)
    mezzotint(*call, "a red apple", "--sampler", "DPM++ 2M Karras", "-o", "a.png")
    drawn = mezzotint(*call, "--from", "a.png", "--sampler", "DPM++ 2M Exponential", "-o", "b.png")
    assert read_request(Path(drawn.stdout.strip())).spacing == "exponential", drawn.output
    strip = mezzotint(*call, "x", "--tiling", "--strip", "denoising").exception
    assert isinstance(strip, RequestError) and "not with tiling" in str(strip)


def test_a_family_that_does_not_fit_is_refused_before_it_is_drawn(models: Path) -> None:
    file = models / "ldm-super-resolution.safetensors"
    told = mezzotint("inspect", file, "--family", "ldm-unconditional", "--json").stdout
    assert any("takes 6 channels where 3 were" in p for p in json.loads(told)["problems"])
    failed = mezzotint("sample", file, "--family", "ldm-unconditional", *SMALL).exception
    assert isinstance(failed, CheckpointError) and "6 channels where 3" in str(failed)


def test_an_old_folder_leaves_nothing_behind(models: Path) -> None:
    mezzotint("convert", models / "sd1.safetensors", "folder", "--to", "diffusers")
    Path("folder/tokenizer/tokenizer.json").write_text("{}")
    again = ("convert", models / "sd1.safetensors", "folder", "--to", "diffusers", "--overwrite")
    assert mezzotint(*again).exit_code == 0
    assert not Path("folder/tokenizer/tokenizer.json").exists()
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"precious")
    kept = mezzotint(*again[:2], "photos", *again[3:]).exception
    assert isinstance(kept, CheckpointError) and Path("photos/a.jpg").exists()


def test_a_strangers_words_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    save_single_file(build("sd1"), tmp_path / "a.ckpt")
    state = open_tensors(tmp_path / "a.ckpt").read() | {"evil\x1b[2Jname": torch.ones(1)}
    save_file(state, tmp_path / "a.safetensors", {"title": "\x1b]0;owned\x07\nfamily      sd2"})
    said = mezzotint("inspect", tmp_path / "a.safetensors").stdout
    assert "\x1b" not in said and "\nfamily      sd2" not in said
