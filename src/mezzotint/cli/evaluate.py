"""``mezzotint evaluate``."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mezzotint.evaluation.card import EvaluationCard, PictureRecord

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FOLDER",
            help="A model, a finished run of either stage, or a folder of pictures.",
        ),
    ],
    against: Annotated[
        str, typer.Option(help="A folder of real pictures or of a data set's splits, or emoji.")
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.yaml",
            help="small, ldm-2022, adm, clean-fid, torch-fidelity, or one's own. Default: small;"
            " reconstruction for a first stage.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Pictures to measure, if not as many.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of the real data: train, validation, test or all.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Bring a folder's pictures and the real ones to this side.")
    ] = None,
    against_resolution: Annotated[
        int | None, typer.Option(help="Bring the real pictures alone to this side.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Of the real pictures' metadata file. Default: text.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Picture k is drawn from seed + k.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpmpp_2m, …, or 'Euler a'")
    ] = None,
    spacing: Annotated[
        str | None, typer.Option(help="trailing, leading, linspace, karras, …")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--guidance", help="1 is no guidance.")
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Noise levels outside which there is none."),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise of ddim and its kin.")] = None,
    feature_reuse: Annotated[
        str | None, typer.Option(metavar="N[:BLOCKS]", help="As of mezzotint sample.")
    ] = None,
    token_merging: Annotated[
        float | None, typer.Option(metavar="RATIO", help="As of mezzotint sample.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[#SHA256]", help="Where the weights of a feature network are."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(help="How many share the work.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    quantization: Annotated[
        Literal["none", "int8"], typer.Option(help="As of mezzotint sample.")
    ] = "none",
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what is drawn here. Default: until it is measured."),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write some of the pictures.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CARD.json", help="Default: outputs/")
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--compare", metavar="CARD.json", help="A card to compare with.")
    ] = None,
) -> None:
    """Measure a model or a folder of pictures; run it again to go on where it was stopped."""
    from mezzotint.cli.asked import interval, reuse_of
    from mezzotint.evaluation.card import EvaluationCard
    from mezzotint.evaluation.evaluate import default_protocol
    from mezzotint.evaluation.evaluate import evaluate as measure

    before = EvaluationCard.read(other) if other is not None else None
    path = _card_path(output, model, protocol or default_protocol(model))
    if grid is not None:
        _check_writable("--grid", grid)
    with contextlib.closing(_Bars()) as bars:

        def tell(card: EvaluationCard) -> None:
            bars.close()  # which would draw what is printed now onto themselves
            _print(card)
            card.write(path)
            print(path)
            if before is not None:
                _print_differences(before, card, other)

        measure(
            model,
            against,
            protocol,
            samples=samples,
            split=split,
            resolution=resolution,
            against_resolution=against_resolution,
            caption_column=caption_column,
            weights=_weights(weights or ()),
            device=device,
            precision=precision,
            engine=engine,
            quantization=quantization,
            processes=processes,
            work=work,
            grid=grid,
            compare_with=before,
            on_card=tell,
            on_progress=bars,
            seed=seed,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            guidance_scale=guidance_scale,
            guidance_interval=interval(guidance_interval),
            eta=eta,
            feature_reuse=reuse_of(feature_reuse),
            token_merging=token_merging,
        )


def _card_path(output: Path | None, model: str, protocol: str) -> Path:
    from mezzotint.cli.output import DEFAULT_FOLDER, free, slug
    from mezzotint.errors import DataError

    if output is None:
        name = f"{slug(Path(model).name)}-{slug(Path(protocol).stem)}.json"
        output = free(DEFAULT_FOLDER / name)
    if output.suffix.lower() != ".json":
        raise DataError(f"--output {output}: a card is written as JSON; name it *.json")
    _check_writable("--output", output)
    return output


def _check_writable(option: str, path: Path) -> None:
    """Refuse, before hours of drawing, a file that could not be written after them."""
    from mezzotint.errors import DataError

    if path.is_dir():
        raise DataError(f"{option} {path}: is a folder; name a file")
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "cannot be written into" if place.is_dir() else "is a file, not a folder"
        raise DataError(f"{option} {path}: {place} {what}; choose another")


def _weights(options: Sequence[str]) -> dict[str, str]:
    from mezzotint.errors import ConfigError

    found: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--weights {option}: expected NAME=PATH, or NAME=PATH#SHA256")
        found[name] = path
    return found


class _Bars:
    """One bar after the other, each for what is being done."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._shown: dict[str, Callable[[int, int], None]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        from mezzotint.cli.progress import progress

        if what not in self._shown:
            self.close()
            self._shown[what] = self._stack.enter_context(progress(what))
        self._shown[what](done, total)

    def close(self) -> None:
        self._stack.close()
        self._shown.clear()


def _print_differences(before: "EvaluationCard", card: "EvaluationCard", other: object) -> None:
    from mezzotint.evaluation.card import compare

    for name, difference in compare(before, card).items():
        error = difference.standard_error
        sure = "" if error is None else f" ± {error:.4g}"
        print(f"{name} {difference.value:+.4g}{sure} against {other}")


def _print(card: "EvaluationCard") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    table = Table.grid(padding=(0, 2))
    for name, number in card.numbers.items():
        error = number.standard_error
        table.add_row(name, f"{number.value:.5g}", "" if error is None else f"± {error:.2g}")
    judged, real = card.evaluated, card.reference
    print(f"protocol {card.protocol.name}: {judged.count:,} pictures of {_called(judged)}")
    print(f"against {real.count:,} of {_called(real)}")
    console.print(table)
    for metric, why in card.left_out.items():
        print(f"{metric}: left out: {why}")
    if card.training is not None:
        print(f"copies were looked for among {card.training.count:,} of {_called(card.training)}")
    for record in (judged, real):
        if record.converted:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(record.converted.items()))
            print(f"{record.description}: converted to RGB: {kinds}")
        if record.broken:
            print(f"{record.description}: {record.broken} broken pictures were skipped")
    cost = card.cost
    if cost.features_seconds is None:
        print(f"a picture took {1000 * (cost.pictures_seconds or 0):.2f} ms")
        return
    verb = "drawn" if card.drawn_with is not None else "read"
    print(
        f"a picture was {verb} in {1000 * (cost.pictures_seconds or 0):.2f} ms and seen by the"
        f" networks in {1000 * cost.features_seconds:.2f} ms, of one process of"
        f" {cost.processes}"
    )


def _called(record: "PictureRecord") -> str:
    return f"{record.description}{f', {record.split}' if record.split else ''}"
