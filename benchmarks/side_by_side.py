"""What the comparisons with peers share: pairs, the measured peak beside them, JSON and a row.

In one process, A B A B: each pair measures the device's peak, then Mezzotint, then the peer. The
ratio of a comparison is the median over the pairs of Mezzotint's time by the peer's, so that a
machine that is busy, or grows hot, slows both.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from benchmarks.peers import peer_words
from mezzotint.config import Config, Document
from mezzotint.device import (
    PRECISIONS,
    Execution,
    precision_name,
    select_device,
    select_precision,
)
from mezzotint.studies.machine import Machine, this_machine
from mezzotint.studies.speed import peak_flops, seconds_of

AGREEMENT = 1e-4  # of the largest value, in float32, of networks of the same weights
_HALF_AGREEMENT = 0.5  # where one rounds more; networks of different weights differ by 1 and more
_POSITIONAL, _REPEATED = ("stage", "axis"), ("set",)  # of all benchmarks
_IN_NAME = ("pairs", "peer", "precision", "device", *_POSITIONAL)
_TINY_PEAK = {"channels": 64, "side": 16, "calls": 1}


class Comparison(Config):
    """Mezzotint beside a peer.

    Attributes:
        what: Is measured, with its size.
        mezzotint: Its settings.
        peer: Its name and settings.
        seconds: Of Mezzotint, one a pair.
        peer_seconds: Of the peer.
        peaks: Of the device in Mezzotint's precision, before each pair, in operations a second.
        flops: Operations of one call, where they were counted.
        difference: Largest, between both results, over the largest value of the peer's.
        wanted: The largest ratio that is aimed at.
        at: Where it stands on the axis of a `Record`.
        images: That one call makes or trains on.
    """

    what: str
    mezzotint: str
    peer: str
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]
    peaks: tuple[float, ...] = ()
    flops: int | None = None
    difference: float | None = None
    wanted: float | None = None
    at: float | None = None
    images: int = 1

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios: below 1, Mezzotint is faster."""
        pairs = zip(self.seconds, self.peer_seconds, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def share(self) -> float | None:
        """Of the peak, what Mezzotint reaches: the median over the pairs."""
        if self.flops is None or not self.peaks:
            return None
        pairs = zip(self.seconds, self.peaks, strict=True)
        return statistics.median(self.flops / (seconds * peak) for seconds, peak in pairs)


class Record(Document):
    """What one run of a benchmark measured.

    Attributes:
        command: Measures it again.
        tiny: Of networks that are only for rehearsal.
        machine: With Mezzotint's precision.
        versions: Of the packages that took part.
        axis: What varies between the comparisons, if they are a curve.
    """

    command: str
    tiny: bool
    machine: Machine
    versions: dict[str, str]
    axis: Literal["batch", "resolution", "steps"] | None = None
    comparisons: tuple[Comparison, ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read what `finish` wrote."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))


def options_parser(
    doc: str | None, peers: Sequence[str], *, precision: str = "auto"
) -> argparse.ArgumentParser:
    """Return a parser of the options that all comparisons have.

    Args:
        doc: Of the program.
        peers: Their names; the first is the default.
        precision: Mezzotint's, if none is given.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="times that each is measured")
    parser.add_argument("--peer", default=peers[0], choices=peers)
    parser.add_argument(
        "--precision", default=precision, choices=("auto", *PRECISIONS), help="Mezzotint's"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for rehearsal")
    parser.add_argument("--work", type=Path, help="folder where the random model is kept")
    parser.add_argument("--output", type=Path, help="JSON; by default in runs/performance")
    return parser


def execution_of(options: argparse.Namespace) -> Execution:
    """Return the device and Mezzotint's precision on it."""
    return select_precision(options.precision, select_device(options.device))


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Give the folder for what is written on the way."""
    with TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def side_by_side(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    options: argparse.Namespace,
    execution: Execution,
    *,
    peak: bool = True,
    warm_up: bool = True,
) -> dict[str, tuple[float, ...]]:
    """Measure two calls in turns.

    Args:
        ours: Mezzotint's.
        theirs: The peer's.
        options: Say how often.
        execution: Device, and Mezzotint's precision.
        peak: Measure the device's before each pair.
        warm_up: Call each once before; not for processes that start cold.

    Returns:
        The fields of a `Comparison` that are times and peaks.
    """
    (times,) = each_beside([ours], theirs, options, execution, peak=peak, warm_up=warm_up)
    return times


def each_beside(
    ours: Sequence[Callable[[], Any]],
    theirs: Callable[[], Any],
    options: argparse.Namespace,
    execution: Execution,
    *,
    peak: bool = True,
    warm_up: bool = True,
) -> list[dict[str, tuple[float, ...]]]:
    """Measure several of Mezzotint's calls and one of the peer's in turns, as `side_by_side`."""
    device, precision = execution.device, execution.precision
    calls = [*ours, theirs]
    if warm_up:
        for call in calls:
            call()
    peaks: list[float] = []
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(options.pairs):
        if peak:
            peaks.append(peak_flops(device, precision, **(_TINY_PEAK if options.tiny else {})))
        for call, taken in zip(calls, seconds, strict=True):
            taken.append(seconds_of(call, device))
    *mine, peer = map(tuple, seconds)
    return [{"seconds": each, "peer_seconds": peer, "peaks": tuple(peaks)} for each in mine]


def compare_networks(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    options: argparse.Namespace,
    execution: Execution,
    wanted: Mapping[tuple[str, str], float],
    near: str | None = None,
    **told: Any,
) -> Comparison:
    """Measure two calls of networks of the same weights, which must agree.

    Args:
        ours: Mezzotint's.
        theirs: The peer's.
        options: Say which peer, how often, and for how many pictures.
        execution: Device, and Mezzotint's precision.
        wanted: The largest ratios that are aimed at, by peer and precision.
        near: What Mezzotint approximates by, at which no ratio is aimed.
        **told: Other fields of the `Comparison`.
    """
    peer, name = peer_words(options.peer, execution.precision), precision_name(execution.precision)
    apart = must_agree(difference(ours(), theirs()), execution, peer, near=near is not None)
    mine, aim = (f"{name}, {near}", None) if near else (name, wanted.get((options.peer, name)))
    known = {"mezzotint": mine, "peer": peer, "difference": apart, "images": options.batch, **told}
    times = side_by_side(ours, theirs, options, execution)
    return Comparison(wanted=aim, **known, **times)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest value of the second."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def must_agree(found: float, execution: Execution, peer: str, *, near: bool = False) -> float:
    """Return a difference, or end: times of two that do different things say nothing.

    Args:
        found: The difference.
        execution: Mezzotint's precision.
        peer: In words.
        near: Whether Mezzotint approximates.
    """
    both = execution.precision is torch.float32 and "float32" in peer and not near
    most = AGREEMENT if both else _HALF_AGREEMENT
    if not found <= most:
        sys.exit(
            f"Mezzotint and {peer} differ by {found:.1e} of the largest value; expected at most"
            f" {most:.0e}: they do not compute the same"
        )
    return found


def finish(
    name: str,
    comparisons: Sequence[Comparison],
    options: argparse.Namespace,
    execution: Execution,
    *,
    axis: Literal["batch", "resolution", "steps"] | None = None,
) -> Record:
    """Write what was measured, and print its rows.

    Args:
        name: Of the benchmark's module.
        comparisons: What it measured.
        options: As they were given.
        execution: What Mezzotint ran in.
        axis: See `Record`.
    """
    if options.tiny:  # what is aimed at is for the networks of full size
        comparisons = [each.model_copy(update={"wanted": None}) for each in comparisons]
    record = Record(
        command=shlex.join(["python", "-m", f"benchmarks.{name}", *_given(options)]),
        tiny=options.tiny,
        machine=this_machine(execution),
        versions=_versions(),
        axis=axis,
        comparisons=tuple(comparisons),
    )
    path = options.output or _default_output(name, options, record, axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
    console = Console(soft_wrap=True)
    for line in rows(comparisons):
        console.print(line, markup=False, highlight=False)
    console.print(f"written: {path}", markup=False, highlight=False)
    return record


def rows(comparisons: Sequence[Comparison]) -> list[str]:
    """Return a Markdown table of comparisons, line by line."""
    head = (
        "what",
        "Mezzotint",
        "peer",
        "ratio",
        "wanted",
        "s",
        "peer's s",
        "of the peak",
        "differ",
    )
    lines = [f"| {' | '.join(head)} |", "|:--|:--|:--|--:|--:|--:|--:|--:|--:|"]
    for each in comparisons:
        share, apart = each.share, each.difference
        cells = (
            each.what,
            each.mezzotint,
            each.peer,
            f"{each.ratio:.2f}",
            "" if each.wanted is None else f"≤ {each.wanted:.2f}",
            f"{statistics.median(each.seconds):.3g}",
            f"{statistics.median(each.peer_seconds):.3g}",
            "" if share is None else f"{share:.0%}",
            "" if apart is None else f"{apart:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _given(options: argparse.Namespace) -> list[str]:
    """What says what is measured, as it is typed: first what is no option, then the options."""
    first: list[str] = []
    words: list[str] = []
    for name, value in vars(options).items():
        if name in ("work", "output") or value is None or value is False:
            continue
        option = f"--{name.replace('_', '-')}"
        if name in _POSITIONAL:
            first.append(str(value))
        elif name in _REPEATED:
            words += [word for each in value for word in (option, str(each))]
        elif value is True:
            words.append(option)
        else:
            each = value if isinstance(value, list | tuple) else [value]
            words += [option, *(str(v) for v in each)]
    return [*first, *words]


def _default_output(
    name: str, options: argparse.Namespace, record: Record, axis: str | None
) -> Path:
    stage = getattr(options, "stage", None)
    parts = [name, stage, axis, options.peer, record.machine.precision, record.machine.device]
    # and what else was asked for, that one run may not take another's place
    told = {key: value for key, value in vars(options).items() if key not in _IN_NAME}
    parts += _given(argparse.Namespace(**told))
    words = [re.sub(r"[^\w.=]+", "-", part).strip("-") for part in parts if part and part != "cpu"]
    return Path("runs/performance") / f"{'-'.join(words).replace('_', '-')}.json"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("mezzotint", "torch", "diffusers", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
