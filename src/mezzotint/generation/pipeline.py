"""A model and how to run it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, cast

from PIL import Image
from torch import Tensor

from mezzotint.checkpoints.adapters import adapters
from mezzotint.checkpoints.decoders import LoadedDecoder, check_decoder, load_decoder
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults, Weights
from mezzotint.device import (
    Execution,
    autocast,
    int8_instructions,
    quantizes_weights,
    select_device,
    select_precision,
)
from mezzotint.diffusion.names import find_sampler
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.engines.offload import Offload, OffloadKind, select_offload
from mezzotint.engines.select import (
    Engine,
    QuantizationKind,
    TorchEngine,
    select_engine,
    select_quantization,
)
from mezzotint.errors import RequestError
from mezzotint.generation.fulfillable import (
    check_fulfillable,
    default_task,
    possible_tasks,
    task_of_fields,
    what_is_missing,
)
from mezzotint.generation.generate import GeneratedImage, generate
from mezzotint.generation.guides import Guide, ImageEnergy, guide_uses
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.more_fields import MoreFields
from mezzotint.generation.request import AdapterUse, GenerationRequest, InputImage, Task
from mezzotint.latent_diffusion import LatentDiffusion

__all__ = ["Pipeline", "load"]

Picture = str | Path | Image.Image


class Pipeline:
    """A `LatentDiffusion`, the device and precision that it runs in, and what runs it.

    Args:
        model: The model; moved to the device and set to evaluation.
        execution: Device and precision.
        name: What requests call the model: the path that `load` finds it by.
        source: What its files say beyond it.
        engine: What runs its networks; by default torch.
        decoder: A small one that decodes in place of the model's own.
        offload: What brings weights to the device while they are used; by default all stand there.

    Raises:
        ConfigError: If the decoder is that of another autoencoder.

    Attributes:
        defaults: What a request takes where it says nothing.
        notes: Sentences on what was guessed or left out when the model was read.
        read_as: What was said of the model's file in place of a guess.
        quantization: What large weights of the UNet were rounded to when it was loaded.
        adapter_folders: Where adapters are found by name; None for the usual places.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        execution: Execution,
        name: str,
        source: LoadedModel | None = None,
        engine: Engine | None = None,
        decoder: LoadedDecoder | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.model = model.eval()
        self.offload = offload
        if offload is None:
            model.to(execution.device)
        else:
            offload.place(model)
        self.execution = execution
        self.decoder = decoder
        if decoder is not None:
            check_decoder(decoder, self.model.first_stage, self.model.normalization)
            decoder.decoder.to(execution.device)
        self.engine: Engine = engine or TorchEngine()
        self.name = name
        self.defaults = source.defaults if source else SamplingDefaults()
        self.notes = source.notes if source else ()
        self.adapter_folders: Sequence[Path] | None = None
        self.read_as = dict(source.read_as) if source else {}
        self.quantization: QuantizationKind = "none"
        self._source = source

    @cached_property
    def model_hash(self) -> str:
        """What identifies the model: the sha256 of its file, or a hash of all its weights."""
        return self._source.content_hash() if self._source else self.model.weights_hash()

    @property
    def task(self) -> Task:
        """What the model is for, where a request does not say."""
        return default_task(self.model.conditioner)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All that the model can be asked for."""
        return possible_tasks(self.model.conditioner)

    @contextmanager
    def running(self) -> Generator[None]:
        """Compute in this pipeline's precision and by its engine, for a while."""
        arriving = nullcontext() if self.offload is None else self.offload.running(self.model)
        with autocast(self.execution), self.engine.running(self.model), arriving:
            yield

    def decode(self, latents: Tensor, *, in_stripes: bool = False) -> Tensor:
        """Normalised latents ``(B, C, h, w)`` to images ``(B, 3, H, W)``, about [-1, 1].

        Args:
            latents: What to decode.
            in_stripes: See `LatentDiffusion.decode`; a small decoder needs little memory anyway.
        """
        if self.decoder is not None:
            return self.decoder.decoder(latents)
        return self.model.decode(latents, in_stripes=in_stripes)

    def adapted(self, uses: Sequence[AdapterUse]) -> AbstractContextManager[dict[str, str]]:
        """Let adapters act for a while; gives the sha256 of each by name."""
        return adapters(self.model, uses, self.adapter_folders)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that this model, or its engine, cannot fulfil.

        Raises:
            RequestError: Saying what the model wants, or what the engine lacks.
        """
        check_fulfillable(request, self.model, self.name, self.engine, self.offload)

    def request(self, **fields: Any) -> GenerationRequest:
        """Build a request for this model from the fields of `GenerationRequest`.

        The task, where it is not given, is what the fields and the model say; the sampler and its
        like are the model's own.

        Raises:
            RequestError: If a field is wrong, or the model wants another condition.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        told = {
            "sampler": self.defaults.sampler,
            "spacing": self.defaults.spacing,
            "guidance_scale": self.defaults.guidance_scale,
            "steps": self.defaults.steps,
        }
        known = find_sampler(str(given.get("sampler", "")))
        # a name such as "DPM++ 2M Karras" says it, and distillation was at levels of its own
        if known is not None and (known.spacing or SAMPLERS[known.sampler].distilled):
            told["spacing"] = None
        for name, value in told.items():
            if value is not None:
                given.setdefault(name, value)
        conditioner = self.model.conditioner
        task = given.pop("task", None) or task_of_fields(given, conditioner)
        if missing := what_is_missing(given, conditioner, self.name):
            raise RequestError(missing)
        request = GenerationRequest.from_dict({"task": task, "model": self.name, **given})
        self.check(request)
        return request

    def generate(
        self,
        prompt: str | None = None,
        *,
        class_label: str | int | None = None,
        negative_prompt: str | None = None,
        image: Picture | InputImage | None = None,
        mask: Picture | InputImage | None = None,
        semantic_map: Picture | InputImage | None = None,
        num_images: int = 1,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guide: Guide | ImageEnergy | Sequence[Guide | ImageEnergy] | None = None,
        eta: float | None = None,
        width: int | None = None,
        height: int | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **more: Unpack[MoreFields],
    ) -> list[GeneratedImage]:
        """Draw pictures; what is left out takes the model's default, or `GenerationRequest`'s.

        Args:
            prompt: For a text-conditional model.
            class_label: For a class-conditional model, a name or an index.
            negative_prompt: What guidance leads away from.
            image: What to begin from, a file or a picture in memory: alone for image-to-image,
                with ``mask`` for inpainting, with ``padding`` for outpainting; the small picture
                for super-resolution.
            mask: White where to draw.
            semantic_map: Whose grey values are the classes of its pixels.
            num_images: How many pictures.
            seed: Picture k is drawn from ``seed + k`` alone.
            steps: Noise levels to visit.
            sampler: A name of `mezzotint.diffusion.samplers.SAMPLERS`.
            spacing: A name of `mezzotint.diffusion.schedule.SPACINGS`.
            guidance_scale: 1 is no guidance.
            guidance_rescale: In [0, 1].
            guide: Where to lead the pictures besides: a `mezzotint.generation.guides.Guide`, or a
                function ``images (B, 3, H, W) in -1..1 -> (B,)`` that is low where they are good
                and can be differentiated; or several.
            eta: Fresh noise of the DDIM family.
            width: In pixels.
            height: In pixels.
            batch_size: Pictures drawn at once; by default as many as fit well.
            on_progress: Called with (steps done, steps in all).
            **more: Other fields of `GenerationRequest`: ``strength``, ``padding``, ``high_res``,
                ``variation_seed``, ``guidance_interval``, ``adapters``, ``clip_skip``,
                ``tiling``, ``feature_reuse``, ….

        Returns:
            Pictures with the request that draws each again.

        Raises:
            RequestError: If the model cannot give what is asked.
        """
        pictures = InputPictures()

        def known(picture: Picture | InputImage | None) -> InputImage | None:
            if picture is None or isinstance(picture, InputImage):
                return picture
            if not isinstance(cast(object, picture), str | Path | Image.Image):
                raise RequestError(
                    f"a picture is a path or a PIL.Image, not a {type(picture).__name__}"
                )
            return pictures.add(picture)

        functions: dict[str, ImageEnergy] = {}
        if guide is not None:
            more["guides"], functions = guide_uses(guide, pictures)
        request = self.request(
            prompt=prompt,
            class_label=class_label,
            negative_prompt=negative_prompt,
            image=known(image),
            mask=known(mask),
            semantic_map=known(semantic_map),
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
            **more,
        )
        return generate(
            self,
            request,
            pictures=pictures,
            functions=functions,
            batch_size=batch_size,
            on_progress=on_progress,
        )


def load(
    model: str | Path,
    device: str = "auto",
    precision: str = "auto",
    *,
    engine: str = "auto",
    decoder: str | Path | None = None,
    offload: OffloadKind = "none",
    quantization: QuantizationKind = "none",
    config: str | Path | None = None,
    family: str | None = None,
    prediction: str | None = None,
    weights: Weights = "auto",
) -> Pipeline:
    """Load a model to draw with.

    On a processor the weights of the UNet and the first stage are packed, see `mezzotint.nn.packed`
    and `mezzotint doctor`, and the process keeps the memory that it frees.

    Args:
        model: A model folder of Mezzotint's or of diffusers', a finished run folder, or a single
            file of the original layout, ``.safetensors`` or ``.ckpt``; or the name of a shipped
            model.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``. The weights of public
            checkpoints stand in memory in it.
        engine: What runs the UNet and the decoder: ``auto`` and ``torch`` are torch, ``openvino``
            is OpenVINO on the processor (extra ``openvino``), which converts a model before its
            first picture.
        decoder: A small decoder in place of the model's own, faster and not quite the same: a
            finished run of kind ``decoder``, or a folder of diffusers' ``AutoencoderTiny``.
        offload: Where weights stand while they are not used: ``none`` on the device;
            ``components`` and ``sequential`` on the CPU, from where they come by parts of the
            model or layer by layer, for devices of less memory.
        quantization: ``int8`` rounds the large weights of the UNet, on a processor by torch: about
            half of bfloat16's memory, faster, and not quite the same pictures.
            `mezzotint.checkpoints.model.save_model` would save the rounded weights.
        config: The YAML of a single file, if it does not lie beside it.
        family: What a single file is, if it is recognised wrongly.
        prediction: ``epsilon`` or ``v_prediction``, if that of a single file is guessed wrongly.
        weights: Of a single file with averaged weights, which to take: ``auto``, ``ema``, ``raw``.

    Raises:
        CheckpointError: If there is no such model, or it is damaged.
        ConfigError: If the device, the precision, the engine, the offload or the quantization is
            not to be had, or the decoder is that of another autoencoder.
        MissingExtraError: If the engine, or a text encoder's package, is not installed.
    """
    if engine == "openvino" and device == "auto":
        device = "cpu"
    execution = select_precision(precision, select_device(device))
    runs = select_engine(engine, execution)
    arrives = select_offload(offload, execution.device, runs.name)
    rounds = select_quantization(quantization, execution, runs.name, offload)
    loaded = load_any(
        model,
        dtype=execution.precision,
        config=Path(config) if config is not None else None,
        family=family,
        prediction=prediction,
        weights=weights,
    )
    small = load_decoder(decoder) if decoder is not None else None
    pipeline = Pipeline(loaded.model, execution, str(model), loaded, runs, small, arrives)
    if isinstance(runs, TorchEngine) and arrives is None:
        if rounds != "none":
            _ = pipeline.model_hash  # which may be of the weights as they are now
            pipeline.quantization = rounds
            if not int8_instructions():
                pipeline.notes += (f"weights in int8: {quantizes_weights(execution)[1]}",)
        runs.prepare(pipeline.model, execution, rounds)
    return pipeline
