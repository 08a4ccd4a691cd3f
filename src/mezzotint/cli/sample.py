"""``mezzotint sample``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mezzotint.cli.loading import (
    ConfigOption,
    DecoderOption,
    DeviceOption,
    EngineOption,
    FamilyOption,
    OffloadOption,
    PrecisionOption,
    PredictionOption,
    QuantizationOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from mezzotint.generation.pipeline import Pipeline
    from mezzotint.generation.request import GenerationRequest

__all__ = ["sample"]

_PICTURE, _TEXT, _SIZE = "From a picture", "Text and adapters", "Size and tiles"
_SPEED = "Faster, and not quite the same"


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The folder of a model or of a run, a .safetensors or .ckpt file, or a name.",
        ),
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
    variation_seed: Annotated[
        int | None, typer.Option(help="Another seed to turn to: image k to that + k.")
    ] = None,
    variation_strength: Annotated[
        float | None, typer.Option(help="How far: 0 is the seed's, 1 the other's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpmpp_2m, …, or 'Euler a'")
    ] = None,
    spacing: Annotated[
        str | None, typer.Option(help="trailing, leading, linspace, karras, …")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="As this picture was drawn, by Mezzotint or a web UI."),
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Take contrast back, 0 to 1.")
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Noise levels outside which there is none."),
    ] = None,
    guides: Annotated[
        list[str] | None,
        typer.Option(
            "--guide",
            metavar="KIND:WHAT[:SCALE]",
            help="low-res:small.png, colour:#ff8800 or known-pixels:picture.png,mask.png: lead"
            " any model there; repeatable.",
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Fresh noise of ddim and its kin: 0 none, 1 as ddpm.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative", help="What to lead away from.", rich_help_panel=_TEXT),
    ] = None,
    emphasis: Annotated[
        Literal["original", "no_norm", "ignore", "none"] | None,
        typer.Option(help="How (x:1.3) acts.", rich_help_panel=_TEXT),
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="1 is CLIP's last layer.", rich_help_panel=_TEXT)
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME[:W]",
            help="A LoRA or textual-inversion file; repeatable.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="What to begin from.", rich_help_panel=_PICTURE)
    ] = None,
    low_res: Annotated[
        Path | None,
        typer.Option(help="What super-resolution enlarges.", rich_help_panel=_PICTURE),
    ] = None,
    back_projection: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Correct what super-resolution drew N times, until it agrees.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="White where to draw, black where to keep.", rich_help_panel=_PICTURE),
    ] = None,
    poisson_blending: Annotated[
        bool | None,
        typer.Option(
            "--poisson-blending",
            help="Move the colours of what was drawn until they meet those around the mask.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much to draw anew, 0 to 1.", rich_help_panel=_PICTURE)
    ] = None,
    padding: Annotated[
        str | None,
        typer.Option(
            metavar="N|L,T,R,B", help="Pixels to add around it.", rich_help_panel=_PICTURE
        ),
    ] = None,
    semantic_map: Annotated[
        Path | None,
        typer.Option("--map", help="Grey values are classes.", rich_help_panel=_PICTURE),
    ] = None,
    layout: Annotated[
        Path | None,
        typer.Option(help="JSON: objects with label and box.", rich_help_panel=_PICTURE),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|WxH", help="In pixels; the model's own by default.", rich_help_panel=_SIZE
        ),
    ] = None,
    high_res: Annotated[
        float | None,
        typer.Option(help="Then so many times larger, in a second pass.", rich_help_panel=_SIZE),
    ] = None,
    high_res_strength: Annotated[
        float | None, typer.Option(help="How much that draws anew.", rich_help_panel=_SIZE)
    ] = None,
    high_res_steps: Annotated[
        int | None, typer.Option(help="Steps of that pass.", rich_help_panel=_SIZE)
    ] = None,
    upscaler: Annotated[
        Literal["latent", "lanczos"] | None,
        typer.Option(help="What enlarges before it.", rich_help_panel=_SIZE),
    ] = None,
    tiling: Annotated[
        bool, typer.Option("--tiling", help="Edges fit together.", rich_help_panel=_SIZE)
    ] = False,
    tiled_sampling: Annotated[
        bool,
        typer.Option(
            "--tiled-sampling", help="Far beyond the trained size.", rich_help_panel=_SIZE
        ),
    ] = False,
    tiled_decoding: Annotated[
        bool,
        typer.Option(
            "--tiled-decoding", help="Large pictures, less memory.", rich_help_panel=_SIZE
        ),
    ] = False,
    feature_reuse: Annotated[
        str | None,
        typer.Option(
            metavar="N[:BLOCKS]",
            help="Compute deep features in every N-th step, and in all steps so many blocks of the"
            " way down.",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    token_merging: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Merge this share of alike tokens, 0 to 0.75, at the finest attention.",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    decoder: DecoderOption = None,
    offload: OffloadOption = "none",
    quantization: QuantizationOption = "none",
    config: ConfigOption = None,
    family: FamilyOption = None,
    prediction: PredictionOption = None,
    weights: WeightsOption = "auto",
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
        typer.Option(
            "--output", "-o", metavar="DIR|FILE", help="*.png, *.jpg, *.webp; default: outputs/"
        ),
    ] = None,
) -> None:
    """Draw pictures with a model and write them; each can be replayed."""
    from mezzotint.cli.asked import (
        adapter_uses,
        boxes,
        check,
        guides_of,
        interval,
        of_picture,
        reuse_of,
        second_pass,
        sides,
        size_of,
    )
    from mezzotint.cli.loading import open_model
    from mezzotint.cli.output import picture_path, slug
    from mezzotint.cli.progress import progress
    from mezzotint.errors import RequestError
    from mezzotint.generation.generate import generate
    from mezzotint.generation.inputs import InputPictures
    from mezzotint.generation.metadata import FORMATS, write_image

    if image is not None and low_res is not None:
        raise RequestError(
            "--image and --low-res exclude each other: a model takes the one or the other"
        )
    begun = image or low_res
    pictures = InputPictures()
    width, height = size_of(size)
    asked: dict[str, Any] = {
        "class_label": class_label,
        "num_images": num_images,
        "seed": seed,
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": interval(guidance_interval),
        "guides": guides_of(guides, pictures),
        "eta": eta,
        "negative_prompt": negative_prompt,
        "emphasis": emphasis,
        "clip_skip": clip_skip,
        "adapters": adapter_uses(adapters),
        "image": pictures.add(begun) if begun else None,
        "mask": pictures.add(mask) if mask else None,
        "strength": strength,
        "padding": sides(padding),
        "semantic_map": pictures.add(semantic_map) if semantic_map else None,
        "layout": boxes(layout),
        "width": width,
        "height": height,
        "high_res": second_pass(high_res, high_res_strength, high_res_steps, upscaler),
        "tiling": tiling or None,
        "tiled_sampling": tiled_sampling or None,
        "tiled_decoding": tiled_decoding or None,
        "feature_reuse": reuse_of(feature_reuse),
        "token_merging": token_merging,
        "back_projection": back_projection,
        "poisson_blending": poisson_blending,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    asked = of_picture(from_, given) | given
    wanted: list[dict[str, Any]] = [{**asked, "prompt": p} for p in prompts or ()] or [asked]
    for fields in wanted:
        check(fields)
    suffixes = FORMATS if strip is None else (".png",)
    picture_path(output, "image", suffixes=suffixes)
    pipeline = open_model(
        model,
        device=device,
        precision=precision,
        engine=engine,
        decoder=decoder,
        offload=offload,
        quantization=quantization,
        config=config,
        family=family,
        prediction=prediction,
        weights=weights,
    )
    if low_res is not None and pipeline.task != "super-resolution":
        wants = pipeline.model.conditioner.description
        raise RequestError(f"{model}: the model wants {wants}, but was given a small picture")
    for fields in wanted:
        what = str(fields.get("prompt", fields.get("class_label", "image")))
        if strip is not None:
            for request, drawn_strip in _strips(pipeline, fields, strip):
                name = f"{slug(what)}-{request.seed}-{strip}"
                path = picture_path(output, name, suffixes=suffixes)
                _write_strip(drawn_strip, strip, request, path)
                print(path)
            continue
        request = pipeline.request(**fields)
        with progress(what) as on_progress:
            images = generate(
                pipeline,
                request,
                pictures=pictures,
                batch_size=batch_size,
                on_progress=on_progress,
            )
        for index, drawn in enumerate(images):
            path = picture_path(output, f"{slug(what)}-{_seeds(drawn.request, index)}")
            write_image(drawn.image, drawn.request, path)
            print(path)


def _seeds(request: "GenerationRequest", index: int) -> str:
    """What tells the images of a request apart, for their names."""
    if request.variation_seed is None:
        return str(request.seed + index)
    return f"{request.seed}-{request.variation_seed + index}"


def _strips(
    pipeline: "Pipeline", fields: dict[str, Any], kind: str
) -> "Iterator[tuple[GenerationRequest, Image.Image]]":
    """One strip for each image that was asked for, enlarged so that small ones can be seen."""
    from mezzotint.errors import RequestError
    from mezzotint.evaluation.grids import denoising_strip, interpolation_strip
    from mezzotint.generation.adapters import adapters_of

    asked = pipeline.request(**fields)
    others = ["image", "mask", "semantic_map", "guides", "high_res"]
    others += ["tiling", "tiled_sampling", "tiled_decoding"]
    given = [name for name in others if getattr(asked, name)]
    if given or adapters_of(pipeline, asked) or asked.variation_strength:
        what = ", ".join(given) or "adapters or variations"
        raise RequestError(f"--strip shows drawing from noise alone, not with {what}")
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
