"""Measure shipped models on what training held out; write their cards and docs/results/shipped.md.

python -m tools.shipped_card emoji
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from mezzotint.errors import CheckpointError, MezzotintError
from mezzotint.generation.pipeline import Pipeline, load
from tools.shipped_card import inpaint, scenes, text, upscale
from tools.shipped_card.scoring import Card, table
from tools.train_shipped.ship import CARD, DRAWN, MODELS, ROOT, describe_training, read_made

_MEASURE: dict[str, Callable[[Pipeline, Path, str, int], Card]] = {
    DRAWN: text.card,
    "inpaint": inpaint.card,
    "scenes": scenes.card,
    "upscale": upscale.card,
}


def write(name: str, folder: Path, docs: Path, most: int, device: str) -> list[str]:
    """Measure a model and write its card, its numbers and its pictures.

    Args:
        name: The model's.
        folder: Its files.
        docs: Where results stand.
        most: Pictures of each kind at most.
        device: What it runs on.

    Returns:
        The card's lines.
    """
    made = read_made(folder)
    stage = made["stages"][-1]
    card = _MEASURE[stage](load(folder, device), folder, stage, most)
    lines = [*describe_training(name, made), *table(card)]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = docs / "shipped"
    results.mkdir(parents=True, exist_ok=True)
    card.sheet.save(results / f"{name}.webp", quality=72, method=6)
    numbers = {**card.numbers, "shown": card.shown}
    (results / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return lines


def write_page(models: Path, docs: Path) -> None:
    """Write the page of all models that have a card and pictures."""
    lines = ["# Shipped models", "", "Written by `python -m tools.shipped_card NAME`."]
    for sheet in sorted((docs / "shipped").glob("*.webp")):
        card = models / sheet.stem / CARD
        if not card.is_file():
            continue
        shown = json.loads(sheet.with_suffix(".json").read_text())["shown"]
        lines += ["", *(f"#{line}" if line.startswith("# ") else line for line in _lines(card))]
        lines += ["", shown, "", f"![drawn](shipped/{sheet.name})"]
    (docs / "shipped.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip().splitlines()


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; exit code 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.shipped_card", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", help="the shipped model's name, such as emoji")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of shipped models")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/results", metavar="FOLDER")
    parser.add_argument("--pictures", type=int, default=256, help="of each kind, at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    told = parser.parse_args(arguments)
    folder = told.models / told.model
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such model; train it, then ship it by --ship")
        lines = write(told.model, folder, told.docs, told.pictures, told.device)
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    write_page(told.models, told.docs)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
