"""What to draw, as one value that can be drawn again."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, field_validator, model_validator

from mezzotint.config import Config, Document
from mezzotint.diffusion.names import find_sampler, find_spacing
from mezzotint.errors import ConfigError, RequestError, nearest
from mezzotint.generation.resolved import Resolved, Sha256

__all__ = [
    "AdapterUse",
    "FeatureReuse",
    "GenerationRequest",
    "GuideUse",
    "HighRes",
    "InputImage",
    "LayoutBox",
    "Task",
]

Task = Literal[
    "text-to-image",
    "class-to-image",
    "unconditional",
    "layout-to-image",
    "map-to-image",
    "super-resolution",
    "image-to-image",
    "inpainting",
    "outpainting",
]

# seeds key 63-bit generators, and image k of a request takes seed + k
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=0, le=8192)]

# what each task takes and cannot do without, and what it may take besides
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "text-to-image": ("prompt",),
    "class-to-image": ("class_label",),
    "unconditional": (),
    "layout-to-image": ("layout",),
    "map-to-image": ("semantic_map",),
    "super-resolution": ("image",),
    "image-to-image": ("image",),
    "inpainting": ("image", "mask"),
    "outpainting": ("image", "padding"),
}
_CONDITIONS = ("prompt", "class_label", "layout")
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "layout-to-image": ("prompt",),
    "map-to-image": _CONDITIONS,
    "super-resolution": _CONDITIONS,
    "image-to-image": (*_CONDITIONS, "strength"),
    "inpainting": (*_CONDITIONS, "strength"),
    "outpainting": (*_CONDITIONS, "strength"),
}
# what each kind of guide cannot do without, and what it may take besides
_OF_GUIDES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "low-res": (("image",), ("filter",)),
    "colour": (("colour",), ("mask",)),
    "known-pixels": (("image", "mask"), ()),
    "function": (("name",), ()),
}
_OF_SOME_TASKS = (*_CONDITIONS, "semantic_map", "image", "mask", "padding", "strength")


class InputImage(Config):
    """A picture that a request begins from. The request holds what identifies it, not the picture.

    Attributes:
        sha256: Of the file's bytes; or of a picture from memory, which has no file.
        path: Where the file was.
        of: What the sum is of: the ``file``, or the ``pixels`` as `inputs.pixel_sum` counts them.
    """

    sha256: Sha256
    path: str | None = None
    of: Literal["file", "pixels"] = "file"


def _valid_text(text: str) -> str:
    """Refuse halves of characters, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is no valid Unicode text") from None
    return text


class LayoutBox(Config):
    """An object of a layout.

    Attributes:
        label: The name or the index of its class.
        box: Left, top, right and bottom as shares of the picture's width and height.
    """

    label: Annotated[str, AfterValidator(_valid_text)] | int
    box: tuple[Share, Share, Share, Share]


class AdapterUse(Config):
    """A LoRA adapter and how strongly it acts.

    Attributes:
        name: Its path, or its name in the folders of adapters.
        weight: 1 is as it was trained.
    """

    name: str
    weight: Weight = 1.0


class GuideUse(Config):
    """What leads the picture somewhere that the model was not trained to be told.

    See `mezzotint.generation.guides` for what each does, and
    `mezzotint.diffusion.energy_guidance` for how.

    Attributes:
        kind: ``low-res``: made as small as ``image``, the picture shall look like it. ``colour``:
            its mean colour, or that of where ``mask`` is white, shall be ``colour``.
            ``known-pixels``: it shall be like ``image`` where ``mask`` is black. ``function``: of
            Python, of which only the ``name`` is known; it cannot be drawn again from here.
        scale: How strongly it acts, a factor on its energy.
        filter: What makes pictures small for ``low-res``; ``None`` is ``area``.
    """

    kind: Literal["low-res", "colour", "known-pixels", "function"]
    image: InputImage | None = None
    mask: InputImage | None = None
    colour: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] | None = None
    name: str | None = None
    scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    filter: Literal["area", "bicubic"] | None = None

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        required, besides = _OF_GUIDES[self.kind]
        for name in ("image", "mask", "colour", "name", "filter"):
            given = getattr(self, name) is not None
            if given and name not in (*required, *besides):
                raise ValueError(f"{name}: not for the guide {self.kind!r}")
            if not given and name in required:
                raise ValueError(f"{name}: required by the guide {self.kind!r}, but missing")
        return self


class HighRes(Config):
    """A second pass at a higher resolution, begun from the first one's picture.

    Attributes:
        scale: How many times as wide and as high.
        strength: How much of the enlarged picture is drawn anew, as in image-to-image.
        steps: Of the second pass, counted as in image-to-image; ``None``: as the first.
        upscaler: ``latent`` enlarges the latents bilinearly, ``lanczos`` the decoded picture.
    """

    scale: Annotated[float, Field(gt=1, le=8)] = 2.0
    strength: Annotated[float, Field(gt=0, le=1)] = 0.7
    steps: Count | None = None
    upscaler: Literal["latent", "lanczos"] = "latent"


class FeatureReuse(Config):
    """Deep features of the network that several steps share (DeepCache, arXiv 2312.00858).

    Attributes:
        interval: They are computed in every so many steps, from the first on; 1 is in every one.
        blocks: Of the network's way down, from the finest level on, how many outputs are computed
            in every step, and on the way up one block more.
    """

    interval: Annotated[int, Field(ge=1, le=1000)]
    blocks: Annotated[int, Field(ge=1, le=1000)] = 1


class GenerationRequest(Document):
    """What to draw. It is written into every picture, and `replay` draws the same from it.

    Whether a model can give what is asked is for the pipeline to say; what no model could give is
    refused here. Build one from a user's words with `from_dict`, whose errors are friendly.

    Attributes:
        task: What the picture is drawn from.
        prompt: What it shows, in words; ``""`` is the null prompt.
        negative_prompt: What guidance leads away from instead of the null prompt.
        class_label: What it shows, as the name or the index of a class.
        layout: What it shows where.
        semantic_map: A picture whose grey values are the classes of its pixels.
        image: What the picture begins from; for super-resolution, the small picture.
        mask: Of the size of ``image``, white where to draw and black where to keep.
        padding: How many pixels outpainting adds left, above, right and below.
        strength: How much of ``image`` is drawn anew, above 0 up to 1: the share of the steps that
            are made; ``None`` is 0.75 for image-to-image and 1 for inpainting and outpainting.
        high_res: A second pass at a higher resolution.
        seed: Image k of the request is drawn from ``seed + k`` alone.
        variation_seed: Where the starting noise turns to by ``variation_strength``. Then every
            image is drawn from ``seed``, and image k turns to ``variation_seed + k``.
        variation_strength: 0 is the noise of ``seed``, 1 that of ``variation_seed``; between, the
            way along the sphere.
        num_images: How many.
        steps: How many noise levels the sampler visits.
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`, or one of other software's that
            `mezzotint.diffusion.names` knows; it is kept under ours.
        spacing: How the noise levels are spaced; ``None`` is the sampler's default.
        guidance_scale: s of classifier-free guidance (arXiv 2207.12598, with s = 1 + w): 1 is no
            guidance.
        guidance_rescale: phi of arXiv 2305.08891, section 3.4, in [0, 1].
        guidance_interval: Noise levels (low, high) outside which there is no classifier-free
            guidance, low < sigma <= high (arXiv 2404.07724).
        guides: What leads the picture besides, whatever the model was trained for.
        eta: Fresh noise of the DDIM family (arXiv 2010.02502, equation 16): 0 is deterministic,
            1 is DDPM; ``None`` is the sampler's default.
        emphasis: How brackets in prompts act; see `mezzotint.conditioning.base.TextOptions`.
        clip_skip: 1 reads the text encoder's own last layer, 2 the one before it.
        adapters: LoRA adapters beside those that the prompt names.
        tiling: Whether left and right, and top and bottom, shall fit together.
        tiled_sampling: Draw in overlapping tiles, each as large as the model was trained at but of
            32 to 64 latents, that are blended at every step: for pictures far beyond that size.
        tiled_decoding: Decode every layer in stripes that share their statistics: the same picture
            but for the rounding, in less memory where it is large.
        feature_reuse: Take deep features of earlier steps: faster, and not quite the same picture.
        token_merging: The share of the tokens, 0 to 0.75, that self-attention at the finest level
            merges with similar ones (arXiv 2303.17604): faster where there are many, and not quite
            the same picture.
        back_projection: Of super-resolution: how often what the shrunk picture lacks of the small
            one is added to it (Irani and Peleg 1991), until the two agree.
        poisson_blending: Of inpainting and outpainting: whether the colours of what was drawn are
            moved until they meet those around the mask (Pérez et al. 2003).
        width: Of the picture, in pixels; ``None`` is the model's own, or that of ``image``.
        height: Of the picture, in pixels; ``None`` is the model's own, or that of ``image``.
        model: The name or path that the model was loaded by.
        resolved: What it was drawn with; filled in by the pipeline.
    """

    task: Task
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: str | int | None = None
    layout: tuple[LayoutBox, ...] | None = None
    semantic_map: InputImage | None = None
    image: InputImage | None = None
    mask: InputImage | None = None
    padding: tuple[Side, Side, Side, Side] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    high_res: HighRes | None = None
    seed: Seed = 0
    variation_seed: Seed | None = None
    variation_strength: Share = 0.0
    num_images: Count = 1
    steps: Count = 25
    sampler: str = "ddim"
    # `mezzotint.diffusion.schedule.Spacing` again, which would import torch
    spacing: (
        Literal["leading", "trailing", "linspace", "karras", "exponential", "sgm_uniform"] | None
    ) = None
    guidance_scale: Finite = 3.0
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_interval: tuple[Finite, Finite] | None = None
    guides: tuple[GuideUse, ...] = ()
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    # `mezzotint.conditioning.base.Emphasis` again, which would import torch
    emphasis: Literal["original", "no_norm", "ignore", "none"] = "original"
    clip_skip: Annotated[int, Field(ge=1, le=100)] = 1
    adapters: tuple[AdapterUse, ...] = ()
    tiling: bool = False
    tiled_sampling: bool = False
    tiled_decoding: bool = False
    feature_reuse: FeatureReuse | None = None
    token_merging: Annotated[float, Field(ge=0, le=0.75)] = 0.0
    back_projection: Annotated[int, Field(ge=0, le=100)] = 0
    poisson_blending: bool = False
    width: Annotated[int, Field(ge=1, le=16384)] | None = None
    height: Annotated[int, Field(ge=1, le=16384)] | None = None
    model: str | None = None
    resolved: Resolved | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_names(cls, data: Any) -> Any:
        """Let ``sampler`` be what other software calls it, ``DPM++ 2M Karras`` for example."""
        fields = cast(dict[str, Any], data) if isinstance(data, dict) else {}
        label, named = fields.get("spacing"), fields.get("sampler")
        if isinstance(label, str) and (found := find_spacing(label)) is not None:
            fields = fields | {"spacing": found}
        known = find_sampler(named) if isinstance(named, str) else None
        if known is None:
            return fields or data
        sampler, spacing = known
        if spacing is not None and fields.get("spacing") is None:
            fields = fields | {"spacing": spacing}
        return fields | {"sampler": sampler}

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        return None if text is None else _valid_text(text)

    @field_validator("sampler")
    @classmethod
    def _sampler_exists(cls, name: str) -> str:
        # imported here because samplers import torch, which --help must not
        from mezzotint.diffusion.samplers import SAMPLERS

        if name not in SAMPLERS:
            raise ValueError(f"unknown sampler {name!r}; {nearest(name, SAMPLERS)}")
        return name

    @model_validator(mode="after")
    def _condition_fits_task(self) -> Self:
        required = _REQUIRED[self.task]
        allowed = required + _BESIDE.get(self.task, ())
        for name in _OF_SOME_TASKS:
            if getattr(self, name) is not None and name not in allowed:
                hint = f"; give {' and '.join(required)} instead" if required else ""
                raise ValueError(f"{name}: not for the task {self.task!r}{hint}")
        for name in required:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: required by the task {self.task!r}, but missing")
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if len(given) > 1 and self.task != "layout-to-image":
            raise ValueError(f"{given[0]} and {given[1]} exclude each other; give one")
        if self.negative_prompt is not None and self.prompt is None:
            raise ValueError(f"negative_prompt: not for the task {self.task!r} without a prompt")
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if bool(self.variation_strength) != (self.variation_seed is not None):
            raise ValueError("variation_seed and variation_strength (above 0) need one another")
        if self.padding is not None and not any(self.padding):
            raise ValueError("padding: adds nothing; give pixels for at least one side")
        if self.padding is not None and (self.width or self.height):
            raise ValueError("width, height: outpainting's size is the image's with its padding")
        fixed = ("inpainting", "outpainting", "super-resolution", "map-to-image")
        if self.high_res is not None and self.task in fixed:
            raise ValueError(f"high_res: not for the task {self.task!r}, whose size is the image's")
        if self.back_projection and self.task != "super-resolution":
            raise ValueError(f"back_projection: not for the task {self.task!r}")
        if self.poisson_blending and self.task not in ("inpainting", "outpainting"):
            raise ValueError(f"poisson_blending: not for the task {self.task!r}")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if low >= high:
                raise ValueError(
                    f"guidance_interval: {low} is not below {high}; expected low, high"
                )
        for name in ("tiled_sampling", "tiled_decoding"):
            if self.tiling and getattr(self, name):
                raise ValueError(f"tiling and {name} exclude each other: tiles have edges")
        if self.feature_reuse is not None and self.feature_reuse.interval > 1:
            if self.tiled_sampling:
                raise ValueError(
                    "feature_reuse and tiled_sampling exclude each other: features are of one tile"
                )
            if self.guides:
                raise ValueError(
                    "feature_reuse and guides exclude each other: guides are taken back through"
                    " the whole network"
                )
        if self.tiled_sampling and self.layout is not None:
            raise ValueError("tiled_sampling: not with a layout, which says where in the whole")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "request") -> Self:
        """Build from plain values.

        Args:
            data: The fields by name, as `to_dict` gives them.
            source: What the error message calls the origin of ``data``.

        Raises:
            RequestError: Naming every wrong key and value of ``data`` at once.

        Example:
            >>> data = {"task": "text-to-image", "prompt": "a red apple", "seed": 7}
            >>> request = GenerationRequest.from_dict(data)
            >>> GenerationRequest.from_dict(request.to_dict()) == request
            True
        """
        try:
            return super().from_dict(data, source)
        except ConfigError as error:
            raise RequestError(str(error)) from None
