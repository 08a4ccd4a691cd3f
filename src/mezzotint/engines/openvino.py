"""OpenVINO in torch's place, for the UNet and the decoder on a processor.

A network is converted once, for every size and length of its inputs, and kept under its weights;
see `mezzotint.engines.openvino_files`. While a picture is drawn it stands in for the `forward` of
torch's network, whose weights, names and hash stay what they are. All else is torch's: text
encoders, the embedding of times (in float32, which times need), the encoder, and the codes of a
`VQModel`, of which a rounding could choose another.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import mezzotint
from mezzotint.config import Config
from mezzotint.device import Execution, precision_name, threads
from mezzotint.engines.openvino_files import convert, import_openvino, keep, version
from mezzotint.errors import ConfigError, RequestError
from mezzotint.latent_diffusion import LatentDiffusion, fingerprint
from mezzotint.models.autoencoder import IdentityFirstStage
from mezzotint.models.encoder_decoder import Decoder
from mezzotint.models.unet import UNet

__all__ = ["OpenVinoEngine"]

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_INSTEAD = "draw with the engine torch (--engine torch)"


class OpenVinoEngine:
    """Runs UNets and decoders by OpenVINO.

    In float32 its pictures are torch's to within 1 of 255; in bfloat16 they differ as much as
    torch's own do from float32. The same request at the same batch, threads and version draws the
    same picture, bit for bit.

    Args:
        execution: Device and precision.

    Attributes:
        name: ``openvino``.
        version: OpenVINO's.
        lacks: See `mezzotint.engines.select.Engine`.

    Raises:
        ConfigError: If the device is no processor, or the precision not one of OpenVINO's there.
        MissingExtraError: If OpenVINO is not installed.
    """

    name = "openvino"
    lacks: Mapping[str, str] = MappingProxyType(
        {
            "feature_reuse": "runs a network as a whole, every time",
            "token_merging": "runs a network as it was converted, without merging tokens",
            "guides": "computes no gradients, by which guides lead",
            "tiling": "pads with zeros only, while edges that fit together need what lies opposite",
        }
    )

    def __init__(self, execution: Execution) -> None:
        if execution.device.type != "cpu":
            raise ConfigError(
                f"engine 'openvino' runs on the processor, not on {execution.device}: choose the"
                " device cpu, or the engine torch"
            )
        if execution.precision not in _HINTS:
            raise ConfigError(
                f"engine 'openvino' computes in float32 or bfloat16, not in"
                f" {precision_name(execution.precision)}"
            )
        self._core: Any = import_openvino().Core()
        self.version = version()
        self._precision = execution.precision
        self._networks: dict[str, _Network] = {}

    @contextmanager
    def running(self, model: LatentDiffusion) -> Generator[None]:
        """Run a model's networks in torch's place, for a while.

        Each is converted, or read from where it is kept, at its first call.

        Raises:
            RequestError: If adapters or padding have changed a network; also at its call, if it is
                to be differentiated.
            CheckpointError: If a converted network cannot be written.
        """
        unet, first_stage = model.unet, model.first_stage
        if unet.config.coordinate_channels:
            raise RequestError(
                f"the engine 'openvino' runs no network with coordinate_channels yet; {_INSTEAD}"
            )
        run = self._network("UNet", unet, _Trunk(unet), unet.config)
        with ExitStack() as stack:
            stack.enter_context(_in_place_of(unet, _unet_forward(unet, run)))
            if not isinstance(first_stage, IdentityFirstStage):
                decoder = first_stage.decoder
                run = self._network("decoder", decoder, _Decoder(decoder), first_stage.config)
                stack.enter_context(_in_place_of(decoder, run))
            yield

    def _network(
        self, name: str, module: nn.Module, converted: "_Trunk | _Decoder", config: Config
    ) -> Callable[..., Tensor]:
        _refuse_what_acts(name, module)
        known = self._networks.get(name)
        if known is None or not known.is_of(module):
            says = [mezzotint.__version__, name, config.to_dict()]
            known = _Network(converted, says, self._core, self._precision)
            self._networks[name] = known
        run = known.run
        # a function of its own, which copies of the module can share; a bound method they copy
        return lambda *inputs: run(*inputs)


class _Trunk(nn.Module):
    """Of a UNet, what is converted."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.network = unet

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        return self.network.trunk(x, time, context, context_mask)


class _Decoder(nn.Module):
    """A decoder, run by torch even while something stands in for it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.network = decoder

    def forward(self, z: Tensor) -> Tensor:
        return Decoder.forward(self.network, z)


class _Network:
    """A network of torch's, and what runs in its place.

    Args:
        network: `_Trunk` or `_Decoder`.
        says: What decides it beside its weights.
        core: OpenVINO's.
        precision: Of its arithmetic.
    """

    def __init__(
        self,
        network: "_Trunk | _Decoder",
        says: Sequence[object],
        core: Any,
        precision: torch.dtype,
    ) -> None:
        self._module, self._says, self._core, self._precision = network, says, core, precision
        self._state = _state(network.network)
        self._compiled: dict[tuple[int, int], Any] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Whether a module is the one that this was made from, its weights untouched since."""
        now = _state(module)
        return (
            module is self._module.network
            and len(now) == len(self._state)
            and all(
                a is b and before == after
                for (a, *before), (b, *after) in zip(self._state, now, strict=True)
            )
        )

    def run(self, *inputs: Tensor | None) -> Tensor:
        """Run it: tensors as the torch network takes them, to float32."""
        given = [tensor for tensor in inputs if tensor is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            raise RequestError(f"the engine 'openvino' computes no gradients; {_INSTEAD}")
        # a context without a mask is another network, whose attention need not look for one
        key = len(given), threads()
        if key not in self._compiled:
            self._compiled = {k: c for k, c in self._compiled.items() if k[1] == threads()}
            self._compiled[key] = self._compile(given)
        outputs = self._compiled[key]([_array(tensor) for tensor in given], share_inputs=True)
        return torch.from_numpy(outputs[0])

    def _compile(self, example: Sequence[Tensor]) -> Any:
        weights = fingerprint(self._module.network.state_dict().items())
        path = keep(
            [*self._says, weights, len(example)],
            lambda: convert(self._module, [_plain(tensor) for tensor in example]),
            half=self._precision is torch.bfloat16,
        )
        told = {
            "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
            "INFERENCE_NUM_THREADS": threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # as many threads as torch has, wherever the system puts them: several processes that
            # bind theirs would all choose the same processors
            "ENABLE_HYPER_THREADING": True,
            "ENABLE_CPU_PINNING": False,
        }
        return self._core.compile_model(self._core.read_model(str(path)), "CPU", told)


def _unet_forward(unet: UNet, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What stands in for `UNet.forward`, of the same arguments."""

    def forward(
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        memory: object = None,  # torch's keys and values, which this engine computes for itself
        context_boxes: Tensor | None = None,
    ) -> Tensor:
        if context_boxes is not None:
            raise RequestError(f"the engine 'openvino' knows no words of boxes; {_INSTEAD}")
        unet.check_conditions(context, vector, guidance)
        return run(x, unet.embed(timestep, vector, guidance), context, context_mask)

    return forward


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Tensor]) -> Generator[None]:
    """Let a function run when a module is called; hooks of the module itself still act."""
    outer = vars(module).get("forward")  # of a pipeline that is drawing already
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if outer is not None:
            module.forward = outer


def _refuse_what_acts(name: str, module: nn.Module) -> None:
    """Refuse what changes a network without changing its weights: it was converted without."""
    for layer in module.modules():
        hooked = any(vars(layer)[kind] for kind in ("_forward_hooks", "_forward_pre_hooks"))
        if hooked and layer is not module:
            raise RequestError(
                f"the engine 'openvino' runs the {name} as it was converted, without a LoRA or"
                f" whatever else hooks its layers; {_INSTEAD}"
            )
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise RequestError(
                f"the engine 'openvino' pads with zeros only, but the {name} has layers of"
                f" padding_mode {layer.padding_mode!r}; {_INSTEAD}"
            )


def _state(module: nn.Module) -> list[tuple[Tensor, int, int]]:
    """What tells whether weights were exchanged, written to or moved."""
    return [
        (tensor, 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())  # pyright: ignore[reportPrivateUsage]
        for tensor in chain(module.parameters(), module.buffers())
    ]


def _plain(tensor: Tensor) -> Tensor:
    """As OpenVINO takes it: booleans as they are, numbers in float32, rows after rows."""
    wide = tensor if tensor.dtype is torch.bool else tensor.float()
    return wide.detach().cpu().contiguous()


def _array(tensor: Tensor) -> Any:
    return _plain(tensor).numpy()
