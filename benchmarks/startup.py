"""Starting: importing the package, and pictures from a cold shell, beside diffusers.

    python -m benchmarks.startup [--only import] [--model emoji]

Each is a process of its own, from its start to its end: ``import mezzotint`` beside ``import
diffusers`` and beside Python alone; four pictures of a tiny Stable Diffusion by ``mezzotint
sample`` beside a script that draws them with diffusers; and four pictures of the model that is
shipped, as it draws by default, beside a process that imports torch and ends.
"""

import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.random_models import stable_diffusion
from benchmarks.side_by_side import (
    Comparison,
    execution_of,
    finish,
    options_parser,
    side_by_side,
    work_folder,
)
from mezzotint.device import precision_name

PARTS = ("import", "packages", "sample", "shipped")
PROMPT, PICTURES = "a red apple", 4
IMPORT_SECONDS, SAMPLE_SECONDS = 0.1, 6
ALONE, TORCH = "Python alone", "import torch"
Call = Callable[[], None]
MEZZOTINT = Path(sys.executable).with_name("mezzotint")

_THEIRS = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1]).to(torch.float32)
pipe.set_progress_bar_config(disable=True)
pictures = pipe([sys.argv[2]] * 4, num_inference_steps=int(sys.argv[3]), width=64, height=64).images
for k, picture in enumerate(pictures):
    picture.save(f"{sys.argv[4]}/{k}.png")
"""


def process(*words: str | Path) -> Call:
    """Return a call that runs a command and waits for its end."""

    def call() -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True)

    return call


def processes(part: str, work: Path, options: Namespace) -> tuple[str, str, Call, Call]:
    """Return what of a part is measured: in words, beside what, and the two commands.

    Args:
        part: One of `PARTS`.
        work: Where models and pictures are written.
        options: As they were given.
    """
    python, steps = sys.executable, str(options.steps)
    if part in ("import", "packages"):
        ours = process(python, "-c", "import mezzotint")
        peer, code = (ALONE, "pass") if part == "import" else ("import diffusers",) * 2
        return "import mezzotint, in Python as it starts", peer, ours, process(python, "-c", code)
    drawn = work / "drawn"
    drawn.mkdir(exist_ok=True)
    told = ("--num-images", str(PICTURES), "-o", drawn)
    told += ("--device", options.device, "--precision", options.precision)
    if part == "shipped":
        what = f"mezzotint sample {options.model} -n {PICTURES}"
        ours = process(MEZZOTINT, "sample", options.model, PROMPT, *told)
        return what, TORCH, ours, process(python, "-c", TORCH)
    stable = stable_diffusion(work, tiny=True)
    what = f"mezzotint sample -n {PICTURES} of a tiny Stable Diffusion, {steps} steps"
    ours = process(MEZZOTINT, "sample", stable, PROMPT, "--steps", steps, *told)
    theirs = process(python, "-c", _THEIRS, stable, PROMPT, steps, drawn)
    return what, "the same in a script of diffusers, float32", ours, theirs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, ("diffusers",))
    parser.add_argument("--only", nargs="+", choices=PARTS, help="by default all")
    parser.add_argument("--steps", type=int, default=20, help="of the tiny Stable Diffusion")
    parser.add_argument("--model", default="emoji", help="a shipped model, or a folder")
    options = parser.parse_args(arguments)
    execution = execution_of(options)
    compared: list[Comparison] = []
    with work_folder(options) as work:
        for part in options.only or PARTS:
            what, peer, ours, theirs = processes(part, work, options)
            name = precision_name(execution.precision)
            times = side_by_side(ours, theirs, options, execution, peak=False)
            compared.append(Comparison(what=what, mezzotint=name, peer=peer, **times))
    finish("startup", compared, options, execution)
    for each in compared:
        seconds = statistics.median(each.seconds)
        if each.peer == ALONE:
            seconds -= statistics.median(each.peer_seconds)
            print(f"import mezzotint itself: {seconds:.3f} s (at most {IMPORT_SECONDS})")
        elif each.peer == TORCH:
            print(f"{each.what}: {seconds:.1f} s (at most {SAMPLE_SECONDS})")


if __name__ == "__main__":
    main()
