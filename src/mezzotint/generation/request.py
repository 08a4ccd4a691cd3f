"""What to draw, as one value that can be drawn again."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from mezzotint.config import Config, Document
from mezzotint.diffusion.names import find_sampler
from mezzotint.errors import ConfigError, RequestError, nearest

__all__ = ["GenerationRequest", "Resolved", "Task"]

Task = Literal["text-to-image", "class-to-image", "unconditional"]

# seeds key 63-bit generators, and image k of a request takes seed + k
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Resolved(Config):
    """What a picture was drawn with, beyond what was asked: enough to draw it again bit for bit.

    Attributes:
        model_hash: Of every weight of the model, as hexadecimal digits.
        precision: What autocast computed in, ``"float32"`` or ``"bfloat16"`` for example.
        engine: What ran the networks, ``"torch"`` for example.
        device: torch's name of the device.
        threads: How many threads of the processor computed.
        batch_size: How many images were drawn at once.
        batch_row: Which of these this is, from 0.
        image_index: Which image of the request this is, from 0; its seed is ``seed + image_index``.
        mezzotint_version: The Mezzotint that drew it.
        torch_version: The torch that it ran on.
    """

    model_hash: str
    precision: str
    engine: str
    device: str
    # bounded, because a picture from a stranger says these too
    threads: Annotated[int, Field(ge=1, le=1024)]
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    batch_row: Annotated[int, Field(ge=0)]
    image_index: Annotated[int, Field(ge=0)]
    mezzotint_version: str
    torch_version: str

    @model_validator(mode="after")
    def _row_of_batch(self) -> Self:
        if self.batch_row >= self.batch_size:
            raise ValueError(
                f"batch_row {self.batch_row} is not a row of a batch of {self.batch_size}"
            )
        return self


class GenerationRequest(Document):
    """What to draw. It is written into every picture, and `replay` draws the same from it.

    Whether a model can give what is asked is for the pipeline to say; what no model could give is
    refused here. Build one from a user's words with `from_dict`, whose errors are friendly.

    Attributes:
        task: What the picture is drawn from.
        prompt: What it shows, in words. Text-to-image only, where ``""`` is the null prompt.
        negative_prompt: What guidance leads away from instead of the null prompt.
        class_label: What it shows, as the name or the index of a class. Class-to-image only.
        seed: Image k of the request is drawn from ``seed + k`` alone.
        num_images: How many.
        steps: How many noise levels the sampler visits.
        sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`, or one of other software's that
            `mezzotint.diffusion.names` knows; it is kept under ours.
        spacing: How the noise levels are spaced; ``None`` is the sampler's default.
        guidance_scale: s of classifier-free guidance (arXiv 2207.12598, with s = 1 + w): 1 is no
            guidance.
        guidance_rescale: phi of arXiv 2305.08891, section 3.4, in [0, 1].
        eta: Fresh noise of the DDIM family (arXiv 2010.02502, equation 16): 0 is deterministic,
            1 is DDPM; ``None`` is the sampler's default.
        width: Of the picture, in pixels; ``None`` is the model's own.
        height: Of the picture, in pixels; ``None`` is the model's own.
        model: The name or path that the model was loaded by.
        resolved: What it was drawn with; filled in by the pipeline.
    """

    task: Task
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: str | int | None = None
    seed: Seed = 0
    num_images: Count = 1
    steps: Count = 25
    sampler: str = "ddim"
    # `mezzotint.diffusion.schedule.Spacing` again, which would import torch
    spacing: (
        Literal["leading", "trailing", "linspace", "karras", "exponential", "sgm_uniform"] | None
    ) = None
    guidance_scale: Finite = 3.0
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    width: Annotated[int, Field(ge=1, le=16384)] | None = None
    height: Annotated[int, Field(ge=1, le=16384)] | None = None
    model: str | None = None
    resolved: Resolved | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_names(cls, data: Any) -> Any:
        """Let ``sampler`` be what other software calls it, ``DPM++ 2M Karras`` for example."""
        fields = cast(dict[str, Any], data) if isinstance(data, dict) else {}
        named = fields.get("sampler")
        known = find_sampler(named) if isinstance(named, str) else None
        if known is None:
            return data
        sampler, spacing = known
        if spacing is not None and fields.get("spacing") is None:
            fields = fields | {"spacing": spacing}
        return fields | {"sampler": sampler}

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
        takes = {"text-to-image": "prompt", "class-to-image": "class_label"}.get(self.task)
        for name in ("prompt", "class_label"):
            if name != takes and getattr(self, name) is not None:
                hint = f"; give {takes} instead" if takes else ""
                raise ValueError(f"{name}: not for the task {self.task!r}{hint}")
        if takes is not None and getattr(self, takes) is None:
            raise ValueError(f"{takes}: required by the task {self.task!r}, but missing")
        if self.negative_prompt is not None and takes != "prompt":
            raise ValueError(f"negative_prompt: not for the task {self.task!r}")
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
