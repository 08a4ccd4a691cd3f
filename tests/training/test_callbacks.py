"""What is done beside training: sheets of samples, at intervals of training and at the end."""

from pathlib import Path

from mezzotint.training.callbacks import SampleSheets


class Draws:
    """In place of a model: remembers where it drew."""

    def __init__(self) -> None:
        self.drawn: list[Path] = []

    def draw_samples(self, path: Path) -> None:
        self.drawn.append(path)

    def export(self, folder: Path) -> None:
        raise AssertionError("a sheet is no model")


def test_sheets_are_drawn_at_intervals_and_at_the_end(tmp_path):
    task = Draws()
    sheets = SampleSheets(task, tmp_path, 0.5)
    sheets.on_rewind(-1)
    # time counts from where the run begins or goes on, whatever was trained before
    assert not sheets.due(10, 100.0) and not sheets.due(11, 130.0)
    assert sheets.due(12, 130.1) and not task.drawn
    sheets.run(12, 130.1)
    assert not sheets.due(13, 160.0) and sheets.due(14, 160.2)
    sheets.on_checkpoint(14)
    sheets.on_end(15)
    names = [path.name for path in task.drawn]
    assert names == ["step-0000012.png", "step-0000015.png"]
    assert {path.parent for path in task.drawn} == {tmp_path / "samples"}


def test_a_run_draws_one_at_its_end(text_run):
    assert [path.name for path in (text_run / "samples").iterdir()] == ["step-0000004.png"]
