"""``mezzotint sample``."""

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["sample"]


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or a shipped name.")
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
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, …")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="leading, trailing, linspace or karras.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="In pixels; the model's own by default.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR|FILE.png", help="Default: outputs/"),
    ] = None,
) -> None:
    """Draw pictures with a model and write them as PNG; each can be replayed."""
    from mezzotint.cli.output import picture_path, slug
    from mezzotint.cli.progress import progress
    from mezzotint.generation.generate import generate
    from mezzotint.generation.metadata import write_png
    from mezzotint.generation.pipeline import load
    from mezzotint.generation.request import GenerationRequest

    width, height = _size(size)
    asked = {
        "class_label": _class_label(class_label),
        "num_images": num_images,
        "seed": seed,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
    }
    # built before the model loads, so that a mistake shows at once
    requests = [
        GenerationRequest.from_dict(_request(prompt, asked)) for prompt in prompts or [None]
    ]
    picture_path(output, "image")
    pipeline = load(model, device=device, precision=precision)
    for request in requests:
        with progress(request.prompt or request.class_label or "drawing") as on_progress:
            images = generate(pipeline, request, batch_size=batch_size, on_progress=on_progress)
        for index, drawn in enumerate(images):
            what = request.prompt if request.prompt is not None else request.class_label
            name = slug("image" if what is None else str(what))
            path = picture_path(output, f"{name}-{request.seed + index}")
            write_png(drawn.image, drawn.request, path)
            print(path)


def _request(prompt: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a request; whatever the user left out is left out."""
    if prompt is not None:
        task = "text-to-image"
    else:
        task = "unconditional" if asked["class_label"] is None else "class-to-image"
    values = {"task": task, "prompt": prompt, **asked}
    return {key: value for key, value in values.items() if value is not None}


def _class_label(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


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
