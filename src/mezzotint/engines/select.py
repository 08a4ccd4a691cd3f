"""Which engine runs the networks of a model while it draws."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Literal, Protocol, cast, get_args

from torch import nn

from mezzotint.device import (
    Execution,
    give_back_freed_memory,
    int8_instructions,
    keep_freed_memory,
    packs_weights,
    quantizes_weights,
)
from mezzotint.engines.openvino import OpenVinoEngine
from mezzotint.errors import ConfigError, nearest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.autoencoder import IdentityFirstStage
from mezzotint.nn.packed import WINOGRAD_PIXELS, pack
from mezzotint.nn.quantized import quantize

__all__ = ["ENGINES", "Engine", "QuantizationKind", "TorchEngine"]
__all__ += ["select_engine", "select_quantization"]

QuantizationKind = Literal["none", "int8"]


class Engine(Protocol):
    """What runs a UNet and a decoder. Whichever it is, requests and pictures are the same."""

    @property
    def name(self) -> str:
        """What requests call it."""
        ...

    @property
    def version(self) -> str | None:
        """Of its software, where that is not torch."""
        ...

    @property
    def lacks(self) -> Mapping[str, str]:
        """Which fields of a request it cannot fulfil, and why: what follows "the engine"."""
        ...

    def running(self, model: LatentDiffusion) -> AbstractContextManager[None]:
        """Let it run a model's networks in torch's place, for a while.

        Args:
            model: Its weights, their names and its hash stay what they are.

        Raises:
            RequestError: If something acts on the networks that it cannot follow.
        """
        ...


class TorchEngine:
    """torch runs its own networks."""

    name = "torch"
    version = None
    lacks: Mapping[str, str] = MappingProxyType({})

    def prepare(
        self,
        model: LatentDiffusion,
        execution: Execution,
        quantization: QuantizationKind = "none",
    ) -> None:
        """Make a model ready to be drawn with alone, as `mezzotint.device.drawing_reasons` says.

        Args:
            model: On the device, in evaluation mode; its UNet and first stage are packed.
            execution: Device and precision.
            quantization: What `select_quantization` returned. ``int8`` rounds large weights of the
                UNet, and none of the first stage, whose pictures are all that is seen.
        """
        if quantization == "int8":
            ends = (model.unet.conv_in, model.unet.conv_out)
            multiplies = bool(int8_instructions())
            quantize(model.unet, execution.precision, keep=ends, multiplies=multiplies)
        if packs_weights(execution)[0]:
            for level in _fine_levels(model):
                pack(level, execution.precision, winograd=True)
            pack(model.unet, execution.precision)
            if not isinstance(model.first_stage, IdentityFirstStage):
                # whose weights are few beside the features of a picture
                pack(model.first_stage.decoder, execution.precision, winograd=True)
            pack(model.first_stage, execution.precision)
        if execution.device.type == "cpu":
            give_back_freed_memory()  # the weights that were exchanged
            keep_freed_memory()

    def running(self, model: LatentDiffusion) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()


def _fine_levels(model: LatentDiffusion) -> Iterator[nn.Module]:
    """The levels of a UNet whose features are large beside their weights, at its own image size."""
    unet = model.unet
    _, height, width = model.latent_shape(*model.image_size)
    levels = zip(unet.down_blocks, reversed(unet.up_blocks), strict=True)
    for level, blocks in enumerate(levels):
        if (height >> level) * (width >> level) >= WINOGRAD_PIXELS:
            yield from blocks


ENGINES: Mapping[str, Callable[[Execution], Engine]] = MappingProxyType(
    {"torch": lambda _: TorchEngine(), "openvino": OpenVinoEngine}
)


def select_engine(name: str, execution: Execution) -> Engine:
    """Choose what runs the networks.

    Args:
        name: ``torch``, ``openvino``, or ``auto``, which is torch: another engine is only taken
            where it is asked for, because it converts a model before its first picture.
        execution: Device and precision.

    Raises:
        ConfigError: If there is no such engine, or it does not run on the device.
        MissingExtraError: If it is not installed.

    Example:
        >>> from mezzotint.device import select_device, select_precision
        >>> select_engine("auto", select_precision("float32", select_device("cpu"))).name
        'torch'
    """
    if name == "auto":
        return TorchEngine()
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r}: {nearest(name, ('auto', *ENGINES))}")
    return ENGINES[name](execution)


def select_quantization(
    name: str, execution: Execution, engine: str, offload: str
) -> QuantizationKind:
    """Choose what the large weights of a UNet are kept in.

    Args:
        name: ``none`` for the precision that they were loaded in, or ``int8``; see
            `mezzotint.nn.quantized`.
        execution: Device and precision.
        engine: What runs the networks.
        offload: How weights are kept; see `mezzotint.engines.offload.select_offload`.

    Raises:
        ConfigError: If there is no such kind, or the device, the engine or the offload excludes it.

    Example:
        >>> from mezzotint.device import select_device, select_precision
        >>> execution = select_precision("float32", select_device("cpu"))
        >>> select_quantization("none", execution, "torch", "none")
        'none'
    """
    if name not in get_args(QuantizationKind):
        raise ConfigError(f"quantization {name!r}: {nearest(name, get_args(QuantizationKind))}")
    if name == "none":
        return "none"
    if engine != "torch":
        raise ConfigError(
            f"quantization {name!r} is for the engine torch; {engine!r} keeps weights of its own"
        )
    possible, why = quantizes_weights(execution)
    if not possible:
        raise ConfigError(f"quantization {name!r}: weights stay {why}")
    if offload != "none":
        raise ConfigError(
            f"quantization {name!r} and offload {offload!r} exclude each other: on a processor"
            " there is nowhere to bring weights to"
        )
    return cast(QuantizationKind, name)
