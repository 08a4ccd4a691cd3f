"""An exponential moving average of weights, kept in float32."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """Averages a module's parameters: ``ema <- d ema + (1 - d) theta``.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after n updates, so that the random
    start is forgotten at once.

    Args:
        module: Its trainable parameters are averaged.
        decay: The decay d of the running average, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone().float() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they stand now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._live.items():
            self.average[name].lerp_(parameter.float(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Put the averaged weights into the module for the length of a ``with`` block."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self._live.items()}
            for name, parameter in self._live.items():
                parameter.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._live.items():
                    parameter.copy_(kept[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages and the number of updates, as tensors."""
        return {**self.average, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.updates = int(state["updates"])
        for name, average in self.average.items():
            average.copy_(state[name])
