"""``mezzotint sample``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from mezzotint.generation.pipeline import Pipeline
    from mezzotint.generation.request import GenerationRequest

__all__ = ["sample"]


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The folder of a model or of a finished run.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT…", help="What to draw; quote each.", show_default=False),
    ] = None,
    class_label: Annotated[
        str | None, typer.Option("--class", help="What to draw, for a model of classes.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", "-n", help="How many of each prompt.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Image k is drawn from seed + k.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpmpp_2m, …, or 'Euler a'")
    ] = None,
    spacing: Annotated[
        str | None, typer.Option(help="trailing, leading, linspace, karras, …")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    eta: Annotated[
        float | None, typer.Option(help="Fresh noise of ddim and its kin: 0 none, 1 as ddpm.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="In pixels; the model's own by default.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images drawn at once.")] = None,
    strip: Annotated[
        Literal["denoising", "interpolation"] | None,
        typer.Option(
            help="Draw a strip instead: how the picture comes about, or the way from it to that"
            " of the next seed."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR|FILE.png", help="Default: outputs/"),
    ] = None,
) -> None:
    """Draw pictures with a model and write them as PNG; each can be replayed."""
    from mezzotint.cli.output import picture_path, slug
    from mezzotint.cli.progress import progress
    from mezzotint.generation.metadata import write_png
    from mezzotint.generation.pipeline import load

    width, height = _size(size)
    asked: dict[str, Any] = {
        "class_label": class_label,
        "num_images": num_images,
        "seed": seed,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "width": width,
        "height": height,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    wanted: list[dict[str, Any]] = [{**asked, "prompt": p} for p in prompts or ()] or [asked]
    for fields in wanted:
        _check(fields)
    picture_path(output, "image")
    pipeline = load(model, device=device, precision=precision)
    for fields in wanted:
        what = str(fields.get("prompt", fields.get("class_label", "image")))
        if strip is not None:
            for request, image in _strips(pipeline, fields, strip):
                path = picture_path(output, f"{slug(what)}-{request.seed}-{strip}")
                _write_strip(image, strip, request, path)
                print(path)
            continue
        with progress(what) as on_progress:
            images = pipeline.generate(**fields, batch_size=batch_size, on_progress=on_progress)
        for index, drawn in enumerate(images):
            path = picture_path(output, f"{slug(what)}-{drawn.request.seed + index}")
            write_png(drawn.image, drawn.request, path)
            print(path)


def _strips(
    pipeline: "Pipeline", fields: dict[str, Any], kind: str
) -> "Iterator[tuple[GenerationRequest, Image.Image]]":
    """One strip for each image that was asked for, enlarged so that small ones can be seen."""
    from mezzotint.evaluation.grids import denoising_strip, interpolation_strip

    asked = pipeline.request(**fields)
    scale = max(1, 96 // (asked.width or pipeline.model.image_size[1]))
    for seed in range(asked.seed, asked.seed + asked.num_images):
        request = asked.model_copy(update={"seed": seed, "num_images": 1})
        if kind == "denoising":
            yield request, denoising_strip(pipeline, request, noisy=True, scale=scale)
        else:
            yield request, interpolation_strip(pipeline, request, (seed, seed + 1), scale=scale)


def _write_strip(image: "Image.Image", kind: str, request: "GenerationRequest", path: Path) -> None:
    """Write a strip with what it shows; not as a request, which would replay one picture of it."""
    import json

    from PIL import PngImagePlugin

    from mezzotint.errors import RequestError

    chunks = PngImagePlugin.PngInfo()
    shown = {"strip": kind, "request": request.to_dict()}
    chunks.add_text("mezzotint-strip", json.dumps(shown, ensure_ascii=False))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


def _check(fields: dict[str, Any]) -> None:
    """Find what no model could draw before a model is loaded, which may take long."""
    from mezzotint.generation.request import GenerationRequest

    if "prompt" in fields:
        task = "text-to-image"
    else:
        task = "class-to-image" if "class_label" in fields else "unconditional"
    GenerationRequest.from_dict({"task": task, **fields})


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from ``64`` or ``64x48``."""
    from mezzotint.errors import RequestError

    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height if cross else width)
    except ValueError:
        raise RequestError(f"--size {text!r}: expected pixels, as in 64 or 64x48") from None
