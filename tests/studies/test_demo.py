"""The demonstration draws with the model that is shipped, and what it draws is what was asked."""

import pytest
import torch
from PIL import Image
from rich.console import Console
from tools.shipped_card.scoring import Asked, concept_accuracy, pixels

from mezzotint.checkpoints.shipped import find_shipped
from mezzotint.data.portraits import is_held_out
from mezzotint.errors import CheckpointError
from mezzotint.evaluation.pictures import evenly
from mezzotint.generation.metadata import read_request
from mezzotint.studies import demo


def test_the_shipped_model_draws_known_and_held_out_captions(tmp_path) -> None:
    console = Console(record=True, quiet=True, width=200)
    grid = demo.run_demo(tmp_path, console)
    with Image.open(grid) as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 2 * 128
    folder = find_shipped(demo.MODEL)
    assert folder is not None
    data = demo.trained_portraits(folder)
    captions, labels = demo.demo_captions(data, 16)
    files = sorted(tmp_path.glob("[0-9]*.png"))
    assert [read_request(file).prompt for file in files] == captions
    chosen = evenly(16, len(data.concepts))
    asked = [
        Asked(label, data.held_out_colour(label) if n % 2 else "white")
        for n, label in enumerate(chosen)
    ]
    held_out = [
        is_held_out(data.concepts[a.label].name, a.colour, second_style=False) for a in asked
    ]
    assert held_out == [label.endswith("*") for label in labels] == [False, True] * 8
    drawn = [pixels(Image.open(file)) for file in files]
    assert concept_accuracy(data, asked, drawn) >= 0.25  # among 64; chance is 1.6 %
    assert torch.stack(drawn).float().std() > 20


def test_a_package_without_it_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "find_shipped", lambda name: None)
    with pytest.raises(CheckpointError, match="'emoji' is not in this package"):
        demo.run_demo(tmp_path)
