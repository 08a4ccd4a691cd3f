"""``mezzotint data``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.errors import printable

if TYPE_CHECKING:
    from mezzotint.data import AnyDataConfig

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder, a pattern of tar or parquet files, hub:NAME, or a recipe.",
    ),
]
CaptionsOption = Annotated[
    str | None,
    typer.Option("--caption-column", help="Column of the captions. Default: looked for."),
]
ClassesOption = Annotated[
    str | None, typer.Option("--class-column", help="Column of the classes. Default: looked for.")
]


@app.callback()
def data() -> None:
    """Look at the data, write them as shards, or encode them before training."""


@app.command()
def inspect(
    source: DataArgument,
    captions: CaptionsOption = None,
    classes: ClassesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Decode every image and say what is there: sizes, captions, classes, and what is broken."""
    import json

    from mezzotint.cli.progress import progress
    from mezzotint.data.inspection import inspect_images
    from mezzotint.data.sources import open_source

    found = open_source(_config(source, captions, classes))
    with progress("images") as on_progress:
        report = inspect_images(
            found.entries, lambda done: on_progress(done, max(done, found.count or 0))
        )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    for label, told in report.lines():
        print(f"{label:11} {printable(told)}")
    for fault in report.faults:
        print(f"{'':11} {printable(fault.name)}: {printable(fault.reason)}")


@app.command()
def pack(
    source: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder that isn't there yet.")],
    shard_size: Annotated[int, typer.Option(min=1, max=10_000, help="Images a tar file.")] = 1000,
    captions: CaptionsOption = None,
    classes: ClassesOption = None,
) -> None:
    """Write images with their captions and classes as tar files, as img2dataset does."""
    import sys

    from mezzotint.cli.progress import progress
    from mezzotint.data.packing import pack as write
    from mezzotint.data.sources import open_source

    found = open_source(_config(source, captions, classes))
    with progress("images") as on_progress:
        packed = write(
            found.entries,
            output,
            shard_size,
            lambda done: on_progress(done, max(done, found.count or 0)),
        )
    for fault in packed.faults:
        print(f"left out {printable(fault.name)}: {printable(fault.reason)}", file=sys.stderr)
    print(f"{output}: {packed.images:,} images in {packed.shards:,} shards")


@app.command()
def cache(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a dotted key of the recipe."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder.", show_default=False)
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete latents of which this recipe uses nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Encode the images of a diffusion recipe once, before it is trained."""
    import time

    from mezzotint.cli.progress import progress
    from mezzotint.evaluation.shards import ranks
    from mezzotint.training.caching import cache_sentences
    from mezzotint.training.precompute import precompute_latents

    begun = time.monotonic()
    with progress("views") as on_progress:
        found = precompute_latents(recipe, overrides or (), output, device, on_progress)
    if ranks()[0] > 0:
        return  # the first speaks for all
    for sentence in cache_sentences(found):
        print(sentence)
    if found.report.encoded:
        print(f"{found.report.encoded / (time.monotonic() - begun):,.1f} views a second")
    if prune:
        freed = sum(path.stat().st_size for path in found.unused)
        for path in found.unused:
            path.unlink()
        print(f"{len(found.unused):,} shards deleted, {freed / 2**20:,.2f} MiB")


def _config(source: str, captions: str | None, classes: str | None) -> "AnyDataConfig":
    """The data of a recipe, or what a path stands for."""
    from mezzotint.data.sources import source_config
    from mezzotint.training.run import load_recipe, recipe_names

    if source in recipe_names() or source.endswith((".yaml", ".yml")):
        return load_recipe(source).data
    return source_config(source, captions, classes)
