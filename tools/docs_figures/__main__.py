"""Draw the figures of the documentation's concepts.

    python -m tools.docs_figures [NAME …]

writes those that are named, or all, into ``docs/figures``. Nothing is trained: they show the
mathematics by the code that it is written in, and a stored study.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.docs_figures.conditions import conditions
from tools.docs_figures.drawing import webp
from tools.docs_figures.learning import evaluation, training
from tools.docs_figures.noise import noising, normalization, schedules
from tools.docs_figures.sampling import guidance, samplers
from tools.docs_figures.stages import autoencoders, compression

__all__ = ["FIGURES", "FOLDER", "main"]

FOLDER = Path(__file__).parents[2] / "docs/figures"
FIGURES: dict[str, Callable[[], Figure]] = {
    figure.__name__: figure
    for figure in (
        compression,
        autoencoders,
        schedules,
        noising,
        conditions,
        samplers,
        guidance,
        normalization,
        training,
        evaluation,
    )
}


def main(names: Sequence[str]) -> None:
    """Write figures; all of them if none is named."""
    for name in names:
        if name not in FIGURES:
            sys.exit(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        path = FOLDER / f"{name}.webp"
        path.write_bytes(webp(FIGURES[name]()))
        print(f"{path.relative_to(FOLDER.parents[1])}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
