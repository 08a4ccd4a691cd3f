"""Plant faults in small trainings, and see whether each is named; healthy ones stay unwarned.

    python -m benchmarks.planted_faults [--steps 150] [--only NAME …] [--output FILE.json]

The networks are those of `mezzotint demo`, on the same emoji at 48 pixels. Prints a Markdown table:
what was planted, what the run said of it, and where it went back to.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from rich.console import Console

import mezzotint.training.run as training
from mezzotint.checkpoints.first_stages import load_first_stage, save_first_stage
from mezzotint.config import apply_overrides
from mezzotint.data import open_data
from mezzotint.data.base import Example
from mezzotint.errors import TrainingError
from mezzotint.latent_diffusion import LatentNormalization
from mezzotint.training.any_recipe import Recipe

BROKEN = 7
VQ = "{kind: vq, codebook_size: 256, embedding_dim: 4, mid_attention: false, layers_per_block: 1"
VQ += ", block_out_channels: [32, 64, 128]}"
MILD = "{start_step: 60, pretrain_steps: 30, discriminator: {channels: 32, layers: 2}}"
STRONG = "{start_step: 0, pretrain_steps: 0, weight: 10, learning_rate: 1.0e-2"
STRONG += ", discriminator: {channels: 32, layers: 2}}"


class WithNaN:
    """Data of a broken source: one image is no number."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int, generator: torch.Generator | None = None) -> Example:
        """Return an example."""
        example = self.data.load(index, generator)
        broken = index == BROKEN
        return replace(example, image=example.image * torch.nan) if broken else example


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        name: On the command line and in the table.
        recipe: A shipped one.
        changes: To it; values in YAML.
        expected: The warning that names its fault; None for a healthy run.
        prepare: Makes what the changes speak of in a folder, from a healthy first stage's run.
        nan: Whether an image is no number.
    """

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    expected: str | None = None
    prepare: Callable[[Path, Path], None] | None = None
    nan: bool = False


def wrong_scale(stage: Path, folder: Path) -> None:
    """Write a first stage whose latents are taken to be five times as small as they are."""
    first_stage, measured = load_first_stage(stage / "model" / "vae")
    wrong = LatentNormalization(measured.mean, measured.std / 5)
    save_first_stage(first_stage, wrong, folder / "stage" / "vae", torch.float32)


def one_caption(stage: Path, folder: Path) -> None:
    """Write pictures that are all called the same."""
    data = open_data(training.load_recipe("emoji-demo").data)
    lines: list[str] = []
    (folder / "images").mkdir()
    for k in range(len(data)):
        pixels = data.load(k).image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": "an emoji"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))


STAGE, DIFFUSION = "emoji-demo-autoencoder", "emoji-demo"
VQ_CHANGES = (f"model={VQ}", "normalization=scalar", f"loss.adversarial={MILD}")
CLASS = "conditioning={kind: class, width: 128}"
FOLDER = "{kind: folder, path: FOLDER/images, resolution: 48, caption_column: text}"
CASES = (
    Case("healthy KL", STAGE),
    Case("healthy VQ with discriminator", STAGE, VQ_CHANGES),
    Case("healthy class", DIFFUSION, (CLASS,)),
    Case(
        "learning rate x100, first stage",
        STAGE,
        ("optimizer.learning_rate=0.15",),
        "learning rate",
    ),
    Case(
        "learning rate x100, diffusion",
        DIFFUSION,
        ("optimizer.learning_rate=0.1",),
        "learning rate",
    ),
    Case(
        "dead codebook",
        STAGE,
        (
            f"model={VQ.replace('256', '1024')}",
            "normalization=scalar",
            "data={kind: emoji, resolution: 48}",
        ),
        "codebook",
    ),
    Case(
        "discriminator too early and too strong",
        STAGE,
        (f"loss.adversarial={STRONG}",),
        "discriminator",
    ),
    Case(
        "unnormalised latents",
        DIFFUSION,
        ("first_stage={kind: trained, path: FOLDER/stage}",),
        "latents",
        wrong_scale,
    ),
    Case("a NaN image", STAGE, (), "rollback", nan=True),
    Case("constant captions", DIFFUSION, (f"data={FOLDER}",), "captions", one_caption),
)


def recipe_of(case: Case, steps: int, stage: Path, folder: Path) -> Recipe:
    """Return the recipe of a case, for so many steps."""
    loaded = training.load_recipe(case.recipe)
    changes = [
        f"budget={{max_steps: {steps}}}",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
        "run={log_steps: 10, checkpoint_minutes: 1000, sample_minutes: 1000}",
    ]
    if loaded.kind == "diffusion":
        changes += [f"first_stage={{kind: trained, path: {stage}}}", "latent_variants=1"]
    changes += [change.replace("FOLDER", str(folder)) for change in case.changes]
    return type(loaded).from_dict(apply_overrides(loaded.to_dict(), changes))


def carry_out(case: Case, steps: int, stage: Path, folder: Path) -> dict[str, Any]:
    """Train a case; returns what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    if case.prepare is not None:
        case.prepare(stage, folder)
    run = folder / "run"
    real = training.open_training_data
    opened = (lambda config, *_: WithNaN(open_data(config))) if case.nan else real
    begun, stopped = time.perf_counter(), None
    try:
        with patch.object(training, "open_training_data", opened):
            training.train(
                recipe_of(case, steps, stage, folder), output=run, console=Console(quiet=True)
            )
    except TrainingError as error:
        stopped = str(error)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = {row["warning"]: row["text"] for row in rows if "warning" in row}
    others = set(said) - {case.expected, "rollback"}
    right = not said if case.expected is None else case.expected in said and not others
    if case.nan:
        right = right and f"image {BROKEN}" in said["rollback"]
    return {
        "name": case.name,
        "right": right,
        "said": said,
        "stopped": stopped,
        "seconds": round(time.perf_counter() - begun, 1),
        "last": rows[-1],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = ["| training | named | what it said | went back |", "| --- | --- | --- | --- |"]
    for result in results:
        said = dict(result["said"])
        back = said.pop("rollback", "")
        first = next(iter(said.values()), back or "nothing")
        first = first.partition(". Gone back")[0].partition(";")[0]
        way = back.rpartition("Gone back ")[2] if back else ""
        way += ", then stopped with a report" if result["stopped"] else ""
        right = "yes" if result["right"] else "NO"
        lines.append(f"| {result['name']} | {right} | {first} | {way} |")
    return "\n".join(lines)


def main() -> None:
    """Train all, or some, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], default=None)
    parser.add_argument("--stage", type=Path, help="a finished run of the first stage, to reuse")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only is None or case.name in options.only]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        stage = options.stage or place / "stage" / "run"
        if not (stage / "model").exists():
            carry_out(CASES[0], options.steps, stage, stage.parent)
        results: list[dict[str, Any]] = []
        for number, case in enumerate(chosen):
            results.append(carry_out(case, options.steps, stage, place / str(number)))
            print(f"{case.name}: {results[-1]['seconds']} s", flush=True)
    print(table(results))
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
