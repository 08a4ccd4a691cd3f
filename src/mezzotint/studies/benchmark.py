"""How fast a model draws on this machine, as a share of what the machine can do, and where."""

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import mezzotint
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.spatial import LowResConditioner, spatial_conditioner
from mezzotint.conditioning.vocabularies import bert_tokenizer, clip_tokenizer
from mezzotint.config import Config, Document
from mezzotint.device import precision_name, select_precision
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.request import LayoutBox
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, IdentityFirstStage
from mezzotint.models.encoder_decoder import Decoder
from mezzotint.models.small_decoder import SmallDecoder
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.studies.machine import Machine, this_machine
from mezzotint.studies.speed import count_flops, peak_flops, seconds_of, synchronize

__all__ = [
    "Benchmark",
    "Part",
    "Timing",
    "example_fields",
    "random_pipeline",
    "run_benchmark",
]

PROMPT = "a red apple on a table"
_QUICK_SIDE, _STABLE_SIDE = 64, 512
Tell = Callable[[str], None]


class Timing(Config):
    """How long something takes.

    Attributes:
        what: With its size.
        seconds: The median of several calls.
        flops: Operations of a call, if they were counted.
        share: Of the peak in the model's precision.
    """

    what: str
    seconds: float
    flops: int | None = None
    share: float | None = None


class Part(Config):
    """What a part of the model takes of a picture.

    Attributes:
        name: ``condition``, ``unet``, ``encoder``, ``decoder``, and ``rest`` for what is none.
        seconds: Of all its calls.
        calls: How many.
    """

    name: str
    seconds: float
    calls: int


class Benchmark(Document):
    """How fast a model draws on a machine.

    Attributes:
        model: Its name.
        machine: With the precision that it ran in.
        engine: What ran its networks.
        quantization: What large weights of the UNet were rounded to, if they were.
        reasons: Why this device and precision.
        mezzotint_version: That measured.
        torch_version: Of torch.
        height: Of the picture, in pixels.
        width: Of the picture.
        steps: Of the picture.
        peaks: Operations a second by precision; see `mezzotint.studies.speed.peak_flops`.
        timings: A step, a decoding and a whole picture.
        parts: Where the picture's time went.
    """

    model: str
    machine: Machine
    engine: str
    quantization: str = "none"
    reasons: tuple[str, ...]
    mezzotint_version: str
    torch_version: str
    height: int
    width: int
    steps: int
    peaks: dict[str, float]
    timings: tuple[Timing, ...]
    parts: tuple[Part, ...]


@contextmanager
def random_pipeline(*, quick: bool, **options: Any) -> Generator[Pipeline]:
    """Give a model with random weights, loaded as any other: from a temporary folder.

    Args:
        quick: A tiny model, that only shows that all works; otherwise one of the shape of Stable
            Diffusion 1.5, which takes 2 GB of disk meanwhile and 5 GB of memory.
        **options: Of `mezzotint.generation.pipeline.load`.

    Raises:
        MissingExtraError: If it reads CLIP's text, and ``transformers`` is not installed.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / ("quick" if quick else "stable-diffusion")
        save_pipeline(_quick() if quick else _stable_diffusion(), folder, dtype=torch.float16)
        pipeline = load(folder, **options)
        pipeline.name = "random weights, " + ("tiny" if quick else "Stable Diffusion 1.5's shape")
        yield pipeline


def _stable_diffusion() -> LatentDiffusion:
    stage = AutoencoderKLConfig.from_dict({"block_out_channels": (128, 256, 512, 512)})
    conditioner = ClipConditioner(ClipConditionerConfig(), clip_tokenizer())
    return _model(AutoencoderKL(stage), UNet(UNetConfig.from_dict({})), conditioner, _STABLE_SIDE)


def _quick() -> LatentDiffusion:
    widths = (32, 32, 64, 64)
    stage = AutoencoderKLConfig.from_dict({"block_out_channels": widths, "layers_per_block": 1})
    text = BertTextConditionerConfig(width=64, layers=1, heads=2, head_dim=32, ffn_dim=64)
    unet = UNetConfig.from_dict(
        {
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "attention_levels": (True, False),
            "cross_attention_dim": 64,
        }
    )
    conditioner = BertTextConditioner(text, bert_tokenizer())
    return _model(AutoencoderKL(stage), UNet(unet), conditioner, _QUICK_SIDE)


def _model(
    first_stage: FirstStage, unet: UNet, conditioner: Conditioner, side: int
) -> LatentDiffusion:
    schedule = ScheduleConfig(steps_offset=1, set_alpha_to_one=False)
    scale = LatentNormalization.from_scale_factor(0.18215)
    return LatentDiffusion(first_stage, unet, conditioner, schedule, scale, (side, side))


def run_benchmark(
    pipeline: Pipeline, *, steps: int = 20, calls: int = 5, tell: Tell | None = None
) -> Benchmark:
    """Measure what a machine can do, and how near to it a model draws.

    Args:
        pipeline: The model and how it runs.
        steps: Of the picture.
        calls: Of which the median counts.
        tell: Told what is measured next.
    """
    tell = tell or (lambda _: None)
    execution, model = pipeline.execution, pipeline.model
    device, (height, width) = execution.device, model.image_size
    asked = example_fields(pipeline)
    tell("the first steps, to warm up")
    # identifying the model is no part of drawing
    _ = pipeline.model_hash
    with _watched(pipeline) as seen:
        pipeline.generate(**asked, steps=min(2, steps))
    tell("the machine's peak")
    peaks = _peaks(pipeline, calls)
    peak = peaks[precision_name(execution.precision)]
    tell("a step and a decoding")
    timings = [_step(pipeline, seen["unet"], peak, calls)]
    if "decoder" in seen:
        timings.append(_decoding(pipeline, seen["decoder"], peak, calls))
    tell(f"a picture of {steps} steps")
    with _watched(pipeline) as seen:
        seconds = seconds_of(lambda: pipeline.generate(**asked, steps=steps), device)
    timings.append(Timing(what=f"picture, {width} x {height}, {steps} steps", seconds=seconds))
    parts = [Part(name=k, seconds=w.seconds, calls=w.calls) for k, w in seen.items() if w.calls]
    rest = seconds - sum(part.seconds for part in parts)
    return Benchmark(
        model=pipeline.name,
        machine=this_machine(execution),
        engine=pipeline.engine.name,
        quantization=pipeline.quantization,
        reasons=execution.reasons,
        mezzotint_version=mezzotint.__version__,
        torch_version=torch.__version__,
        height=height,
        width=width,
        steps=steps,
        peaks=peaks,
        timings=tuple(timings),
        parts=(*parts, Part(name="rest", seconds=rest, calls=1)),
    )


def example_fields(pipeline: Pipeline) -> dict[str, Any]:
    """Return what a picture of any model can be asked for by: arguments of `Pipeline.generate`."""
    model, conditioner = pipeline.model, pipeline.model.conditioner
    height, width = model.image_size
    asked: dict[str, Any] = {"seed": 0}
    match conditioner.wants:
        case "caption":
            asked["prompt"] = PROMPT
        case "label":
            asked["class_label"] = 0
        case "layout":
            asked["layout"] = [LayoutBox(label=0, box=(0.25, 0.25, 0.75, 0.75))]
        case None:
            pass
    match conditioner.wants_concat:
        case "map":
            asked["semantic_map"] = Image.new("L", (width, height))
        case "low_res":
            spatial = spatial_conditioner(conditioner)
            fold = spatial.config.fold if isinstance(spatial, LowResConditioner) else 1
            factor = model.first_stage.factor
            small = width * fold // factor, height * fold // factor
            asked["image"] = Image.new("RGB", small, "gray")
        case "inpainting":
            asked["image"] = Image.new("RGB", (width, height), "gray")
            asked["mask"] = Image.new("L", (width, height), "white")
        case "regions":
            asked["layout"] = [LayoutBox(label=PROMPT, box=(0.25, 0.25, 0.75, 0.75))]
        case None:
            pass
    return asked


def _peaks(pipeline: Pipeline, calls: int) -> dict[str, float]:
    """In float32, in what the device computes in best, and in what the model runs in."""
    device = pipeline.execution.device
    best = select_precision("auto", device).precision
    kinds = dict.fromkeys((torch.float32, best, pipeline.execution.precision))
    return {precision_name(kind): peak_flops(device, kind, calls=calls) for kind in kinds}


class _Watch:
    """The calls of a module: how long they took, and what the last one was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.calls, self.begun = 0.0, 0, 0.0
        self.inputs: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def before(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Begin."""
        self.inputs, self.named = inputs, named
        synchronize(self.device)
        self.begun = time.perf_counter()

    def after(self, *_: Any) -> None:
        """End."""
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.begun
        self.calls += 1


@contextmanager
def _watched(pipeline: Pipeline) -> Generator[dict[str, _Watch]]:
    """Watch the parts of a model for a while."""
    model = pipeline.model
    parts: dict[str, nn.Module] = {"condition": model.conditioner, "unet": model.unet}
    if not isinstance(model.first_stage, IdentityFirstStage):
        parts |= {"encoder": model.first_stage.encoder, "decoder": _decoder_of(pipeline)}
    watches = {name: _Watch(pipeline.execution.device) for name in parts}
    with ExitStack() as stack:
        for name, part in parts.items():
            for handle in (
                part.register_forward_pre_hook(watches[name].before, with_kwargs=True),
                part.register_forward_hook(watches[name].after),
            ):
                stack.callback(handle.remove)
        yield watches


def _step(pipeline: Pipeline, seen: _Watch, peak: float, calls: int) -> Timing:
    """The last call of the UNet again, sharing nothing with another."""
    unet, named = pipeline.model.unet, {**seen.named, "memory": None}
    x, t = seen.inputs
    given = [named.get(name) for name in ("context", "context_mask", "vector", "guidance")]
    config = unet.config
    flops = count_flops(lambda: UNet(config), x, t, *given)
    what = f"UNet step, latents {' x '.join(str(side) for side in x.shape)}"
    return _timed(pipeline, lambda: unet(x, t, **named), what, flops, peak, calls)


def _decoder_of(pipeline: Pipeline) -> Decoder | SmallDecoder:
    """The one that draws: the model's own, or the small one in its place."""
    first_stage = pipeline.model.first_stage
    assert not isinstance(first_stage, IdentityFirstStage)
    return first_stage.decoder if pipeline.decoder is None else pipeline.decoder.decoder


def _decoding(pipeline: Pipeline, seen: _Watch, peak: float, calls: int) -> Timing:
    first_stage, decoder, (z,) = pipeline.model.first_stage, _decoder_of(pipeline), seen.inputs
    assert not isinstance(first_stage, IdentityFirstStage)
    of_own = first_stage.config

    def build() -> nn.Module:
        return (
            SmallDecoder(decoder.config) if isinstance(decoder, SmallDecoder) else Decoder(of_own)
        )

    flops = count_flops(build, z)
    height, width = (side * first_stage.factor for side in z.shape[2:])
    what = f"decoding, {z.shape[0]} x {width} x {height}"
    return _timed(pipeline, lambda: decoder(z), what, flops, peak, calls)


@torch.inference_mode()
def _timed(
    pipeline: Pipeline,
    call: Callable[[], Tensor],
    what: str,
    flops: int,
    peak: float,
    calls: int,
) -> Timing:
    with pipeline.running():
        times = [seconds_of(call, pipeline.execution.device) for _ in range(calls + 1)]
    seconds = statistics.median(times[1:])
    return Timing(what=what, seconds=seconds, flops=flops, share=flops / (seconds * peak))
