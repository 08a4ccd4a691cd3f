"""How the time of drawing grows with the batch, the resolution and the steps, beside diffusers.

    python -m benchmarks.growth batch
    python -m benchmarks.growth resolution
    python -m benchmarks.growth steps

Whole pictures of Stable Diffusion 1.5 with random weights; what does not vary is a batch of one,
256 x 256 pixels and 2 steps. Prints the exponents that fit: 1 is proportional to the pictures, to
the pixels or to the steps.
"""

import math
import statistics
from collections.abc import Sequence

from benchmarks.peers import PIPELINE_PEERS, peer_words
from benchmarks.random_models import stable_diffusion
from benchmarks.side_by_side import (
    Comparison,
    Record,
    execution_of,
    finish,
    options_parser,
    side_by_side,
    work_folder,
)
from benchmarks.text_to_image import drawing_ours, drawing_theirs
from mezzotint.device import precision_name

SIDE, STEPS = 256, 2
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16),
    "resolution": (256, 384, 512, 768, 1024),
    "steps": (2, 5, 10, 20),
}
TINY: dict[str, tuple[int, ...]] = {"batch": (1, 2), "resolution": (64, 128), "steps": (1, 2)}


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit seconds = a value^b by least squares of the logarithms, and return b."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def exponents(record: Record) -> tuple[float, float]:
    """Return Mezzotint's exponent and the peer's; along resolution that of the pixels."""
    power = 2 if record.axis == "resolution" else 1
    at = [(each.at or 0.0) ** power for each in record.comparisons]
    ours = [statistics.median(each.seconds) for each in record.comparisons]
    theirs = [statistics.median(each.peer_seconds) for each in record.comparisons]
    return exponent(at, ours), exponent(at, theirs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, PIPELINE_PEERS)
    parser.add_argument("axis", choices=AXES)
    parser.add_argument("--values", type=int, nargs="+", help="at least two; by default all")
    options = parser.parse_args(arguments)
    execution = execution_of(options)
    axis, base = options.axis, {"batch": 1, "resolution": SIDE, "steps": STEPS}
    if options.tiny:
        base["resolution"] = 64
    values = options.values or (TINY if options.tiny else AXES)[axis]
    if len(values) < 2:
        parser.error("--values: a curve has at least two points")
    compared: list[Comparison] = []
    with work_folder(options) as work:
        folder = stable_diffusion(work, tiny=options.tiny)
        draw_ours = drawing_ours(folder, options)
        draw_theirs = drawing_theirs(folder, options, execution)
        for value in sorted(values):
            size = tuple({**base, axis: value}.values())
            times = side_by_side(
                lambda size=size: draw_ours(*size),
                lambda size=size: draw_theirs(*size),
                options,
                execution,
            )
            compared.append(
                Comparison(
                    what=f"drawing {size[0]} x {size[1]} x {size[1]}, {size[2]} steps",
                    mezzotint=precision_name(execution.precision),
                    peer=peer_words(options.peer, execution.precision),
                    at=value,
                    images=size[0],
                    **times,
                )
            )
    record = finish("growth", compared, options, execution, axis=axis)
    ours, theirs = exponents(record)
    print(f"grows with the power {ours:.2f}; {record.comparisons[0].peer}: {theirs:.2f}")


if __name__ == "__main__":
    main()
