"""The command line: its surface, its speed, and one line for each mistake."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

import mezzotint
from mezzotint.cli import main as cli

Run = Callable[..., tuple[int, str, str]]

MEZZOTINT = Path(sys.executable).with_name("mezzotint")

SURFACE = {
    "demo": {"--output", "-o", "--train"},
    "train": {
        "recipe",
        "--set",
        "--output",
        "-o",
        "--resume",
        "--stop-after",
        "--verify-resume",
        "--device",
    },
    "sample": {
        "model",
        "prompts",
        "--class",
        "--num-images",
        "-n",
        "--seed",
        "--steps",
        "--sampler",
        "--spacing",
        "--guidance-scale",
        "--guidance-rescale",
        "--guidance-interval",
        "--guide",
        "--eta",
        "--from",
        "--variation-seed",
        "--variation-strength",
        "--negative",
        "--emphasis",
        "--clip-skip",
        "--adapter",
        "--image",
        "--low-res",
        "--mask",
        "--poisson-blending",
        "--strength",
        "--padding",
        "--map",
        "--layout",
        "--size",
        "--high-res",
        "--high-res-strength",
        "--high-res-steps",
        "--upscaler",
        "--tiling",
        "--tiled-sampling",
        "--tiled-decoding",
        "--feature-reuse",
        "--token-merging",
        "--precision",
        "--device",
        "--engine",
        "--decoder",
        "--offload",
        "--quantization",
        "--config",
        "--family",
        "--prediction",
        "--weights",
        "--back-projection",
        "--batch-size",
        "--strip",
        "--output",
        "-o",
    },
    "inspect": {"file", "--json", "--hash", "--config", "--family", "--prediction"},
    "convert": {
        "source",
        "target",
        "--to",
        "--precision",
        "--weights",
        "--config",
        "--family",
        "--prediction",
        "--overwrite",
    },
    "evaluate": {
        "model",
        "--against",
        "--protocol",
        "--samples",
        "-n",
        "--split",
        "--resolution",
        "--against-resolution",
        "--caption-column",
        "--seed",
        "--steps",
        "--sampler",
        "--spacing",
        "--guidance-scale",
        "--guidance",
        "--guidance-interval",
        "--eta",
        "--feature-reuse",
        "--token-merging",
        "--weights",
        "--processes",
        "--precision",
        "--device",
        "--engine",
        "--quantization",
        "--work",
        "--grid",
        "--output",
        "-o",
        "--compare",
    },
    "data cache": {"recipe", "--set", "--output", "-o", "--prune", "--device"},
    "data inspect": {"source", "--caption-column", "--class-column", "--json"},
    "data pack": {
        "source",
        "--output",
        "-o",
        "--shard-size",
        "--caption-column",
        "--class-column",
    },
    "study compression": {
        "--output",
        "-o",
        "--work",
        "--stages",
        "--seeds",
        "--scale",
        "--device",
        "--report-only",
    },
    "study conditions": {
        "--output",
        "-o",
        "--work",
        "--only",
        "--pictures",
        "--minutes",
        "--device",
        "--report-only",
    },
    "study objectives": {
        "--output",
        "-o",
        "--work",
        "--only",
        "--seeds",
        "--steps",
        "--minutes",
        "--pictures",
        "--autoencoder",
        "--set",
        "--device",
        "--report-only",
    },
    "study sampling": {
        "model",
        "--against",
        "--samples",
        "--steps",
        "--samplers",
        "--scales",
        "--guidance-scale",
        "--seed",
        "--precision",
        "--device",
        "--output",
        "-o",
    },
    "average": {"run", "--sigma-rel", "--at-step", "--output", "-o", "--device"},
    "replay": {
        "image",
        "--model",
        "--device",
        "--engine",
        "--decoder",
        "--offload",
        "--quantization",
        "--output",
        "-o",
        "--input",
    },
    "bench": {
        "model",
        "--quick",
        "--steps",
        "--json",
        "--precision",
        "--device",
        "--engine",
        "--quantization",
    },
    "doctor": set[str](),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return code, printed.out, printed.err

    return call


def one_line(result: tuple[int, str, str]) -> str:
    """The one message of a run that ended with exit code 2."""
    code, _, errors = result
    assert code == 2
    assert errors.startswith("mezzotint: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("mezzotint: ").rstrip("\n")


def test_the_commands_and_their_flags() -> None:
    commands = dict(get_command(cli.app).commands)  # pyright: ignore
    for group in ("data", "study"):
        parts = commands.pop(group).commands
        commands |= {f"{group} {name}": command for name, command in parts.items()}
    surface = {
        name: {
            option
            for p in command.params
            if p.name != "help"
            for option in (p.opts if p.param_type_name == "option" else [p.name])
        }
        for name, command in commands.items()
    }
    assert surface == SURFACE


def test_help_is_there_within_half_a_second_and_without_torch() -> None:
    seconds: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        done = subprocess.run([MEZZOTINT, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        assert done.returncode == 0
        assert all(name.partition(" ")[0] in done.stdout for name in SURFACE)
    # other work on the machine only adds to the time, so the least is the command's own
    assert min(seconds) <= 0.5

    code = "import sys; from mezzotint.cli.main import main; sys.argv[1:] = ['--help']\n"
    code += "try: main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"mezzotint {mezzotint.__version__}\n", "")


def test_doctor_says_what_is_used_and_why(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    words = ["mezzotint", "python", "torch", "threads", "memory", "device", "precision", "extra"]
    words += ["weights", "attention"]
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sampel"], "Did you mean 'sample'?"),
        (["sample"], "Missing argument"),
        (["sample", "m", "--sede", "3"], "No such option"),
        (["sample", "m", "--steps", "many"], "Invalid value for '--steps'"),
        (["sample", "m", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ],
)
def test_wrong_usage_ends_with_two(run: Run, arguments: list[str], told: str) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert told in " ".join(errors.split())
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--steps", "0"], "request: steps: Input should be greater than or equal to 1, got 0"),
        (["--steps", "-3"], "request: steps: Input should be greater than or equal to 1, got -3"),
        (["--seed", "-1"], "request: seed: Input should be greater than or equal to 0, got -1"),
        (["--num-images", "0"], "request: num_images: Input should be greater than or equal to 1"),
        (["--spacing", "cubic"], "request: spacing: Input should be 'leading', 'trailing'"),
        (["--feature-reuse", "0"], "request: feature_reuse.interval: Input should be greater"),
        (["--feature-reuse", "all"], "--feature-reuse 'all': expected every how many steps"),
        (["--token-merging", "0.9"], "request: token_merging: Input should be less than"),
        (["--guidance-scale", "-1"], "request: guidance_scale: Input should be greater than"),
        (["--size", "big"], "--size 'big': expected pixels, as in 64 or 64x48"),
        (["--size", "64x"], "--size '64x': expected pixels, as in 64 or 64x48"),
        (["--size", "0"], "\n"),
        (["--class", "fruit"], "request: class_label: not for the task 'text-to-image'"),
        (["-o", "apple.gif"], "--output apple.gif: expected a folder, or a file named *.png"),
        (["--device", "gpu"], "device 'gpu': did you mean 'cpu'?"),
        (["--engine", "openvin"], "engine 'openvin': did you mean 'openvino'?"),
        (["--precision", "bf16"], "precision 'bf16': did you mean 'bfloat16'?"),
    ],
)
def test_a_request_that_nothing_could_draw_is_refused_before_a_model_is_looked_for(
    run: Run, options: list[str], told: str
) -> None:
    result = run("sample", "no-such-model", "a red apple", *options)
    if told == "\n":  # width and height are both wrong, each told in its line
        assert result[0] == 2
        assert "  width: Input should be" in result[2]
        assert "  height: Input should be" in result[2]
    else:
        assert one_line(result).startswith(told)


def test_an_unknown_sampler_is_told_with_the_list(run: Run) -> None:
    told = one_line(run("sample", "no-such-model", "a red apple", "--sampler", "dpmpp2m"))
    assert told.startswith("request: sampler: unknown sampler 'dpmpp2m'; did you mean 'dpmpp_2m'?")
    assert told.endswith(
        "Choose from: ddim, ddpm, dpm2, dpm2_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, euler,"
        " euler_ancestral, heun, lcm, lms, plms, unipc"
    )


def test_a_missing_model_is_told_with_the_nearest(run: Run) -> None:
    folder = Path("runs/emoji")
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    told = one_line(run("sample", "runs/emoij", "a red apple"))
    assert told.startswith("runs/emoij: no such model folder; did you mean 'emoji'?")
    assert not Path("outputs").exists()


def test_a_missing_recipe_is_told_with_the_nearest(run: Run) -> None:
    told = one_line(run("train", "emoji-dmeo"))
    assert told.startswith("emoji-dmeo: no such recipe file, and no shipped recipe of this name;")
    assert "did you mean 'emoji-demo'?" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.learning_rat=1", "'optimizer.learning_rat'; did you mean 'learning_rate'?"),
        ("bathc_size=4", "unknown key 'bathc_size'; did you mean 'batch_size'?"),
        ("batch_size=0", "batch_size: "),
        ("batch_size", "override 'batch_size': expected dotted.key=value"),
    ],
)
def test_a_wrong_key_or_value_of_a_recipe_is_told(run: Run, override: str, told: str) -> None:
    assert told in one_line(run("train", "emoji-demo", "--set", override))
    assert not Path("runs").exists()


def test_a_recipe_file_that_is_no_recipe_is_told(run: Run) -> None:
    Path("mine.yaml").write_text("kind: [\n")
    assert one_line(run("train", "mine.yaml")) == "mine.yaml, line 2: not valid YAML"


@pytest.mark.parametrize("name", ["plain.png", "photo.jpg"])
def test_a_picture_without_a_request_cannot_be_replayed(run: Run, name: str) -> None:
    Image.new("RGB", (8, 8)).save(name)
    assert one_line(run("replay", name)) == (
        f"{name}: holds no generation request; only pictures drawn by Mezzotint can be replayed"
    )
    assert one_line(run("replay", "none.png")) == "none.png: no such file"
    assert not Path("outputs").exists()


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [MEZZOTINT, "replay", "none.png"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "mezzotint: none.png: no such file\n")


def test_an_interruption_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mezzotint.studies.demo.run_demo", interrupted)
    assert run("demo")[0] == 130


def test_the_demonstration_trains_only_if_asked_to(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, Path]] = []
    for name, function in (("demo", "run_demo"), ("training_demo", "run_training_demo")):
        monkeypatch.setattr(
            f"mezzotint.studies.{name}.{function}",
            lambda output, name=name: called.append((name, output)),
        )
    for words in (["demo"], ["demo", "--train"], ["demo", "--train", "-o", "elsewhere"]):
        assert run(*words)[0] == 0
    where = [Path("outputs/demo"), Path("runs/demo"), Path("elsewhere")]
    assert called == list(zip(["demo", "training_demo", "training_demo"], where, strict=True))


def test_a_fault_of_our_own_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mezzotint.studies.demo.run_demo", faulty)
    monkeypatch.setattr(sys, "argv", ["mezzotint", "demo"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()
