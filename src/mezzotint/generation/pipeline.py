"""A model and how to run it."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.model import load_model
from mezzotint.checkpoints.registry import resolve_model
from mezzotint.device import Execution, select_device, select_precision
from mezzotint.errors import RequestError
from mezzotint.generation.generate import GeneratedImage, generate
from mezzotint.generation.request import GenerationRequest, Task
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = ["Pipeline", "load"]

_TASKS: dict[str | None, Task] = {
    "caption": "text-to-image",
    "label": "class-to-image",
    None: "unconditional",
}


class Pipeline:
    """A `LatentDiffusion` and the device and precision that it runs in.

    Args:
        model: The model; moved to the device and set to evaluation.
        execution: Device and precision.
        name: What requests call the model: the path that `load` finds it by.
    """

    def __init__(self, model: LatentDiffusion, execution: Execution, name: str) -> None:
        self.model = model.to(execution.device).eval()
        self.execution = execution
        self.name = name

    @cached_property
    def model_hash(self) -> str:
        """A hash of every weight and statistic of the model."""
        return self.model.weights_hash()

    @property
    def task(self) -> Task:
        """What the model draws from."""
        return _TASKS[self.model.conditioner.wants]

    def request(self, **fields: Any) -> GenerationRequest:
        """Build a request for this model from the fields of `GenerationRequest`.

        Raises:
            RequestError: If a field is wrong, or the model wants another condition.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        wants = self.model.conditioner.wants
        wrong = {"prompt": "caption", "class_label": "label"}
        for name, kind in wrong.items():
            if name in given and wants != kind:
                what = "a prompt" if name == "prompt" else "a class"
                raise RequestError(
                    f"{self.name}: the model wants {self.model.conditioner.description},"
                    f" but was given {what}"
                )
            if name not in given and wants == kind:
                raise RequestError(
                    f"{self.name}: the model wants {self.model.conditioner.description}"
                )
        return GenerationRequest.from_dict({"task": self.task, "model": self.name, **given})

    def generate(
        self,
        prompt: str | None = None,
        *,
        class_label: str | int | None = None,
        negative_prompt: str | None = None,
        num_images: int = 1,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        eta: float | None = None,
        width: int | None = None,
        height: int | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[GeneratedImage]:
        """Draw pictures; what is left out takes the default of `GenerationRequest`.

        Args:
            prompt: For a text-conditional model.
            class_label: For a class-conditional model, a name or an index.
            negative_prompt: What guidance leads away from.
            num_images: How many pictures.
            seed: Picture k is drawn from ``seed + k`` alone.
            steps: Noise levels to visit.
            sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
            spacing: A name of `mezzotint.diffusion.schedule.SPACINGS`.
            guidance_scale: 1 is no guidance.
            guidance_rescale: In [0, 1].
            eta: Fresh noise of the DDIM family.
            width: In pixels.
            height: In pixels.
            batch_size: Pictures drawn at once; by default as many as fit well.
            on_progress: Called with (steps done, steps in all).

        Returns:
            Pictures with the request that draws each again.

        Raises:
            RequestError: If the model cannot give what is asked.
        """
        request = self.request(
            prompt=prompt,
            class_label=class_label,
            negative_prompt=negative_prompt,
            num_images=num_images,
            seed=seed,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            width=width,
            height=height,
        )
        return generate(self, request, batch_size=batch_size, on_progress=on_progress)


def load(model: str | Path, device: str = "auto", precision: str = "auto") -> Pipeline:
    """Load a model to draw with.

    Args:
        model: A model folder or a finished run folder.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        CheckpointError: If there is no such model, or it is damaged.
        ConfigError: If the device or the precision is not to be had.
    """
    execution = select_precision(precision, select_device(device))
    folder = resolve_model(model)
    return Pipeline(load_model(folder), execution, str(model))
