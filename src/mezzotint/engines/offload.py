"""Drawing on a device whose memory the model does not fit: weights stand on the CPU until used."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mezzotint.errors import ConfigError, nearest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.regularizers import VectorQuantizer
from mezzotint.nn.attention import Attention

__all__ = ["Offload", "OffloadKind", "select_offload"]

OffloadKind = Literal["none", "components", "sequential"]

# of these, weights are read beside the calls of the layers that own them
_WHOLE = (Attention, VectorQuantizer)


class Offload:
    """Keeps a model's weights on the CPU, and copies them to a device for as long as they are used.

    Pictures are those of a model that stands on the device. The weights on the CPU stay what they
    are: nothing is copied back, so nothing on the device may change them, and no gradients flow.

    Args:
        kind: ``components``: the text encoder, the UNet and the first stage take turns, and each
            stays until another is called. ``sequential``: so does the text encoder, but of the
            networks only the layer that computes is there.
        device: Where they compute.

    Attributes:
        kind: As given.
        resident: Bytes of weights on the device now.
        most: The most that there were at a time.
    """

    def __init__(self, kind: Literal["components", "sequential"], device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.resident = self.most = 0
        self._there: dict[nn.Parameter, Tensor] = {}  # weights on the device; theirs on the CPU
        self._component: nn.Module | None = None
        self._calls: list[list[nn.Parameter]] = []  # what came for each that is under way

    def place(self, model: LatentDiffusion) -> None:
        """Bring a model's weights to the CPU, and what is no weight to the device.

        Args:
            model: Its buffers are small.
        """
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = self._kept(parameter.data)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    @contextmanager
    def running(self, model: LatentDiffusion) -> Generator[None]:
        """Bring the weights of whatever is called to the device, for a while.

        Args:
            model: Was placed. It may be changed meanwhile by nothing but adapters.
        """
        with ExitStack() as stack:
            stack.callback(self._leave)  # after an error too
            # autocast would keep its copies of weights on the device
            stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            for component in (model.conditioner, model.unet, model.first_stage):
                for unit in _units(component, model):
                    arrive, after = partial(self._arrive, unit, component), self._depart
                    # around hooks that are there already: those of adapters read weights
                    stack.callback(unit.register_forward_pre_hook(arrive, prepend=True).remove)
                    if self.kind == "sequential":
                        stack.callback(unit.register_forward_hook(after, always_call=True).remove)
            yield

    def _arrive(self, unit: nn.Module, component: nn.Module, *_: Any) -> None:
        """Before a call: bring the weights of what is called, or of what it is a part of."""
        if self.kind == "sequential":
            self._calls.append(self._bring(unit))
        elif self._component is not component:
            self._leave()
            self._component = component
            self._bring(component)

    def _depart(self, *_: Any) -> None:
        """After a call: take away what came for it."""
        self._take_away(self._calls.pop())

    def _bring(self, module: nn.Module) -> list[nn.Parameter]:
        arrived = [parameter for parameter in module.parameters() if parameter not in self._there]
        for parameter in arrived:
            self._there[parameter] = parameter.data
            parameter.data = parameter.data.to(self.device, non_blocking=True, copy=True)
            self.resident += parameter.nbytes
        self.most = max(self.most, self.resident)
        return arrived

    def _take_away(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self.resident -= parameter.nbytes
            parameter.data = self._there.pop(parameter)

    def _leave(self) -> None:
        self._take_away(list(self._there))
        self._calls.clear()
        self._component = None

    def _kept(self, weights: Tensor) -> Tensor:
        """Weights on the CPU; where a GPU can fetch them from by itself, if the device is one."""
        weights = weights.cpu()
        return weights.pin_memory() if self.device.type == "cuda" else weights


def _units(component: nn.Module, model: LatentDiffusion) -> Iterator[nn.Module]:
    """The modules of a component at whose calls weights arrive."""
    if component is model.conditioner:
        # it reads weights wherever it likes, and is called once for all steps
        yield component
        return
    for module in component.modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns or isinstance(module, _WHOLE):
            yield module


def select_offload(kind: str, device: torch.device, engine: str) -> Offload | None:
    """Choose how weights are kept.

    Args:
        kind: ``none``, ``components`` or ``sequential``.
        device: Where the networks compute.
        engine: What runs them.

    Raises:
        ConfigError: If there is no such way, or the engine keeps weights of its own.

    Example:
        >>> select_offload("none", torch.device("cpu"), "torch") is None
        True
    """
    if kind not in get_args(OffloadKind):
        raise ConfigError(f"offload {kind!r}: {nearest(kind, get_args(OffloadKind))}")
    if kind == "none":
        return None
    if engine != "torch":
        raise ConfigError(
            f"offload {kind!r} is for the engine torch; {engine!r} keeps weights of its own on the"
            " processor"
        )
    return Offload(cast(Literal["components", "sequential"], kind), device)
