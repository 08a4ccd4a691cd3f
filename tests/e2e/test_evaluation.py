"""Whoever computes the batches, and however often they are killed, the numbers are the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from mezzotint import evaluate
from mezzotint.config import to_yaml
from mezzotint.evaluation.card import EvaluationCard
from mezzotint.evaluation.protocol import EvaluationProtocol

MEZZOTINT, TORCHRUN = (str(Path(sys.executable).with_name(n)) for n in ("mezzotint", "torchrun"))
REAL = "emoji:validation"
PROTOCOL = EvaluationProtocol(
    name="tiny",
    metrics=("kid", "fid", "precision", "recall", "nearest_training"),
    network="random",
    resize="bicubic-antialias",
    samples=64,
    fewer=True,
    kid_subsets=None,
    resamples=2,
    batch_size=8,
)
STEPS = 2

Start = Callable[..., subprocess.Popen[str]]


def numbers(card: EvaluationCard) -> dict[str, float]:
    return {name: n.value for name, n in card.numbers.items()}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def expected(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The numbers of one process that nothing disturbed."""
    work = tmp_path_factory.mktemp("whole") / "work"
    return numbers(evaluate(text_run, REAL, PROTOCOL, steps=STEPS, work=work))


@pytest.fixture
def start(text_run: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the same evaluation by the command line."""
    (tmp_path / "tiny.yaml").write_text(to_yaml(PROTOCOL))
    started: list[subprocess.Popen[str]] = []

    def begin(
        card: str, *options: str, launcher: tuple[str, ...] = (), **variables: str
    ) -> subprocess.Popen[str]:
        command = [*launcher, MEZZOTINT, "evaluate", str(text_run), "--against", REAL, *options]
        command += ["--protocol", "tiny.yaml", "--steps", str(STEPS), "-o", card]
        with (tmp_path / "errors.txt").open("w") as errors:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **variables},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_two_processes_give_the_same(text_run: Path, expected: dict[str, float]) -> None:
    assert expected["kid_random"] > 0.01  # far enough from 0 for a relative error
    card = evaluate(text_run, REAL, PROTOCOL, steps=STEPS, processes=2)
    assert numbers(card) == pytest.approx(expected, rel=1e-6)
    assert card.cost.processes == 2


def test_two_threads_give_the_same(text_run: Path, expected: dict[str, float]) -> None:
    """What a process of two threads draws and sees, two processes of one thread do too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = numbers(evaluate(text_run, REAL, PROTOCOL, steps=STEPS))
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_ranks_of_torchrun_give_the_same(
    start: Start, tmp_path: Path, expected: dict[str, float]
) -> None:
    launcher = (TORCHRUN, "--standalone", "--no-python", "--nproc-per-node", "2")
    # with a cache of their own, so that they share the work on the real pictures too
    process = start("card.json", launcher=launcher, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert process.wait(timeout=100) == 0, (tmp_path / "errors.txt").read_text()
    found = numbers(EvaluationCard.read(tmp_path / "card.json"))
    assert found == pytest.approx(expected, rel=1e-6)
    assert list((tmp_path / "cache" / "mezzotint" / "evaluations").iterdir()) == []


def test_a_run_killed_half_way_goes_on_and_gives_the_same(
    start: Start, tmp_path: Path, expected: dict[str, float]
) -> None:
    """Killed with two processes, it goes on with one."""
    work = tmp_path / "work"
    process = start("card.json", "--work", "work", "--processes", "2")
    deadline = time.monotonic() + 100
    while len(done := list(work.glob("evaluated/[0-9]*.safetensors"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the two that it started notice at their next batch
    done = list(work.glob("evaluated/[0-9]*.safetensors"))
    assert 2 <= len(done) < 8 and not (tmp_path / "card.json").exists()
    before = {path: path.stat().st_mtime_ns for path in done}
    again = start("card.json", "--work", "work")
    assert again.wait(timeout=100) == 0, (tmp_path / "errors.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in done} == before
    found = numbers(EvaluationCard.read(tmp_path / "card.json"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(tmp_path / "folder" / f"{side}.png")
    command = [MEZZOTINT, "evaluate", "folder", "--against", "emoji"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "folder/8.png is 8 x 8 pixels, folder/9.png is 9 x 9" in lines[0]
