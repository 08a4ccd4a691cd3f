"""A progress bar on standard error, so that standard output holds the results alone."""

import contextlib
from collections.abc import Callable, Generator

__all__ = ["progress"]


@contextlib.contextmanager
def progress(what: object) -> Generator[Callable[[int, int], None]]:
    """Show a bar while pictures are drawn.

    Args:
        what: What is drawn, in words.

    Yields:
        A function of the steps done and the steps in all.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(escape(str(what)), total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
