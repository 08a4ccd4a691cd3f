"""``mezzotint replay``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mezzotint.cli.loading import OffloadOption

__all__ = ["replay"]


def replay(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture drawn by Mezzotint.")],
    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if it has moved.")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="A picture that it began from, if it has moved; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    engine: Annotated[
        str, typer.Option(help="torch or openvino; auto: what has drawn the picture.")
    ] = "auto",
    decoder: Annotated[
        Path | None, typer.Option(help="Where the small decoder is now, if it has moved.")
    ] = None,
    offload: OffloadOption = "none",
    quantization: Annotated[
        Literal["auto", "none", "int8"],
        typer.Option(help="As of mezzotint sample; auto: what has drawn the picture."),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR|FILE", help="*.png, *.jpg, *.webp; default: outputs/"
        ),
    ] = None,
) -> None:
    """Draw a picture again from the request that it holds, and compare the two."""
    import numpy as np
    from PIL import Image

    from mezzotint.cli.output import picture_path
    from mezzotint.generation.metadata import write_image
    from mezzotint.generation.replay import replay as redraw

    path = picture_path(output, f"{image.stem}-replay")
    drawn = redraw(
        image,
        model=model,
        device=device,
        inputs=inputs or (),
        engine=engine,
        decoder=decoder,
        offload=offload,
        quantization=quantization,
    )
    write_image(drawn.image, drawn.request, path)
    print(path)
    with Image.open(image) as file:
        path_loses = file.format == "JPEG"
        before = np.asarray(file.convert("RGB"), dtype=np.int16)
    after = np.asarray(drawn.image.convert("RGB"), dtype=np.int16)
    if np.array_equal(before, after):
        print("the same, bit for bit")
    elif before.shape == after.shape and path_loses:
        print("of the same size; JPEG loses, so that pixels cannot be compared bit for bit")
    elif before.shape == after.shape:
        print(f"differs by up to {np.abs(before - after).max()} of 255")
    else:
        print("differs in size")
